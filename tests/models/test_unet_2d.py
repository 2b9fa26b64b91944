"""The network: official outputs, the paper's sizes and initialisation, and stock's behaviour for the same weights."""

import inspect
import json
import math

import diffusers
import pytest
import torch
from oracles import OFFICIAL_NETWORK, official, official_state_dict, relative_error
from torch import nn

from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel
from ddpm_hf.diffusion.objectives import simple_loss
from ddpm_hf.models.unet_2d import parameter_count

StockUNet2DModel = diffusers.UNet2DModel

# "35.7 million", "114 million" and "approximately 256 million parameters" (Appendix B), counted in full.
PARAMETERS = {
    "cifar10": 35_746_307,
    "celebahq256": 113_673_219,
    "lsun_bedroom256": 113_673_219,
    "lsun_bedroom256_large": 255_677_955,
    "lsun_church256": 113_673_219,
    "lsun_cat256": 113_673_219,
}
# As CIFAR-10's, with an eighth of the channels.
NARROW = {"block_out_channels": (32, 64, 64, 64)}
CONFIGURATIONS = {
    "official": OFFICIAL_NETWORK,
    "stock-like": {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    }
    | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1},
    "learned-variance": OFFICIAL_NETWORK | {"out_channels": 6},
    "classes": OFFICIAL_NETWORK | {"num_class_embeds": 5},
    "fourier": OFFICIAL_NETWORK | {"time_embedding_type": "fourier", "center_input_sample": True},
    "resnet-sampling": OFFICIAL_NETWORK | {"downsample_type": "resnet", "upsample_type": "resnet"},
    "scale-shift": OFFICIAL_NETWORK | {"resnet_time_scale_shift": "scale_shift", "dropout": 0.1},
    "no-attention": OFFICIAL_NETWORK | {"add_attention": False, "sample_size": None},
}


def make(cls=UNet2DModel, seed: int = 0, away_from_zero: bool = True, **config):
    """A network in evaluation mode whose last layers are not nearly 0."""
    torch.manual_seed(seed)
    unet = cls(**config)
    if away_from_zero:
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return unet.eval()


