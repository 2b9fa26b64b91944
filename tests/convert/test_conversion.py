"""Other implementations' weights: the same outputs as their networks, and clear refusals."""

import dataclasses
import hashlib
import json
import math
import pickle
import shutil

import diffusers
import numpy as np
import other_networks as other
import pytest
import torch
from conftest import SMALL_NETWORK
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPipeline, UNet2DModel, cli
from ddpm_hf.convert import conversion, convert, formats, readers
from ddpm_hf.convert.names import infer_architecture, translate
from ddpm_hf.presets import OFFICIAL_NETWORK, PRESETS
from ddpm_hf.utils.errors import UserError


@pytest.fixture
def x_and_t():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([3, 871])


def load_pipeline(*arguments, **options):
    return conversion.load_pipeline(*arguments, **options)[0]


def agrees(unet, expected, x, t, **options):
    with torch.no_grad():
        ours = unet(x, t, **options).sample
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() < 2e-4 * expected.abs().max()


def saved(tmp_path, content, name="weights.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


# ---------------------------------------------------------------------- PyTorch formats


@pytest.mark.parametrize(
    "network",
    [{}, {"mult": (1, 2, 2), "blocks": 1, "attends": (False, True, False)}, {"attends": (False, False), "out": 6}],
)
def test_pesser(tmp_path, x_and_t, network):
    state = other.make_pesser(**network)
    pipe = load_pipeline("pesser", saved(tmp_path, state), sample_size=16)
    agrees(pipe.unet, other.run_pesser(state, *x_and_t), *x_and_t)
    assert pipe.scheduler.config.variance_type == ("learned" if network.get("out") == 6 else "fixed_large")


def test_ermongroup_training_checkpoint_has_raw_and_ema_weights(tmp_path, x_and_t):
    raw, ema = other.make_pesser(), other.make_pesser()
    path = saved(tmp_path, [{f"module.{k}": v for k, v in raw.items()}, {"lr": 0.1}, 5, 100, ema])
    agrees(load_pipeline("pesser", path, sample_size=16).unet, other.run_pesser(ema, *x_and_t), *x_and_t)
    pipe = load_pipeline("pesser", path, sample_size=16, ema=False)
    agrees(pipe.unet, other.run_pesser(raw, *x_and_t), *x_and_t)
    with pytest.raises(UserError, match=r"raw weights only .*ema=False"):
        load_pipeline("pesser", saved(tmp_path, [raw, {}, 5, 100]), sample_size=16)


def test_pytorch_ddpm(tmp_path, x_and_t):
    raw, ema = other.make_pytorch_ddpm(), other.make_pytorch_ddpm()
    path = saved(tmp_path, {"net_model": raw, "ema_model": ema, "step": 7, "x_T": torch.zeros(1)}, "ckpt.pt")
    agrees(load_pipeline("pytorch_ddpm", path, sample_size=16).unet, other.run_pytorch_ddpm(ema, *x_and_t), *x_and_t)
    pipe = load_pipeline("pytorch_ddpm", path, sample_size=16, ema=False)
    agrees(pipe.unet, other.run_pytorch_ddpm(raw, *x_and_t), *x_and_t)


@pytest.mark.parametrize(
    ("network", "heads"),
    [({}, 1), ({"out": 6, "mult": (1, 2, 2), "attends": (False, True, True)}, 4), ({"scale_shift": True}, 2)],
)
def test_improved_diffusion(tmp_path, x_and_t, network, heads):
    state = other.make_improved(**network)
    path = saved(tmp_path, state, "ema_0.9999_500000.pt")
    pipe = load_pipeline("improved_diffusion", path, sample_size=16, num_heads=heads)
    agrees(pipe.unet, other.run_improved(state, *x_and_t, heads=heads), *x_and_t)
    assert pipe.scheduler.config.variance_type == ("learned_range" if network.get("out") == 6 else "fixed_large")


def test_improved_diffusion_with_classes(tmp_path, x_and_t):
    state, labels = other.make_improved(classes=5), torch.tensor([4, 1])
    unet = load_pipeline("improved_diffusion", saved(tmp_path, state), sample_size=16, num_heads=1).unet
    agrees(unet, other.run_improved(state, *x_and_t, labels=labels), *x_and_t, class_labels=labels)


def test_improved_diffusion_options_that_do_not_fit(tmp_path):
    pooled = {k: v for k, v in other.make_improved(blocks=2).items() if ".op." not in k}
    with pytest.raises(UserError, match="conv_resample"):
        load_pipeline("improved_diffusion", saved(tmp_path, pooled), sample_size=16)
    uneven = other.make_improved(attends=(True, True))
    with pytest.raises(UserError, match=r"4 heads over attention widths \[32, 64\]"):
        load_pipeline("improved_diffusion", saved(tmp_path, uneven), sample_size=16, num_heads=4)
    with pytest.raises(UserError, match="raw weights only"):
        load_pipeline("improved_diffusion", saved(tmp_path, pooled, "model500000.pt"), sample_size=16)


# What guided-diffusion has beyond improved-diffusion; with one residual block per level, input block 2 halves.
@pytest.mark.parametrize(
    ("network", "options"),
    [
        ({"updown": True, "scale_shift": True, "out": 6}, {"num_heads": 4, "use_new_attention_order": True}),
        ({"updown": True, "attends": (True, True)}, {"num_head_channels": 16, "use_new_attention_order": True}),
        ({"attends": (True, True)}, {"num_head_channels": 16, "use_new_attention_order": False}),
        ({"updown": True, "attends": (True, False)}, {"num_heads": 1}),
    ],
)
def test_guided_diffusion(tmp_path, x_and_t, network, options):
    state = other.make_improved(**network)
    heads, size = options.get("num_heads", 1), options.get("num_head_channels")
    how = {"heads": heads, "head_channels": size, "new_order": options.get("use_new_attention_order", False)}
    expected = other.run_improved(state, *x_and_t, **how, halving=(2,) if network.get("updown") else ())
    pipe = load_pipeline("guided_diffusion", saved(tmp_path, state), sample_size=16, **options)
    agrees(pipe.unet, expected, *x_and_t)
    pipe.save_pretrained(tmp_path / "out")
    agrees(diffusers.UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet"), expected, *x_and_t)


@pytest.mark.parametrize(
    ("format_", "options", "words"),
    [
        ("improved_diffusion", {}, "give num_heads .*: a file of improved_diffusion does not say"),
        ("guided_diffusion", {}, "give num_heads .* or num_head_channels"),
        ("guided_diffusion", {"num_heads": 4}, "give use_new_attention_order"),
        ("guided_diffusion", {"num_heads": 4, "num_head_channels": 16}, "give num_heads .* or num_head_channels"),
        ("improved_diffusion", {"num_heads": 3}, "3 heads or channels per head do not divide the 64 channels"),
        ("improved_diffusion", {"num_heads": 4, "num_heads_upsample": 2}, "num_heads_upsample=2 is not num_heads"),
        (
            "improved_diffusion",
            {"num_heads": 4, "use_new_attention_order": True},
            "takes no use_new_attention_order",
        ),
        ("improved_diffusion", {"num_heads": 0}, "num_heads must be at least 1"),
        ("improved_diffusion", {"num_heads": 1, "learn_sigma": True}, "no channels for a learned variance"),
        ("improved_diffusion", {"num_heads": 1, "variance_type": "learned"}, "no channels for a learned variance"),
        ("improved_diffusion", {"num_heads": 1, "noise_schedule": "quad"}, "one of linear, cosine, got 'quad'"),
        ("improved_diffusion", {"num_heads": 1, "diffusion_steps": 500}, "only a multiple of 1000 timesteps"),
        ("improved_diffusion", {"preset": "guided_diffusion_lsun_cat"}, "is no released model of improved_diffusion"),
        ("improved_diffusion", {"preset": "improved_diffusion_lsun_uncond"}, "did you mean 'improved_diffusion_lsun_"),
    ],
)
def test_what_openai_files_do_not_say_is_asked_for(tmp_path, format_, options, words):
    path = saved(tmp_path, other.make_improved())
    with pytest.raises(ValueError, match=words):
        load_pipeline(format_, path, **{"sample_size": 16, **options})


def test_a_network_of_guided_diffusion_is_not_taken_for_improved_diffusion(tmp_path):
    path = saved(tmp_path, other.make_improved(updown=True))
    with pytest.raises(UserError, match="give from_format='guided_diffusion'"):
        load_pipeline("improved_diffusion", path, sample_size=16, num_heads=4)


@pytest.mark.parametrize("format_", ["pesser", "pytorch_ddpm", "official_tf"])
def test_heads_are_refused_where_attention_has_one(tmp_path, format_):
    with pytest.raises(ValueError, match="takes no num_heads; leave it out"):
        load_pipeline(format_, tmp_path / "any", sample_size=16, num_heads=1)


# ---------------------------------------------------------------------- the diffusion process


def process_of(tmp_path, **options):
    path = saved(tmp_path, other.make_improved(out=6 if options.pop("learned", False) else 3))
    return load_pipeline("improved_diffusion", path, sample_size=16, num_heads=1, **options).scheduler


def test_rescaled_timesteps_become_the_chain_that_saw_whole_numbers(tmp_path):
    """4000 cosine timesteps, of which the network saw t/4: every fourth, betas from their definition."""
    scheduler = process_of(tmp_path, learned=True, noise_schedule="cosine", diffusion_steps=4000)

    def f(t):
        return math.cos((t / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = torch.tensor([1 - min(1 - f(t + 1) / f(t), 0.999) for t in range(4000)], dtype=torch.float64).cumprod(
        0
    )
    assert scheduler.config.num_train_timesteps == 1000
    assert scheduler.config.variance_type == "learned_range"
    assert torch.allclose(scheduler.alphas_cumprod.double(), alpha_bar[::4].float().double(), rtol=1e-6, atol=0)
    stock = diffusers.DDPMScheduler.from_config(json.loads(scheduler.to_json_string()))
    assert torch.allclose(stock.alphas_cumprod.double(), alpha_bar[::4], rtol=1e-3, atol=1e-7)  # stock's float32
    whole = process_of(tmp_path, noise_schedule="cosine", diffusion_steps=4000, rescale_timesteps=False)
    assert whole.config.num_train_timesteps == 4000
    assert torch.allclose(whole.alphas_cumprod.double(), alpha_bar.float().double(), rtol=1e-6, atol=0)


def test_their_linear_betas_are_scaled_by_1000_over_t(tmp_path):
    scheduler = process_of(tmp_path, diffusion_steps=500, rescale_timesteps=False, predict_xstart=True)
    assert torch.allclose(scheduler.betas[[0, -1]].double(), torch.tensor([2e-4, 0.04], dtype=torch.float64))
    assert scheduler.config.prediction_type == "sample"
    assert scheduler.config.variance_type == "fixed_large"
    assert process_of(tmp_path, sigma_small=True).config.variance_type == "fixed_small"


def small_release(monkeypatch, parameters):
    """The released CIFAR-10 model's preset, for a network of 32 channels."""
    name = "improved_diffusion_cifar10_uncond_50M_500K"
    monkeypatch.setitem(formats.RELEASED, name, dataclasses.replace(formats.RELEASED[name], parameters=parameters))
    return name


def test_a_released_model_needs_its_preset_only(tmp_path, monkeypatch, capsys):
    network = {"mult": (1, 2, 2, 2), "attends": (False, True, True, False), "scale_shift": True}
    state = other.make_improved(**network, out=6)
    path = saved(tmp_path, state, "cifar10_uncond_50M_500K.pt")
    preset = small_release(monkeypatch, sum(value.numel() for value in state.values()))
    arguments = ["convert", "--from", "improved_diffusion", "--checkpoint", str(path), "--output", str(tmp_path / "o")]
    assert cli.main([*arguments, "--sample_size", "32", "--num_heads", "4"]) == 2
    assert f"give --preset {preset}" in capsys.readouterr().err
    assert cli.main([*arguments, "--preset", preset, "--noise_schedule", "linear"]) == 2
    assert "says noise_schedule=cosine, and the flags say linear" in capsys.readouterr().err
    assert cli.main([*arguments, "--preset", preset]) == 0
    told = capsys.readouterr().out
    assert "timesteps: 1000, every 4th of 4000" in told
    assert "assumed" not in told
    assert "every 4th of 4000" in (tmp_path / "o" / "README.md").read_text()
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "o")
    assert pipe.unet.config.attention_head_dim == 16  # 64 channels, 4 heads
    assert pipe.scheduler.config.num_train_timesteps == 1000
    plain = saved(tmp_path, other.make_improved(**network), "plain.pt")  # without learned variance
    with pytest.raises(UserError, match=r"a network of [\d,]+ parameters, and that of preset .* has [\d,]+$"):
        load_pipeline("improved_diffusion", plain, preset=preset)


def test_pytorch_ddpm_files_say_their_timesteps_and_size(tmp_path, capsys):
    state = other.make_pytorch_ddpm(T=500)
    path = saved(tmp_path, {"net_model": state, "ema_model": state, "x_T": torch.zeros(4, 3, 16, 16)}, "ckpt.pt")
    pipe = load_pipeline("pytorch_ddpm", path)
    assert (pipe.scheduler.config.num_train_timesteps, pipe.unet.config.sample_size) == (500, 16)
    assert pipe.scheduler.config.variance_type == "fixed_large"
    assert not pipe.scheduler.config.clip_sample  # its sampler clips the finished image only
    assert load_pipeline("pytorch_ddpm", path, clip_sample=True).scheduler.config.clip_sample
    out = ["--output", str(tmp_path / "out")]
    for flags, words in (
        (["--sample_size", "64"], "say sample_size=16, and the flags or the preset 64"),
        (["--T", "1000"], "say diffusion_steps=500, and the flags or the preset 1000"),
        (["--noise_schedule", "quad"], "takes no --noise_schedule"),
    ):
        assert cli.main(["convert", "--from", "pytorch_ddpm", "--checkpoint", str(path), *out, *flags]) == 2
        assert words in capsys.readouterr().err
    arguments = ["convert", "--from", "pytorch_ddpm", "--checkpoint", str(path), *out, "--beta_1", "0.001"]
    assert cli.main([*arguments, "--var_type", "fixedsmall"]) == 0
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["beta_start"], config["beta_end"], config["variance_type"]) == (0.001, 0.02, "fixed_small")
    told = capsys.readouterr().out
    assert "--beta_end 0.02" in told
    assert "--beta_start" not in told
    state["time_embedding.timembedding.0.weight"] = state["time_embedding.timembedding.0.weight"].flip(0)
    with pytest.raises(UserError, match=r"sines and cosines of t = 0\.\.499"):
        load_pipeline("pytorch_ddpm", saved(tmp_path, state), sample_size=16)


def test_ddim_process_and_what_its_sampler_does_not_clip(tmp_path, capsys):
    state = other.make_pesser()
    path = saved(tmp_path, [state, {}, 5, 100, {**state, "logvar": torch.zeros(700)}], "ckpt.pth")
    arguments = ["convert", "--from", "pesser", "--checkpoint", str(path), "--sample_size", "16"]
    assert cli.main([*arguments, "--beta_schedule", "sigmoid", "--output", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "its DDIM sampler does not clip (--clip_sample false)" in told
    assert "T = 700" in told
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "a").scheduler
    sigmoid = torch.sigmoid(torch.linspace(-6, 6, 700, dtype=torch.float64)) * (0.02 - 1e-4) + 1e-4
    assert torch.allclose(scheduler.betas.double(), sigmoid, rtol=1e-6)
    with pytest.raises(ValueError, match="jsd has no beta_end"):
        load_pipeline("pesser", path, sample_size=16, noise_schedule="jsd", beta_end=0.01)
    preset = next(name for name, p in PRESETS.items() if p.scheduler["prediction_type"] == "posterior_mean")
    with pytest.raises(ValueError, match="prediction_type of pesser must be one of epsilon, got 'posterior_mean'"):
        load_pipeline("pesser", path, preset=preset)
    assert cli.main([*arguments, "--clip_sample", "false", "--output", str(tmp_path / "b")]) == 0
    assert "x_0 not clipped" in capsys.readouterr().out


# ---------------------------------------------------------------------- raw and EMA weights


def test_pesser_files_by_their_folder_and_by_their_contents(tmp_path, capsys, monkeypatch):
    state = other.make_pesser()
    for folder in ("ema_diffusion_cifar10_model", "diffusion_cifar10_model"):
        (tmp_path / folder).mkdir()
        torch.save(state, tmp_path / folder / "model-790000.ckpt")
    ema, raw = (tmp_path / f"{prefix}diffusion_cifar10_model" / "model-790000.ckpt" for prefix in ("ema_", ""))
    load_pipeline("pesser", ema, sample_size=16)
    load_pipeline("pesser", raw, sample_size=16, ema=False)
    with pytest.raises(UserError, match=r"raw weights only .*diffusion_cifar10_model.* or ema=False"):
        load_pipeline("pesser", raw, sample_size=16)
    with pytest.raises(UserError, match=r"holds EMA weights only .*leave out ema=False"):
        load_pipeline("pesser", ema, sample_size=16, ema=False)
    elsewhere = saved(tmp_path, state, "model.ckpt")
    arguments = ["convert", "--from", "pesser", "--checkpoint", str(elsewhere), "--sample_size", "16"]
    assert cli.main([*arguments, "--output", str(tmp_path / "a")]) == 0
    assert "taken for EMA weights, as nothing in the file says which they are (--no_ema: raw weights)" in (
        capsys.readouterr().out
    )
    assert cli.main([*arguments, "--no_ema", "--output", str(tmp_path / "b")]) == 0
    assert (
        "taken for raw weights, as nothing in the file says which they are"
        in (tmp_path / "b" / "README.md").read_text()
    )
    known = hashlib.md5(elsewhere.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(readers._PESSER_RAW, known, "cifar10")
    with pytest.raises(UserError, match=r"raw weights only .it is pesser's released cifar10"):
        load_pipeline("pesser", elsewhere, sample_size=16)


def test_no_ema_is_refused_for_ema_weights(tmp_path):
    path = saved(tmp_path, other.make_improved(), "ema_0.9999_500000.pt")
    with pytest.raises(UserError, match="EMA weights only"):
        load_pipeline("improved_diffusion", path, sample_size=16, num_heads=1, ema=False)
    path = saved(tmp_path, {"ema_model": other.make_pytorch_ddpm()}, "ckpt.pt")
    with pytest.raises(UserError, match=r"holds EMA weights only .*leave out ema=False"):
        load_pipeline("pytorch_ddpm", path, sample_size=16, ema=False)


# ---------------------------------------------------------------------- what a file holds beside the network


MAKERS = {
    "pesser": other.make_pesser,
    "pytorch_ddpm": other.make_pytorch_ddpm,
    "improved_diffusion": other.make_improved,
}


@pytest.mark.parametrize("format_", MAKERS)
def test_tensors_without_a_place_are_named(tmp_path, format_):
    heads = {"num_heads": 1} if format_ == "improved_diffusion" else {}
    extra = {f"extra.{i}.weight": torch.zeros(3) for i in range(5)}
    with pytest.raises(UserError, match=r"extra\.0\.weight, extra\.1.weight, extra\.2.weight and 2 more"):
        load_pipeline(format_, saved(tmp_path, MAKERS[format_]() | extra), sample_size=16, **heads)
    with pytest.raises(UserError, match="no place for loose"):
        load_pipeline(format_, saved(tmp_path, MAKERS[format_]() | {"loose": torch.zeros(3)}), sample_size=16, **heads)


@pytest.mark.parametrize("format_", MAKERS)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(tmp_path, format_, prefix):
    heads = {"num_heads": 1} if format_ == "improved_diffusion" else {}
    state = MAKERS[format_]()
    plain = load_pipeline(format_, saved(tmp_path, state), sample_size=16, **heads).unet.state_dict()
    wrapped = saved(tmp_path, {f"{prefix}{name}": value for name, value in state.items()})
    unet = load_pipeline(format_, wrapped, sample_size=16, **heads).unet
    assert all(torch.equal(value, plain[name]) for name, value in unet.state_dict().items())
    first = next(iter(state))
    with pytest.raises(UserError, match=f"holds {first} twice"):
        load_pipeline(format_, saved(tmp_path, state | {f"{prefix}{first}": state[first]}), sample_size=16, **heads)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state": {0: {}}, "param_groups": []}, "but entries 'state', 'param_groups'"),
        (
            {"state_dict": {"a": torch.zeros(1)}, "epoch": 3},
            "but entries 'state_dict', 'epoch'; if the weights are one of its entries, save them",
        ),
        ([torch.zeros(1)], "but a list"),
        ({}, "holds no state dict"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        load_pipeline("improved_diffusion", saved(tmp_path, content, "opt010000.pt"), sample_size=16, num_heads=1)


def test_weights_in_half_precision_are_said_and_broken_ones_refused(tmp_path, capsys):
    state = other.make_pesser()
    path = saved(tmp_path, {name: value.half() for name, value in state.items()})
    arguments = ["--checkpoint", str(path), "--sample_size", "16", "--output", str(tmp_path / "out")]
    assert cli.main(["convert", "--from", "pesser", *arguments]) == 0
    assert "precision: float16 in the file, float32 here" in capsys.readouterr().out
    whole_numbers = saved(tmp_path, {**state, "conv_in.bias": torch.zeros(32).long()})
    with pytest.raises(
        UserError, match=r"conv_in\.bias \(torch\.int64\) holds NaN, infinity or no floating-point numbers"
    ):
        load_pipeline("pesser", whole_numbers, sample_size=16)


@pytest.mark.parametrize("network", [{"channels": 6}, {"channels": 6, "out": 6}, {"channels": 4}])
def test_super_resolution_networks_are_refused(tmp_path, network):
    path = saved(tmp_path, other.make_improved(**network))
    with pytest.raises(UserError, match=f"from {network['channels']} channels to {network.get('out', 3)}"):
        load_pipeline("improved_diffusion", path, sample_size=16, num_heads=1)


# ---------------------------------------------------------------------- stock repositories


def stock_pipeline():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**SMALL_NETWORK).eval()
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(variance_type="fixed_large"))


def legacy(name):
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f".{new}.", f".{old}.")
    return name


@pytest.mark.parametrize("keys", ["current", "legacy"])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", ["flat", "folders"])
def test_old_stock_repositories(tmp_path, keys, ending, layout):
    stock = stock_pipeline()
    old = tmp_path / "old"
    stock.save_pretrained(old)
    (old / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    state = {legacy(k) if keys == "legacy" else k: v for k, v in stock.unet.state_dict().items()}
    assert (keys == "legacy") == any(".query." in k for k in state)
    if ending == "bin":
        torch.save(state, old / "unet" / "diffusion_pytorch_model.bin")
    else:
        save_file(state, old / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    if layout == "flat":
        for file in (*(old / "unet").iterdir(), *(old / "scheduler").iterdir()):
            shutil.move(file, old)
        (old / "unet").rmdir()
        (old / "scheduler").rmdir()
    convert("diffusers", old, tmp_path / "new")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "new")
    assert again.scheduler.config.variance_type == "fixed_large"
    for name, value in stock.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], value), name
    if ending == "safetensors":  # and our pipeline opens it as it is, converted or not
        direct = DDPMPipeline.from_pretrained(old)
        assert type(direct.unet) is UNet2DModel
        assert all(torch.equal(direct.unet.state_dict()[k], v) for k, v in stock.unet.state_dict().items())


def test_stock_repositories_that_do_not_fit(tmp_path):
    stock = stock_pipeline()
    stock.save_pretrained(tmp_path / "a")
    config = tmp_path / "a" / "unet" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "block_out_channels": [16, 16]}))
    with pytest.raises(UserError, match=r"has shape \(\d+.*asks for \(\d+"):
        load_pipeline("diffusers", tmp_path / "a")
    config.write_text(json.dumps(content))
    index = tmp_path / "a" / "model_index.json"
    index.write_text(index.read_text().replace("UNet2DModel", "AutoencoderKL"))
    with pytest.raises(UserError, match="AutoencoderKL"):
        load_pipeline("diffusers", tmp_path / "a")
    with pytest.raises(UserError, match="no folder"):
        load_pipeline("diffusers", tmp_path / "b")


