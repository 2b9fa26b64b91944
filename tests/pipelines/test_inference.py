"""A network computed in other ways gives what stock's network gives."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import DDPMScheduler as StockScheduler
from diffusers import UNet2DModel as StockUNet2DModel
from diffusers.utils import logging as diffusers_logging

from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel
from ddpm_hf.models.inference import InferenceNetwork, InferenceOptions
from ddpm_hf.pipelines.inference import optimize_for_inference
from ddpm_hf.sampling.generation import with_sampler, write_samples

OPTIONS = [
    InferenceOptions(),
    InferenceOptions(channels_last=True),
    InferenceOptions(channels_last=True, captured=True),
    InferenceOptions("bf16"),
    InferenceOptions("bf16", channels_last=True),
]


def network(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    }
    unet = UNet2DModel(**{**settings, **changes}).eval()
    with torch.no_grad():
        for weight in unet.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.5 / weight[0].numel() ** 0.5)
    return unet


def stock_of(unet: UNet2DModel) -> StockUNet2DModel:
    stock = StockUNet2DModel(**{k: v for k, v in unet.config.items() if not k.startswith("_")})
    stock.load_state_dict(unet.state_dict())
    return stock.eval()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("timestep", [7, torch.tensor(7), torch.tensor([7]), torch.tensor([3, 900, 7])], ids=str)
@torch.no_grad()
def test_every_option_is_stocks_network(options, timestep):
    unet = network()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    x = torch.randn(3, 3, 16, 16)
    expected = stock_of(unet)(x, timestep).sample
    made = InferenceNetwork(unet, options)(x, timestep).sample.float()
    error = ((made - expected).norm() / expected.norm()).item()
    assert error < (1e-5 if options.precision == "fp32" else 3e-2)
    assert error > 0 or options == InferenceOptions()
    assert all(torch.equal(before[name], weight) for name, weight in unet.state_dict().items())
    assert torch.allclose(unet(x, timestep).sample, expected, atol=1e-5)  # and unet works as before


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
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
def test_other_kinds_of_networks_too(options, changes):
    unet = network(**changes)
    x = torch.randn(2, 3, 16, 16)
    labels = torch.tensor([1, 3]) if "num_class_embeds" in changes else None
    for timestep in (torch.tensor(5), torch.tensor([5, 800])):
        expected = stock_of(unet)(x, timestep, labels).sample
        made = InferenceNetwork(unet, options)(x, timestep, labels).sample
        assert (made - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_compiled(precision):
    """A network of few kernels in scalar code: each kernel takes a C++ compiler a second, vectorized code two."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("AttnUpBlock2D",), "mid_block_type": None}
    unet = network(block_out_channels=(32,), layers_per_block=0, **blocks)  # one residual block, one attention block
    x = torch.randn(4, 3, 16, 16)
    compiled = InferenceNetwork(unet, InferenceOptions(precision, channels_last=True, compiled=True))
    expected = stock_of(unet)(x, 10).sample
    with torch._inductor.config.patch({"cpp.simdlen": 0}):
        for n in (4, 2, 1):  # a smaller batch goes through the same code
            made = compiled(x[:n], 10).sample.float()
            assert made.shape == x[:n].shape
            assert (made - expected[:n]).norm() < (1e-5 if precision == "fp32" else 3e-2) * expected[:n].norm()


@pytest.mark.parametrize("options", OPTIONS[1:3], ids=str)
def test_images_are_stocks_to_one_level(options):
    unet = network()
    pipe = DDPMPipeline(unet, DDPMScheduler())
    optimize_for_inference(pipe, options=options)
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


def test_the_choice_is_a_function_of_the_device():
    cpu, card = torch.device("cpu"), torch.device("cuda")
    choose = InferenceOptions.for_device
    assert choose(cpu, "fp32") == InferenceOptions()
    assert choose(cpu, "bf16") == InferenceOptions("bf16")
    assert choose(card, "fp16") == InferenceOptions("fp16", channels_last=True, captured=True)
    pipe = quiet(DDPMPipeline(network(), DDPMScheduler()))
    plain = pipe(seeds=[1, 2], num_inference_steps=10, output_type="pt").images
    assert optimize_for_inference(pipe) == InferenceOptions()
    assert (plain - pipe(seeds=[1, 2], num_inference_steps=10, output_type="pt").images).abs().max() <= 1 / 255
    pipe.network = pipe.unet
    assert torch.equal(plain, pipe(seeds=[1, 2], num_inference_steps=10, output_type="pt").images)


