"""A network computed in other ways gives what stock's network gives."""

import json

import pytest
import torch
from diffusers import DDPMScheduler as StockScheduler
from diffusers import UNet2DModel as StockUNet2DModel

import ddpm_hf.pipelines.inference as inference
from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel
from ddpm_hf.pipelines.inference import Execution, InferenceNetwork, optimize_for_inference
from ddpm_hf.sampling.generation import with_sampler, write_samples

WAYS = [
    Execution(),
    Execution(channels_last=True),
    Execution(channels_last=True, winograd=True),
    Execution("bf16"),
    Execution("bf16", channels_last=True),
]


def network(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        **changes,
    ).eval()
    with torch.no_grad():
        for weight in unet.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.5 / weight[0].numel() ** 0.5)
    return unet


def stock_of(unet: UNet2DModel) -> StockUNet2DModel:
    stock = StockUNet2DModel(**{k: v for k, v in unet.config.items() if not k.startswith("_")})
    stock.load_state_dict(unet.state_dict())
    return stock.eval()


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("timestep", [7, torch.tensor(7), torch.tensor([7]), torch.tensor([3, 900, 7])], ids=str)
@torch.no_grad()
def test_every_way_is_stocks_network(way, timestep):
    unet = network()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    x = torch.randn(3, 3, 16, 16)
    expected = stock_of(unet)(x, timestep).sample
    made = InferenceNetwork(unet, way)(x, timestep).sample.float()
    error = ((made - expected).norm() / expected.norm()).item()
    assert error < (1e-5 if way.precision == "fp32" else 3e-2)
    assert error > 0 or way == Execution()
    assert all(torch.equal(before[name], weight) for name, weight in unet.state_dict().items())
    assert torch.allclose(unet(x, timestep).sample, expected, atol=1e-5)  # and unet works as before


@pytest.mark.parametrize("way", WAYS[:3], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_class_embeds": 4},
        {"resnet_time_scale_shift": "scale_shift"},
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"act_fn": "relu"},
        {"mid_block_scale_factor": 1.5},
        {"attention_head_dim": None},
        {"time_embedding_type": "fourier", "freq_shift": 16},
    ],
    ids=str,
)
@torch.no_grad()
def test_other_kinds_of_networks_too(way, changes):
    unet = network(**changes)
    x = torch.randn(2, 3, 16, 16)
    labels = torch.tensor([1, 3]) if "num_class_embeds" in changes else None
    for timestep in (torch.tensor(5), torch.tensor([5, 800])):
        expected = stock_of(unet)(x, timestep, labels).sample
        made = InferenceNetwork(unet, way)(x, timestep, labels).sample
        assert (made - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_compiled(precision):
    unet = network()
    x = torch.randn(4, 3, 16, 16)
    compiled = InferenceNetwork(unet, Execution(precision, channels_last=True, compiled=True))
    expected = stock_of(unet)(x, 10).sample
    for n in (4, 2, 1):  # a smaller batch goes through the same code
        made = compiled(x[:n], 10).sample.float()
        assert made.shape == x[:n].shape
        assert (made - expected[:n]).norm() < (1e-5 if precision == "fp32" else 3e-2) * expected[:n].norm()


@pytest.mark.parametrize("way", WAYS[1:3], ids=str)
def test_images_are_stocks_to_one_level(way):
    unet = network()
    pipe = DDPMPipeline(unet, DDPMScheduler())
    optimize_for_inference(pipe, execution=way)
    pipe.set_progress_bar_config(disable=True)
    ours = pipe(batch_size=4, generator=torch.Generator().manual_seed(0), num_inference_steps=40, output_type="pt")
    stock, scheduler, generator = stock_of(unet), StockScheduler(), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(40)
    x = torch.randn(4, 3, 16, 16, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(stock(x, t).sample, t, x, generator=generator).prev_sample
    levels = ((x / 2 + 0.5).clamp(0, 1) * 255).round() - (ours.images * 255).round()
    assert levels.abs().max() <= 1


def seconds_that_favour(way: Execution):
    return lambda candidates, *_: {c: 0.5 if c == way else 1.0 for c in candidates}


def test_the_fastest_way_is_taken_and_kept_for_the_machine_and_the_network(monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path))
    pipe = DDPMPipeline(network(), DDPMScheduler())
    winner = Execution(channels_last=True, winograd=True)
    monkeypatch.setattr(inference, "_seconds", seconds_that_favour(winner))
    assert optimize_for_inference(pipe) == winner
    assert pipe.network.execution == winner
    monkeypatch.setattr(inference, "_seconds", seconds_that_favour(Execution("bf16", channels_last=True)))
    assert optimize_for_inference(DDPMPipeline(network(), DDPMScheduler())) == winner  # not timed again
    assert optimize_for_inference(DDPMPipeline(network(act_fn="relu"), DDPMScheduler())) != winner
    assert optimize_for_inference(pipe, precision="bf16") == Execution("bf16", channels_last=True)
    monkeypatch.setattr(inference, "_seconds", lambda candidates, *_: dict.fromkeys(candidates, 1.0))
    (tmp_path / "executions.json").write_text("{")  # a damaged file is no reason to stop
    assert optimize_for_inference(pipe) == Execution()  # nothing gained: stock's layout
    assert json.loads((tmp_path / "executions.json").read_text())


def test_a_real_choice(monkeypatch, tmp_path):
    """Whatever wins here, it is one of the ways, and the images are the same."""
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path))
    pipe = DDPMPipeline(network(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(seeds=[1, 2], num_inference_steps=10, output_type="pt").images
    assert optimize_for_inference(pipe, batch_size=2) in WAYS[:3]
    assert (plain - pipe(seeds=[1, 2], num_inference_steps=10, output_type="pt").images).abs().max() <= 1 / 255
    pipe.network = pipe.unet
    assert torch.equal(plain, pipe(seeds=[1, 2], num_inference_steps=10, output_type="pt").images)


def test_another_precision_is_another_image(tmp_path):
    """The network's precision decides an image, so files made in one are not added to in another."""
    pipe = DDPMPipeline(network(), DDPMScheduler())
    write_samples(pipe, [0], tmp_path, num_inference_steps=2)
    optimize_for_inference(pipe, execution=Execution("bf16"))
    assert with_sampler(pipe, "ddim").network is pipe.network
    with pytest.raises(ValueError, match="made with other dtype"):
        write_samples(pipe, [0, 1], tmp_path, num_inference_steps=2)


def test_weights_that_moved_are_not_answered_from_before():
    pipe = DDPMPipeline(network(), DDPMScheduler())
    optimize_for_inference(pipe, execution=WAYS[1])
    pipe.unet = network(act_fn="relu")
    assert pipe.network is pipe.unet


def test_weights_that_were_converted_are_not_computed_as_before():
    pipe = DDPMPipeline(network(), DDPMScheduler(num_train_timesteps=10))
    optimize_for_inference(pipe, execution=Execution(channels_last=True, winograd=True))
    pipe.to(torch.bfloat16)
    assert pipe.network is pipe.unet
    assert pipe(seeds=[0], num_inference_steps=2, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"precision": "fp8"}, "fp32, bf16 or fp16, got 'fp8'"),
        ({"precision": "bf16", "channels_last": True, "winograd": True}, "winograd goes with"),
        ({"winograd": True}, "winograd goes with"),
    ],
)
def test_ways_that_are_none(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Execution(**settings)


def test_a_batch_of_none_cannot_be_timed():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        optimize_for_inference(DDPMPipeline(network(), DDPMScheduler()), batch_size=0)