def test_stock_repositories_of_other_processes(tmp_path, capsys):
    stock = stock_pipeline()
    stock.save_pretrained(tmp_path / "a")
    scheduler, index = tmp_path / "a" / "scheduler" / "scheduler_config.json", tmp_path / "a" / "model_index.json"
    diffusers.DDIMScheduler(beta_end=0.01).save_pretrained(tmp_path / "a" / "scheduler")
    arguments = ["convert", "--from", "diffusers", "--checkpoint", str(tmp_path / "a"), "--output"]
    assert cli.main([*arguments, str(tmp_path / "b")]) == 0
    assert "scheduler: its DDIMScheduler as a DDPMScheduler over the same betas" in capsys.readouterr().out
    assert DDPMPipeline.from_pretrained(tmp_path / "b").scheduler.config.beta_end == 0.01
    diffusers.ScoreSdeVeScheduler().save_pretrained(tmp_path / "a" / "scheduler")
    with pytest.raises(UserError, match="the configuration of ScoreSdeVeScheduler has no betas"):
        load_pipeline("diffusers", tmp_path / "a")
    scheduler.write_text(json.dumps({"_class_name": "DDPMScheduler", "variance_type": "learned"}))
    with pytest.raises(UserError, match="variance_type='learned', which no DDPM samples with"):
        load_pipeline("diffusers", tmp_path / "a")
    index.write_text(json.dumps({**json.loads(index.read_text()), "vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(UserError, match=r"vqvae: VQModel.*, not a DDPM, which is a UNet2DModel and a scheduler"):
        load_pipeline("diffusers", tmp_path / "a")


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_stock_repositories_whose_configuration_is_none(name, tmp_path):
    stock_pipeline().save_pretrained(tmp_path)
    (tmp_path / name).write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object"):
        load_pipeline("diffusers", tmp_path)


# ---------------------------------------------------------------------- the official checkpoint

# TensorFlow reads and writes the official format; the fixture holds the official checkpoint's variables.


@pytest.fixture(scope="module")
def official_checkpoint(tmp_path_factory):
    from official_writer import write_checkpoint
    from oracles import FIXTURES

    variables = {name: value.numpy() for name, value in load_file(FIXTURES / "official_weights.safetensors").items()}
    return write_checkpoint(tmp_path_factory.mktemp("official") / "model.ckpt-790000", variables)


def official_outputs():
    from oracles import official

    return official("x"), official("t").long(), official("unet_out")


def test_official_checkpoint_in_one_command(tmp_path, official_checkpoint):
    out = tmp_path / "converted"
    arguments = ["--from", "official_tf", "--checkpoint", str(official_checkpoint), "--sample_size", "8"]
    assert cli.main(["convert", *arguments, "--output", str(out)]) == 0
    x, t, expected = official_outputs()
    for pipeline in (DDPMPipeline, diffusers.DDPMPipeline):
        unet = pipeline.from_pretrained(out).unet.eval()
        with torch.no_grad():
            assert (unet(x, t).sample - expected).abs().max() < 1e-5


def test_raw_weights_must_be_asked_for(official_checkpoint):
    x, t, expected = official_outputs()
    raw = load_pipeline("official_tf", official_checkpoint, sample_size=8, ema=False).unet
    assert {v.unique().item() for v in raw.state_dict().values()} == {torch.tensor(0.01).item()}
    with torch.no_grad():
        assert (raw(x, t).sample - expected).abs().max() > 0.1


def test_a_checkpoint_without_ema_weights_is_refused_by_default(tmp_path):
    from official_writer import write_checkpoint

    write_checkpoint(tmp_path / "x", {"model/conv_in/b": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"raw weights only.*ema=False for these"):
        load_pipeline("official_tf", tmp_path / "x", sample_size=8)
    write_checkpoint(tmp_path / "x", {"other/conv_in/b": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"nothing found for .*; is the format right"):
        load_pipeline("official_tf", tmp_path / "x", sample_size=8)


def test_official_to_ours_to_official_is_bitwise(tmp_path, official_checkpoint):
    from official_writer import EMA_SUFFIX, official_arrays
    from oracles import FIXTURES

    convert("official_tf", official_checkpoint, tmp_path / "ours", sample_size=8)
    back = official_arrays(load_file(tmp_path / "ours" / "unet" / "diffusion_pytorch_model.safetensors"))
    there = load_file(FIXTURES / "official_weights.safetensors")
    assert {name.removesuffix(EMA_SUFFIX) for name in there if name.startswith("model/")} == set(back)
    for name in back:
        assert np.array_equal(there[f"{name}{EMA_SUFFIX}"].numpy(), back[name]), name


def test_raw_and_ema_weights_of_one_checkpoint_are_told_apart(tmp_path, official_checkpoint):
    from official_writer import EMA_SUFFIX, official_arrays, write_checkpoint

    state = load_pipeline("official_tf", official_checkpoint, sample_size=8).unet.state_dict()
    ema = {f"{name}{EMA_SUFFIX}": value for name, value in official_arrays(state).items()}
    raw = official_arrays({name: value + 1 for name, value in state.items()})
    optimizer = {"model/conv_in/W/Adam": raw["model/conv_in/W"], "global_step": np.int64(12)}
    write_checkpoint(tmp_path / "model.ckpt-12", {**raw, **ema, **optimizer})
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-12"\n')
    for path in (tmp_path / "model.ckpt-12", tmp_path / "model.ckpt-12.index", tmp_path):
        unet = load_pipeline("official_tf", path, sample_size=8).unet
        assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    unet = load_pipeline("official_tf", tmp_path, sample_size=8, ema=False).unet
    assert all(torch.equal(value, state[name] + 1) for name, value in unet.state_dict().items())


def test_where_there_is_no_tensorflow_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "no.ckpt", tmp_path / "empty"):
        with pytest.raises(UserError, match="there is no TensorFlow checkpoint at"):
            load_pipeline("official_tf", path, sample_size=8)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "digits"])
def test_every_official_architecture_is_inferred_from_names_and_shapes(preset):
    from official_writer import official_name

    with torch.device("meta"):
        unet = UNet2DModel.from_preset(preset)
    state, levels = unet.state_dict(), len(unet.config.block_out_channels)
    official = {readers.official_name(official_name(key, levels)): key for key in state}
    assert translate(official, "official") == {key: name for name, key in official.items()}
    inferred = infer_architecture(state, OFFICIAL_NETWORK)
    for name, value in PRESETS[preset].unet.items():
        if name not in ("sample_size", "dropout"):
            assert inferred[name] == value, name


# ---------------------------------------------------------------------- what is refused


class Malicious:
    """Pickled, it would write a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("format_", ["pesser", "pytorch_ddpm", "improved_diffusion", "diffusers"])
@pytest.mark.parametrize("ending", [".bin", ".ckpt", ".pt"])
@pytest.mark.parametrize("writer", [pickle.dumps, None])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, format_, ending, writer):
    trap = tmp_path / "executed"
    path = tmp_path / f"weights{ending}"
    if format_ == "diffusers":
        stock_pipeline().save_pretrained(tmp_path / "repo")
        (tmp_path / "repo" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        path = tmp_path / "repo" / "unet" / "diffusion_pytorch_model.bin"
    content = {"conv_in.weight": Malicious(str(trap))}
    if writer is None:
        torch.save(content, path)
    else:
        path.write_bytes(writer(content))
    source = tmp_path / "repo" if format_ == "diffusers" else path
    with pytest.raises(UserError, match=r"refused|not a PyTorch checkpoint"):
        convert(format_, source, tmp_path / "out", **({} if format_ == "diffusers" else {"sample_size": 16}))
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [truncated, lambda p: p.write_bytes(b""), lambda p: p.write_text("hello")])
def test_damaged_files(tmp_path, damage):
    path = saved(tmp_path, other.make_pesser())
    damage(path)
    with pytest.raises(UserError, match=r"weights\.pt.*(damaged|not a PyTorch)"):
        convert("pesser", path, tmp_path / "out", sample_size=16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.pt"]


@pytest.mark.parametrize("damage", [truncated, lambda p: p.write_bytes(b""), lambda p: p.unlink()])
@pytest.mark.parametrize("ending", [".index", ".data-00000-of-00001"])
def test_damaged_tensorflow_checkpoints(tmp_path, official_checkpoint, damage, ending):
    for file in official_checkpoint.parent.glob("model.ckpt*"):
        shutil.copy(file, tmp_path)
    damage(tmp_path / f"model.ckpt-790000{ending}")
    with pytest.raises(UserError, match=r"model\.ckpt-790000"):
        convert("official_tf", tmp_path / "model.ckpt-790000", tmp_path / "out", sample_size=8)
    assert not (tmp_path / "out").exists()


def test_mismatched_tensors_are_named_with_both_shapes(tmp_path):
    state = other.make_pesser()
    state["mid.block_1.conv2.weight"] = torch.zeros(64, 32, 3, 3)
    with pytest.raises(UserError, match=r"mid\.block_1\.conv2\.weight.*\(64, 32, 3, 3\).*\(64, 64, 3, 3\)"):
        convert("pesser", saved(tmp_path, state), tmp_path / "out", sample_size=16)
    del state["mid.block_1.conv2.weight"]
    with pytest.raises(UserError, match=r"nothing found for mid_block\.resnets\.0\.conv2\.weight$"):
        load_pipeline("pesser", saved(tmp_path, state), sample_size=16)
    del state["mid.block_1.conv1.bias"]
    with pytest.raises(UserError, match=r"nothing found for .*resnets\.0\.conv1\.bias, .*resnets\.0\.conv2\.weight$"):
        load_pipeline("pesser", saved(tmp_path, state), sample_size=16)
    del state["mid.block_2.conv1.bias"], state["mid.block_2.conv2.bias"]
    with pytest.raises(UserError, match=r"nothing found for .*conv1\.bias, .*, .*conv1\.bias and 1 more$"):
        load_pipeline("pesser", saved(tmp_path, state), sample_size=16)
    state = other.make_pesser() | {"encoder.layer.weight": torch.zeros(3)}
    with pytest.raises(UserError, match=r"encoder\.layer\.weight"):
        load_pipeline("pesser", saved(tmp_path, state), sample_size=16)


def test_wrong_format_and_missing_information(tmp_path, capsys):
    path = saved(tmp_path, other.make_pesser())
    with pytest.raises(UserError, match="is the format right"):
        load_pipeline("pytorch_ddpm", path, sample_size=16)
    for arguments, words in [
        (["--from", "pesser", "--checkpoint", str(path)], "--sample_size"),
        (["--from", "pessr", "--checkpoint", str(path), "--sample_size", "16"], "'pessr'"),
        (["--from", "pesser", "--checkpoint", str(tmp_path / "no.pt"), "--sample_size", "16"], "no.pt"),
        (["--from", "pesser", "--checkpoint", str(path), "--sample_size", "15"], "15x15"),
        (["--from", "pesser", "--checkpoint", str(path), "--preset", "cifar10"], "35,746,307"),
        (["--from", "official_tf", "--checkpoint", str(path), "--sample_size", "16"], "no TensorFlow checkpoint"),
        (["--checkpoint", str(path)], "--from"),
    ]:
        assert cli.main(["convert", *arguments, "--output", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert words in err, err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--sample_size", "32"], "--sample_size"),
        (["--preset", "cifar10"], "--preset"),
        (["--no_ema"], "--no_ema"),
        (["--num_heads", "4"], "--num_heads"),
        (["--variance_type", "fixed_small"], "--variance_type"),
        (["--variance_type", "fixed_small", "--no_ema"], "--no_ema, --variance_type"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(tmp_path, capsys, flags, named):
    arguments = ["--from", "diffusers", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "out"), *flags]
    assert cli.main(["convert", *arguments]) == 2
    err = capsys.readouterr().err
    assert f"--from diffusers takes no {named}; " in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_in_use_is_left_alone(tmp_path):
    path = saved(tmp_path, other.make_pesser())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds something else"):
        convert("pesser", path, tmp_path / "out", sample_size=16)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_posterior_mean_is_refused_by_stock(tmp_path, small_unet):
    from ddpm_hf import DDPMScheduler

    DDPMPipeline(small_unet, DDPMScheduler(prediction_type="posterior_mean")).save_pretrained(tmp_path)
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="posterior_mean"):
        stock(num_inference_steps=2)
    assert DDPMPipeline.from_pretrained(tmp_path).scheduler.config.prediction_type == "posterior_mean"


def test_a_learned_log_variance_is_refused_by_stock_and_comes_back_here(tmp_path):
    from conftest import make_small_unet

    from ddpm_hf import DDPMScheduler

    pipe = DDPMPipeline(make_small_unet(out_channels=2), DDPMScheduler(variance_type="learned"))
    pipe.save_pretrained(tmp_path)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    with pytest.raises(ValueError, match="epsilon_and_log_variance"):
        diffusers.DDPMPipeline.from_pretrained(tmp_path)(num_inference_steps=2)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert again.scheduler.config.prediction_type == "epsilon"
    assert again.scheduler.config.variance_type == "learned"
    options = {"seeds": [0], "num_inference_steps": 5, "output_type": "pt"}
    assert (again(**options).images - pipe(**options).images).abs().max() < 1 / 255
    diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config).set_timesteps(5)  # drops the variance


def test_fixed_large_log_is_saved_so_that_stock_samples_the_same(tmp_path, small_unet):
    from ddpm_hf import DDPMScheduler

    pipe = DDPMPipeline(small_unet, DDPMScheduler(variance_type="fixed_large_log"))
    pipe.save_pretrained(tmp_path)
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    options = {"num_inference_steps": 20, "output_type": "np"}
    ours = pipe(generator=torch.Generator().manual_seed(0), **options).images
    assert abs(ours - stock(generator=torch.Generator().manual_seed(0), **options).images).max() < 1 / 255


def test_stock_stays_stock_where_this_package_is_imported(tmp_path, small_pipeline):
    small_pipeline.save_pretrained(tmp_path)
    for loader in (diffusers.DiffusionPipeline, diffusers.DDPMPipeline):
        pipe = loader.from_pretrained(tmp_path)
        assert type(pipe) is diffusers.DDPMPipeline
        assert type(pipe.unet) is diffusers.UNet2DModel
        assert type(pipe.scheduler) is diffusers.DDPMScheduler


def test_no_local_path_is_saved(tmp_path, small_pipeline):
    small_pipeline.save_pretrained(tmp_path / "a")
    DDPMPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for file in (tmp_path / "b").rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
        assert "_name_or_path" not in json.loads(file.read_text())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_converted(tmp_path, value):
    state = other.make_pesser()
    state["conv_in.bias"][0] = value
    with pytest.raises(UserError, match=r"conv_in\.bias .* holds NaN, infinity"):
        convert("pesser", saved(tmp_path, state), tmp_path / "out", sample_size=16)
    assert not (tmp_path / "out").exists()