def test_no_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setattr("ddpm_hf.models.inference.compiler_problem", lambda device: "there is no C++ compiler")
    with pytest.raises(ValueError, match=r"cannot be compiled here: there is no C\+\+ compiler; leave"):
        optimize_for_inference(DDPMPipeline(network(), DDPMScheduler()), compile=True)


# ------------------------------------------------------------------ captured, rehearsed on CPUs

CAPTURED = InferenceOptions(captured=True)
TENTH = 0.1 / 255  # of a pixel value: other roundings of float32


def quiet(pipe: DDPMPipeline) -> DDPMPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both_ways(pipe: DDPMPipeline, **call) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the plain network, and of the captured one; generators are made anew for each."""
    pipe.network = pipe.unet
    plain = pipe(output_type="pt", **{name: value() if callable(value) else value for name, value in call.items()})
    optimize_for_inference(pipe, options=CAPTURED)
    made = pipe(output_type="pt", **{name: value() if callable(value) else value for name, value in call.items()})
    return plain.images, made.images


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"variance_type": "fixed_large", "clip_sample": False},
        {"prediction_type": "v_prediction", "thresholding": True},
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        {"timestep_spacing": "trailing"},
    ],
    ids=str,
)
@pytest.mark.parametrize("noise", [{"seeds": [3, 2**63, -1]}, {"generator": lambda: torch.Generator().manual_seed(5)}])
def test_a_captured_chain_makes_the_same_images(settings, noise):
    pipe = quiet(DDPMPipeline(network(), DDPMScheduler(**settings)))
    images = {} if "seeds" in noise else {"batch_size": 3}
    for steps in (7, 10):  # another chain is another graph
        plain, made = both_ways(pipe, num_inference_steps=steps, **noise, **images)
        assert (plain - made).abs().max() < TENTH
        assert plain.std() > 0.05  # images that could differ


def test_a_captured_chain_follows_what_is_changed_afterwards():
    """Timesteps, tables, prediction type, labels and seeds: each later call counts, not what was captured."""
    torch.manual_seed(0)
    unet = network(num_class_embeds=4, _null_class=3)
    pipe = quiet(DDPMPipeline(unet, DDPMScheduler()))
    optimize_for_inference(pipe, options=CAPTURED)
    captured = pipe.network
    for change in (
        lambda: None,
        lambda: pipe.scheduler.register_to_config(prediction_type="v_prediction"),
        lambda: pipe.scheduler.register_to_config(clip_sample=False),
        lambda: setattr(pipe.scheduler, "betas", torch.linspace(1e-4, 0.015, 1000)),
        lambda: setattr(pipe, "scheduler", DDPMScheduler(variance_type="fixed_large")),
    ):
        change()
        for labels, scale in (([0, 1], 1.0), ([2, 1], 1.0), ([2, 1], 3.0)):
            call = {"seeds": [1, 9], "num_inference_steps": 6, "class_labels": labels, "guidance_scale": scale}
            pipe.network = captured
            made = pipe(output_type="pt", **call).images
            pipe.network = pipe.unet
            assert (made - pipe(output_type="pt", **call).images).abs().max() < TENTH
    assert len(captured._graphs) <= 4  # memory of graphs does not grow without end


def test_a_learned_variance_is_captured_too():
    pipe = quiet(DDPMPipeline(network(out_channels=6), DDPMScheduler(variance_type="learned_range")))
    plain, made = both_ways(pipe, seeds=[0, 1], num_inference_steps=8)
    assert (plain - made).abs().max() < TENTH


def test_image_i_is_that_of_its_seed_in_any_captured_batch():
    pipe = quiet(DDPMPipeline(network(), DDPMScheduler()))
    optimize_for_inference(pipe, options=CAPTURED)
    call = {"num_inference_steps": 5, "output_type": "pt"}
    together = pipe(seeds=range(8), **call).images
    for batch in ([0, 1, 2, 3, 4], [5, 6, 7], [7], [0]):  # five and four take the code of eight
        assert (pipe(seeds=batch, **call).images - together[batch]).abs().max() < TENTH


def test_inpainting_callbacks_and_progressive_generation_with_a_captured_chain():
    pipe = quiet(DDPMPipeline(network(), DDPMScheduler()))
    image, mask = torch.rand(3, 16, 16), torch.zeros(16, 16, dtype=torch.bool)
    mask[:8] = True
    paint = {"image": image, "mask_image": mask, "resample_length": 2, "resample_times": 2}
    plain, made = both_ways(pipe, seeds=[4], num_inference_steps=6, **paint)
    assert (plain - made).abs().max() < TENTH
    halve = {"callback_on_step_end": lambda: lambda pipe, step, t, tensors: {"image": tensors["image"] / 2}}
    plain, made = both_ways(pipe, seeds=[4], num_inference_steps=6, **halve)
    assert (plain - made).abs().max() < TENTH
    states = [step.prev_sample for step in pipe.progressive(seeds=[4], num_inference_steps=6)]
    assert len({state.data_ptr() for state in states}) == 6  # each step's own, not the graph's
    plain = [
        step.prev_sample
        for step in quiet(DDPMPipeline(pipe.unet, pipe.scheduler)).progressive(seeds=[4], num_inference_steps=6)
    ]
    assert all((a - b).abs().max() < TENTH for a, b in zip(states, plain, strict=True))


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_stocks_samplers_take_the_captured_network(sampler):
    pipe = quiet(with_sampler(DDPMPipeline(network(), DDPMScheduler()), sampler))
    plain, made = both_ways(pipe, seeds=[4, 5], num_inference_steps=5)
    assert (plain - made).abs().max() < TENTH
    assert len(pipe.network._graphs) == 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_chain_captured_in_inference_mode_is_used_outside_of_it(sampler):
    pipe = quiet(with_sampler(DDPMPipeline(network(), DDPMScheduler()), sampler))
    optimize_for_inference(pipe, options=CAPTURED)
    call = {"seeds": [4, 5], "num_inference_steps": 5, "output_type": "pt"}
    with torch.inference_mode():
        inside = pipe(**call).images
    assert torch.equal(pipe(**call).images, inside)
    assert len(pipe.network._graphs) == 1


def test_what_cannot_be_captured_runs_without(monkeypatch, caplog):
    def refuse(run, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr("ddpm_hf.models.inference.record", refuse)
    monkeypatch.setattr("ddpm_hf.pipelines.denoising.record", refuse)
    pipe = quiet(DDPMPipeline(network(), DDPMScheduler()))
    with caplog.at_level("WARNING"), attached(caplog):
        plain, made = both_ways(pipe, seeds=[4, 5], num_inference_steps=5)
    assert (plain - made).abs().max() < TENTH
    assert "operation not permitted when stream is capturing); it is slower without" in caplog.text


@contextmanager
def attached(caplog):
    logger = diffusers_logging.get_logger("ddpm_hf.models.inference")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


def test_another_precision_is_another_image(tmp_path):
    """The network's precision decides an image, so files made in one are not added to in another."""
    pipe = DDPMPipeline(network(), DDPMScheduler())
    write_samples(pipe, [0], tmp_path, num_inference_steps=2)
    optimize_for_inference(pipe, options=InferenceOptions("bf16"))
    assert with_sampler(pipe, "ddim").network is pipe.network
    with pytest.raises(ValueError, match="made with other dtype"):
        write_samples(pipe, [0, 1], tmp_path, num_inference_steps=2)


def test_weights_that_moved_are_not_answered_from_before():
    pipe = DDPMPipeline(network(), DDPMScheduler())
    optimize_for_inference(pipe, options=OPTIONS[1])
    pipe.unet = network(act_fn="relu")
    assert pipe.network is pipe.unet


def test_weights_that_were_converted_are_not_computed_as_before():
    pipe = DDPMPipeline(network(), DDPMScheduler(num_train_timesteps=10))
    optimize_for_inference(pipe, options=InferenceOptions(channels_last=True))
    pipe.to(torch.bfloat16)
    assert pipe.network is pipe.unet
    assert pipe(seeds=[0], num_inference_steps=2, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"precision": "fp8"}, "fp32, bf16 or fp16, got 'fp8'"),
    ],
)
def test_options_that_are_none(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        InferenceOptions(**settings)