def inputs(unet, batch: int = 2):
    size = unet.config.sample_size or 8
    x_t = torch.randn(batch, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(batch) if unet.config.num_class_embeds else None
    return x_t, torch.tensor([3, 700])[:batch], labels


# ---------------------------------------------------------------------- the official implementation's outputs


@pytest.fixture(scope="module")
def official_unet():
    unet = UNet2DModel(**OFFICIAL_NETWORK).eval()
    unet.load_state_dict(official_state_dict())
    return unet


def official_error(unet) -> float:
    with torch.no_grad():
        return relative_error(unet(official("x"), official("t")).sample, official("unet_out"))


def test_official_network(official_unet):
    assert parameter_count(official_unet) == 702_499
    assert official_error(official_unet) < 1e-5


@pytest.mark.parametrize("t", ["0", "37", "998"])
def test_official_network_along_the_chain(official_unet, t):
    timesteps = {"0": [0, 1], "37": [37, 500], "998": [998, 999]}[t]
    with torch.no_grad():
        found = official_unet(official(f"eps_fixedlarge_{t}_xt"), torch.tensor(timesteps)).sample
    assert relative_error(found, official(f"eps_fixedlarge_{t}_model_output")) < 1e-5


def test_the_raw_weights_fail():
    """The checkpoint holds the raw weights beside their moving average; the paper's numbers are the average's."""
    unet = UNet2DModel(**OFFICIAL_NETWORK).eval()
    unet.load_state_dict(official_state_dict(ema=False))
    assert official_error(unet) > 0.1


@pytest.mark.parametrize(
    ("wrong", "at_least"),
    [
        ({"downsample_padding": 1}, 0.1),
        ({"attention_head_dim": 8}, 0.01),
        ({"flip_sin_to_cos": True}, 0.01),
        ({"freq_shift": 0}, 0.01),
        ({"norm_eps": 1e-5}, 1e-5),
    ],
)
def test_one_of_stocks_defaults_fails(wrong, at_least):
    unet = UNet2DModel(**{**OFFICIAL_NETWORK, **wrong}).eval()
    unet.load_state_dict(official_state_dict())
    assert official_error(unet) > at_least


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize("preset", PARAMETERS)
def test_parameter_counts(preset):
    with torch.device("meta"):
        unet = UNet2DModel.from_preset(preset)
    assert parameter_count(unet) == PARAMETERS[preset]


def test_parameter_counts_of_variants():
    with torch.device("meta"):
        assert parameter_count(UNet2DModel.from_preset("cifar10", out_channels=6)) == 35_749_766
        digits = UNet2DModel.from_preset("digits")
    assert parameter_count(digits) < 3_000_000
    assert (digits.config.in_channels, digits.config.out_channels, digits.config.sample_size) == (1, 1, 8)


@pytest.mark.parametrize(("preset", "levels"), [("cifar10", 4), ("celebahq256", 6)])
def test_resolutions_and_attention_are_appendix_bs(preset, levels):
    """Four or six resolutions, two blocks each, attention where the feature map is 16x16 and in the middle."""
    with torch.device("meta"):
        unet = UNet2DModel.from_preset(preset)
    size = unet.config.sample_size
    assert len(unet.down_blocks) == len(unet.up_blocks) == levels
    for level, (down, up) in enumerate(zip(unet.down_blocks, reversed(unet.up_blocks), strict=True)):
        assert len(down.resnets) == 2
        assert len(up.resnets) == 3
        assert hasattr(down, "attentions") == hasattr(up, "attentions") == (size >> level == 16)
    assert len(unet.mid_block.attentions) == 1


def test_the_smallest_preset_runs():
    unet = UNet2DModel.from_preset("digits").eval()
    assert unet(*inputs(unet)[:2]).sample.shape == (2, 1, 8, 8)


# ---------------------------------------------------------------------- initialisation


def last_layers(unet) -> set[str]:
    """The layers that the official code initialises with scale 0, by name."""
    return {name for name, _ in unet.named_modules() if name == "conv_out" or name.endswith((".conv2", ".to_out.0"))}


def test_initialisation_is_the_official_one():
    """`variance_scaling(scale, 'fan_avg', 'uniform')`, which is uniform in +-sqrt(3 scale / mean of the fans)."""
    torch.manual_seed(0)
    unet = UNet2DModel.from_preset("cifar10", **NARROW)
    assert len(last_layers(unet)) == 29
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert last_layers(unet) <= set(layers)
    for name, layer in layers.items():
        receptive = math.prod(layer.weight.shape[2:])
        fans = (layer.weight.shape[0] + layer.weight.shape[1]) * receptive / 2
        bound = math.sqrt(3 * (1e-10 if name in last_layers(unet) else 1.0) / fans)
        share = layer.weight.detach() / bound
        n = share.numel()
        assert share.abs().max() <= 1, name
        assert share.abs().max() > 1 - 10 / n, name  # it fills the interval
        assert abs(share.mean()) < 5 / math.sqrt(3 * n), name
        assert abs(share.var() - 1 / 3) < 5 * math.sqrt(4 / 45 / n), name  # the variance of a uniform's square
        assert not layer.bias.any(), name
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


def test_stocks_initialisation_fails():
    torch.manual_seed(0)
    stock = StockUNet2DModel(**OFFICIAL_NETWORK)
    assert stock.conv_in.bias.abs().max() > 0.01
    assert stock.conv_out.weight.abs().max() > 0.01


def test_a_fresh_network_says_nothing_and_its_loss_is_the_noise():
    torch.manual_seed(0)
    unet = UNet2DModel.from_preset("cifar10", **NARROW).eval()
    x_0, noise = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randn(4, 3, 32, 32)
    t = torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        assert unet(x_0, t).sample.abs().max() < 1e-3
        loss = simple_loss(unet, DDPMScheduler(), x_0, t, noise)
    torch.testing.assert_close(loss, noise.square().mean((1, 2, 3)), rtol=1e-3, atol=0)


def test_the_seed_decides_the_weights():
    one, same, other = (make(seed=seed, away_from_zero=False, **OFFICIAL_NETWORK) for seed in (1, 1, 2))
    assert torch.equal(one.conv_in.weight, same.conv_in.weight)
    assert not torch.equal(one.conv_in.weight, other.conv_in.weight)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_leaves_the_global_generator_alone(tmp_path, low_cpu_mem_usage):
    unet = make(**OFFICIAL_NETWORK)
    unet.save_pretrained(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = UNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in again.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------- stock


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_same_weights_give_stocks_output(name):
    ours = make(**CONFIGURATIONS[name])
    stock = make(StockUNet2DModel, seed=1, **CONFIGURATIONS[name])
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    x_t, t, labels = inputs(ours)
    with torch.no_grad():
        assert torch.equal(ours(x_t, t, labels).sample, stock(x_t, t, labels).sample)
        assert torch.equal(ours(x_t, 7, labels).sample, stock(x_t, 7, labels, return_dict=False)[0])
        assert torch.equal(ours(x_t, t[:1], labels, return_dict=False)[0], stock(x_t, t[:1], labels).sample)
    other = make(StockUNet2DModel, seed=2, **CONFIGURATIONS[name])
    ours.load_state_dict(other.state_dict())  # and back
    with torch.no_grad():
        assert torch.equal(ours(x_t, t, labels).sample, other(x_t, t, labels).sample)


def test_signature_and_configuration_are_stocks():
    def arguments(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    assert arguments(UNet2DModel.__init__) == arguments(StockUNet2DModel.__init__)
    assert arguments(UNet2DModel.forward) == arguments(StockUNet2DModel.forward)
    with torch.device("meta"):
        ours, stock = UNet2DModel(sample_size=32), StockUNet2DModel(sample_size=32)
    configs = [dict(unet.config) for unet in (ours, stock)]
    for config in configs:
        config.pop("_use_default_values", None)
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_saving_and_loading_keeps_weights_and_configuration(name, tmp_path):
    unet = make(**CONFIGURATIONS[name])
    unet.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == "UNet2DModel"
    assert "_name_or_path" not in saved
    for cls in (UNet2DModel, StockUNet2DModel):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is cls
        assert all(torch.equal(value, unet.state_dict()[key]) for key, value in again.state_dict().items())
        keys = inspect.signature(UNet2DModel).parameters
        assert {key: again.config[key] for key in keys} == {
            # JSON has lists for tuples
            key: list(value) if isinstance(value := unet.config[key], tuple) else value
            for key in keys
        }


@pytest.mark.parametrize("name", ["official", "classes"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    unet = make(**CONFIGURATIONS[name]).train()
    x_t, t, labels = inputs(unet)

    def gradients():
        unet.zero_grad()
        unet(x_t, t, labels).sample.square().mean().backward()
        return {key: parameter.grad.clone() for key, parameter in unet.named_parameters()}

    plain = gradients()
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    checkpointed = gradients()
    assert all(gradient.any() for gradient in plain.values())
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-5, atol=1e-7)


def test_class_labels_pass_through():
    unet = make(**CONFIGURATIONS["classes"])
    x_t, t, _ = inputs(unet)
    with torch.no_grad():
        zero, one, both = (unet(x_t, t, torch.tensor(labels)).sample for labels in ([0, 0], [1, 1], [0, 1]))
        by_name = unet(x_t, t, class_labels=torch.tensor([0, 1])).sample
    assert (zero - one).abs().max() > 1e-3
    assert torch.equal(both[0], zero[0])
    assert torch.equal(both[1], one[1])
    assert torch.equal(by_name, both)
    with pytest.raises(ValueError, match="class_labels should be provided"):
        unet(x_t, t)


@pytest.mark.parametrize("size", [(8, 12), (6, 8), (16, 16)])
def test_other_sizes_than_the_trained_one_run_where_they_can_be_halved(official_unet, size):
    with torch.no_grad():
        assert official_unet(torch.randn(1, 3, *size), 3).sample.shape == (1, 3, *size)


def test_it_compiles_without_graph_breaks(official_unet):
    torch._dynamo.reset()
    compiled = torch.compile(official_unet, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(official("x"), official("t")).sample
    assert relative_error(found, official("unet_out")) < 1e-5


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_out_channels": (33, 64)}, r"multiples of norm_num_groups=32, and 33 is not"),
        ({"down_block_types": ("DownBlock2D",)}, r"same number of `down_block_types`"),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        UNet2DModel(**{**OFFICIAL_NETWORK, **config})


def test_28_pixels_and_four_resolutions():
    """MNIST's size, which fails deep inside stock; a network that says so and runs at 32 is stock's."""
    config = {**NARROW, "sample_size": 28}
    unet = UNet2DModel.from_preset("cifar10", **config).eval()
    stock = StockUNet2DModel(**unet.config).eval()
    stock.load_state_dict(unet.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(unet(x, 5).sample, stock(x, 5).sample)
        with pytest.raises(ValueError, match=r"28x28 cannot be halved 3 .*multiple of 8, for example 24 or 32"):
            unet(x[..., :28, :28], 5)
    with pytest.raises(ValueError, match=r"28x28 cannot be halved 3"):
        DDPMPipeline(unet, DDPMScheduler())(seeds=[0])


@pytest.mark.parametrize(("size", "message"), [(7, "7x7 .*multiple of 2, for example 6 or 8"), (1, "1x1 .* 2 or 4")])
def test_sizes_that_cannot_be_halved(size, message):
    pipe = DDPMPipeline(UNet2DModel(**{**OFFICIAL_NETWORK, "sample_size": size}), DDPMScheduler())
    with pytest.raises(ValueError, match=message):
        _ = pipe.image_shape


def test_another_first_layer_than_the_configuration_says():
    """As in stock: the layer decides which images the network takes."""
    unet = UNet2DModel(**OFFICIAL_NETWORK)
    stock = StockUNet2DModel(**OFFICIAL_NETWORK)
    stock.load_state_dict(unet.state_dict())
    unet.conv_in = stock.conv_in = torch.nn.Conv2d(5, unet.conv_in.out_channels, 3, padding=1)
    x = torch.randn(2, 5, 8, 8)
    torch.testing.assert_close(unet(x, 3).sample, stock(x, 3).sample)
    with pytest.raises(ValueError, match=r"\[B, 5, H, W\], got \[2, 3, 8, 8\]"):
        unet(x[:, :3], 3)


@pytest.mark.parametrize(
    ("shape", "t", "message"),
    [
        ((2, 3, 7, 7), 3, r"7x7 cannot be halved"),
        ((2, 1, 8, 8), 3, r"\[B, 3, H, W\], got \[2, 1, 8, 8\]"),
        ((3, 8, 8), 3, r"\[B, 3, H, W\], got \[3, 8, 8\]"),
        ((2, 3, 8, 8), torch.tensor([1, 2, 3]), r"shape \(3,\) for a batch of 2"),
    ],
)
def test_bad_inputs(official_unet, shape, t, message):
    with pytest.raises(ValueError, match=message):
        official_unet(torch.zeros(shape), t)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"'cifar-10'.*did you mean 'cifar10'"):
        UNet2DModel.from_preset("cifar-10")
