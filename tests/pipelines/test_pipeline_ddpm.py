"""Sampling: the same images as stock's pipeline, one image per seed, and bad arguments."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from conftest import SMALL_NETWORK, gaussian_pipeline, make_small_unet, stock_draws
from diffusers.models.unets.unet_2d import UNet2DOutput
from oracles import GaussianData
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel
from ddpm_hf.pipelines.schedulers import set_timesteps
from ddpm_hf.sampling.generation import SAMPLERS, with_sampler
from ddpm_hf.utils.errors import NotFiniteError
from ddpm_hf.utils.randomness import SeededNoise


def arrays(pipe, **options):
    return pipe(num_inference_steps=20, output_type="np", **options).images


def test_same_images_as_stock_for_the_same_generator(small_pipeline):
    stock = diffusers.DDPMPipeline(small_pipeline.unet, diffusers.DDPMScheduler(variance_type="fixed_large"))
    stock.set_progress_bar_config(disable=True)
    for generators in (1, 3):
        made = [torch.Generator().manual_seed(i) for i in range(generators)]
        again = [torch.Generator().manual_seed(i) for i in range(generators)]
        ours = arrays(small_pipeline, batch_size=3, generator=made if generators > 1 else made[0])
        theirs = arrays(stock, batch_size=3, generator=again if generators > 1 else again[0])
        assert np.abs(ours - theirs).max() < 1 / 255


def test_an_image_depends_on_its_own_seed_only(small_pipeline):
    four = arrays(small_pipeline, seeds=[7, 8, 9, 10])
    for row, seed in enumerate([7, 8, 9, 10]):
        alone = arrays(small_pipeline, seeds=[seed])[0]
        # Convolutions may round differently for another batch size, by far less than a pixel value.
        assert np.abs(four[row] - alone).max() < 1e-4
    assert np.abs(four[0] - four[1]).max() > 0.1


def test_dropout_is_off_while_sampling_and_the_mode_comes_back(small_pipeline):
    unet = UNet2DModel(**{**small_pipeline.unet.config, "dropout": 0.5})
    unet.load_state_dict(small_pipeline.unet.state_dict())
    pipe = DDPMPipeline(unet.train(), small_pipeline.scheduler)
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(arrays(pipe, seeds=[0]), arrays(small_pipeline, seeds=[0]))
    assert unet.training


def test_default_steps_are_the_whole_chain(small_unet):
    pipe = DDPMPipeline(small_unet, DDPMScheduler(num_train_timesteps=30))
    pipe.set_progress_bar_config(disable=True)
    pipe(seeds=[0])
    assert len(pipe.scheduler.timesteps) == 30


def test_output_types(small_pipeline):
    pil = small_pipeline(seeds=[0, 1], num_inference_steps=5).images
    assert [image.size for image in pil] == [(8, 8), (8, 8)]
    pt = small_pipeline(seeds=[0, 1], num_inference_steps=5, output_type="pt", return_dict=False)[0]
    assert pt.shape == (2, 1, 8, 8)
    assert 0 <= pt.min() <= pt.max() <= 1
    assert np.array_equal(np.asarray(pil[0]), (pt[0, 0] * 255).round().byte().numpy())


def test_a_bf16_network_keeps_a_float32_chain(small_pipeline):
    full = arrays(small_pipeline, seeds=[0])
    low = arrays(small_pipeline.to(torch.bfloat16), seeds=[0])
    assert low.dtype == np.float32
    assert len(np.unique(low)) > 30  # bf16 pixels near 1 would fall on few values
    assert np.abs(full - low).mean() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 0, "generator": []}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
        ({"seeds": 5}, r"one number per image, got 5; write seeds=\[5\]"),
        ({"image": np.zeros((0, 8, 8, 1)), "strength": 0.5}, "image is an empty batch"),
        ({"image": np.zeros((8, 8, 1))}, "needs strength"),
        ({"strength": 0.5}, "give image"),
        ({"mask_image": np.ones((8, 8))}, "give image"),
        ({"image": np.zeros((8, 8, 1)), "strength": 1.5}, "between 0 and 1, got 1.5"),
        ({"image": np.zeros((9, 8, 1)), "strength": 0.5}, "are \\(1, 8, 8\\)"),
        ({"image": np.full((8, 8, 1), 7.0), "strength": 0.5}, "must lie in"),
        ({"image": np.full((8, 8, 1), np.nan), "strength": 0.5}, "must lie in"),
        ({"image": np.zeros((8, 8, 1)), "strength": float("nan")}, "between 0 and 1, got nan"),
        ({"image": np.zeros((8, 8, 1)), "mask_image": np.full((8, 8), np.nan)}, "lie in"),
        ({"eta": float("nan")}, "eta must be between 0 and 1, got nan"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number, got inf"),
        ({"image": "cat.png", "strength": 0.5}, "got str"),
        ({"image": [], "strength": 0.5}, "empty list"),
        ({"image": np.zeros((3, 8, 8, 1)), "strength": 0.5, "seeds": [1, 2]}, "image: got 3 for 2 images"),
        ({"image": np.zeros((8, 8, 1)), "mask_image": np.ones((4, 4))}, "mask_image has shape"),
        ({"image": np.zeros((8, 8, 1)), "mask_image": np.ones((8, 8)), "resample_times": 0}, "at least 1"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "got 'latents'"),
        ({"output_type": "latent"}, "'latent'"),
        ({"seeds": [1], "generator": torch.Generator()}, "not both"),
        ({"seeds": [1, 2], "batch_size": 3}, "2 seeds"),
        ({"batch_size": 3, "generator": [torch.Generator()]}, "got 1 generators"),
        ({"num_inference_steps": 0}, "got 0"),
        ({"num_inference_steps": 1001}, "1001"),
    ],
)
def test_bad_arguments(small_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        small_pipeline(**options)


def test_a_learned_variance_is_dropped_by_samplers_that_have_none():
    unet = make_small_unet(out_channels=2)
    learned = DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range"))
    plain = make_small_unet()
    plain.load_state_dict(
        {
            **unet.state_dict(),
            **{f"conv_out.{name}": unet.state_dict()[f"conv_out.{name}"][:1] for name in ("weight", "bias")},
        }
    )
    for scheduler in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
        images = []
        for network in (unet, plain):
            pipe = DDPMPipeline(network, scheduler.from_config(learned.scheduler.config))
            pipe.set_progress_bar_config(disable=True)
            images.append(arrays(pipe, seeds=[0]))
        assert np.abs(images[0] - images[1]).max() < 1e-4


def test_no_seeds_are_no_images(small_pipeline):
    assert small_pipeline(seeds=[]).images == []
    assert small_pipeline(seeds=[], output_type="np").images.shape == (0, 8, 8, 1)
    assert small_pipeline(seeds=[], output_type="pt", return_dict=False)[0].shape == (0, 1, 8, 8)


BETAS = np.linspace(1e-4, 0.02, 1000)
DATA = GaussianData(mean=0.1, std=0.25, betas=BETAS)


@pytest.mark.parametrize("steps", [10, 50, 200])
def test_images_of_gaussian_data_have_its_moments(steps):
    """4000 images through the pipeline itself, against the chain's closed form."""
    pipe = gaussian_pipeline(DDPMScheduler(clip_sample=False), DATA)
    images = pipe(batch_size=4000, generator=torch.Generator().manual_seed(0), num_inference_steps=steps)
    x = torch.stack([torch.from_numpy(np.asarray(image, dtype=np.float64)) for image in images.images]) / 127.5 - 1
    mean, variance = DATA.reverse_moments(pipe.scheduler.timesteps.tolist(), large=False)[-1]
    n = x.numel()
    assert abs(x.mean() - mean) < 4 * (variance / n) ** 0.5
    # Levels are rounded (variance 1/12 of one squared), and the estimate of a variance has its own error.
    assert abs(x.var() - variance - (1 / 127.5) ** 2 / 12) < 4 * variance * (2 / n) ** 0.5 + 1e-5


def test_image_to_image_keeps_what_strength_leaves(small_pipeline):
    image = np.random.default_rng(0).uniform(size=(2, 8, 8, 1)).astype(np.float32)
    options = {"num_inference_steps": 20, "output_type": "np", "seeds": [3, 4]}
    assert np.abs(small_pipeline(image=image, strength=0.0, **options).images - image).max() < 1e-6
    # The same by hand: noise of the same seed added at the chain's 10th timestep from the end.
    half = small_pipeline(image=image, strength=0.5, **options).images
    source = SeededNoise([3, 4])
    x_0 = torch.from_numpy(image).permute(0, 3, 1, 2) * 2 - 1
    noise = source.normal((2, 1, 8, 8))
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    scheduler.set_timesteps(20)
    x = scheduler.add_noise(x_0, noise, scheduler.timesteps[10:11])
    with torch.no_grad(), stock_draws(source):
        for t in scheduler.timesteps[10:]:
            x = scheduler.step(small_pipeline.unet(x, t).sample, t, x).prev_sample
    assert np.abs(half - (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()).max() < 1e-2


def test_image_to_image_of_gaussian_data():
    """Noised to t and brought back, an image keeps the share of itself that x_t still has: a closed form."""
    pipe = gaussian_pipeline(DDPMScheduler(clip_sample=False), DATA)
    image = torch.full((3000, 1, 8, 8), 0.7)  # 0.4 in the [-1, 1] scale
    images = pipe(image=image, strength=0.1, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    slope, offset = DATA.expected_x_0(99)
    expected = slope * DATA.alpha_bar[99] ** 0.5 * 0.4 + offset  # E[E[x_0|x_t]] for this x_0
    found = (images * 2 - 1).mean().item()
    assert abs(found - expected) < 4 * DATA.std / images.numel() ** 0.5
    assert abs(expected - DATA.mean) > 0.02  # or the test would see nothing


def test_inpainting_keeps_the_known_pixels_and_fits_the_others_to_them(small_pipeline):
    image = np.random.default_rng(0).uniform(size=(8, 8, 1)).astype(np.float32)
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:6, 3:] = True
    options = {"image": image, "mask_image": mask, "num_inference_steps": 10, "output_type": "np"}
    options |= {"resample_length": 3, "resample_times": 2}
    images = small_pipeline(seeds=[0, 1], **options).images
    assert np.abs(images - image)[:, ~mask].max() < 1e-6
    assert np.abs(images[0] - images[1])[mask].max() > 0.05
    assert np.abs(small_pipeline(seeds=[1], **options).images[0] - images[1]).max() < 1e-4
    with_pil = small_pipeline(
        seeds=[0, 1],
        **{**options, "image": Image.fromarray((image[..., 0] * 255).round().astype(np.uint8)), "strength": 0.5},
    )
    assert np.abs(with_pil.images - image)[:, ~mask].max() < 1 / 255
    ddim = DDPMPipeline(small_pipeline.unet, diffusers.DDIMScheduler.from_config(small_pipeline.scheduler.config))
    assert np.abs(ddim(seeds=[0], **options).images - image)[:, ~mask].max() < 1e-6
    unipc = diffusers.UniPCMultistepScheduler.from_config(small_pipeline.scheduler.config)
    with pytest.raises(ValueError, match="ddpm and ddim"):
        DDPMPipeline(small_pipeline.unet, unipc)(seeds=[0], **options)


def test_inpainting_draws_from_the_conditional_distribution():
    """Two pixels of a correlated Gaussian: given one, the other has a known mean. Resampling brings it there."""
    rho, std, kept = 0.9, 0.3, 0.5
    alpha_bar = np.cumprod(1 - BETAS)
    covariance = std**2 * np.array([[1, rho], [rho, 1]])

    class Correlated(UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            a = alpha_bar[int(timestep)]
            gain = np.sqrt(1 - a) * np.linalg.inv(a * covariance + (1 - a) * np.eye(2))
            x = sample[:, 0, 0, :2] @ torch.from_numpy(gain).to(sample)
            out = torch.zeros_like(sample)
            out[:, 0, 0, :2] = x
            return UNet2DOutput(sample=out)

    pipe = DDPMPipeline(Correlated(**SMALL_NETWORK), DDPMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    image = torch.full((1, 1, 8, 8), kept / 2 + 0.5)
    mask = np.zeros((8, 8))
    mask[0, 1] = 1

    def drawn(times):
        images = pipe(
            batch_size=2000,
            image=image,
            mask_image=mask,
            output_type="pt",
            num_inference_steps=100,
            generator=torch.Generator().manual_seed(0),
            resample_times=times,
        ).images
        return (images[:, 0, 0, 1] * 2 - 1).mean().item()

    # Resampling is approximate: each way down meets fresh noise on the known pixel. So this is its trend.
    missing = [rho * kept - drawn(times) for times in (1, 8)]
    assert missing[0] - 0.05 > missing[1] > 0  # the means have a standard error of 0.01


def test_callbacks_see_and_change_the_chain_and_end_it(small_pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, timestep, sorted(tensors)))
        if step == 7:
            pipe._interrupt = True
        if step == 3:
            return {"image": torch.zeros_like(tensors["image"])}
        return {}

    options = {"seeds": [0], "num_inference_steps": 10, "output_type": "np"}
    changed = small_pipeline(
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["image", "pred_original_sample"],
        **options,
    ).images
    assert [step for step, _, _ in seen] == list(range(8))
    assert [t for _, t, _ in seen] == list(range(900, 100, -100))
    assert seen[0][2] == ["image", "pred_original_sample"]
    # By hand: the remaining four steps from zeros, with the noise that is left of seed 0.
    left = SeededNoise([0], drawn=5)
    steps = small_pipeline.denoise(torch.zeros(1, 1, 8, 8), left, num_inference_steps=10, start=4, stop=8)
    *_, last = steps
    assert np.abs(changed - (last.prev_sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()).max() < 1e-5
    small_pipeline(callback_on_step_end=lambda *_: None, **options)  # one that returns nothing, as some do


def test_progressive_generation_ends_in_the_image(small_pipeline):
    steps = list(small_pipeline.progressive(seeds=[5, 6], num_inference_steps=10))
    assert [step.timestep for step in steps] == list(range(900, -1, -100))
    assert all(torch.equal(a.prev_sample, b.sample) for a, b in itertools.pairwise(steps))
    image = small_pipeline(seeds=[5, 6], num_inference_steps=10, output_type="pt").images
    assert torch.equal((steps[-1].prev_sample / 2 + 0.5).clamp(0, 1), image)
    t = 500
    a = np.cumprod(1 - BETAS)[t]
    step = next(step for step in steps if step.timestep == t)
    with torch.no_grad():
        eps = small_pipeline.unet(step.sample, t).sample
    by_hand = ((step.sample - (1 - a) ** 0.5 * eps) / a**0.5).clamp(-1, 1)
    assert torch.allclose(step.pred_original_sample, by_hand, atol=1e-4)


def test_classes_by_name():
    unet = make_small_unet(num_class_embeds=3, _class_names=["cats", "dogs"], _null_class=2)
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    named = arrays(pipe, seeds=[0, 1], class_labels=["dogs", "cats"])
    assert np.array_equal(named, arrays(pipe, seeds=[0, 1], class_labels=[1, 0]))
    assert np.array_equal(arrays(pipe, seeds=[0], class_labels="dogs")[0], arrays(pipe, seeds=[0], class_labels=1)[0])
    with pytest.raises(ValueError, match="'cows' is no class"):
        arrays(pipe, seeds=[0], class_labels="cows")


def test_one_class_in_a_list_is_for_all_images():
    pipe = DDPMPipeline(make_small_unet(num_class_embeds=3), DDPMScheduler(num_train_timesteps=10))
    options = {"output_type": "pt", "seeds": [0, 1, 2]}
    assert torch.equal(pipe(class_labels=[2], **options).images, pipe(class_labels=2, **options).images)


def test_classes_beyond_those_of_the_network():
    """Stock's class-conditional networks have no names; a dataset's labels must not leave their table."""
    pipe = DDPMPipeline(make_small_unet(num_class_embeds=3), DDPMScheduler(num_train_timesteps=10))
    assert pipe.classes.of_names(["a", "b", "c"]) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"class label 3 is outside 0\.\.2"):
        pipe.classes.of_names(["a", "b", "c", "d"])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guided", ["not", "by class", "by a model", "on an interval"])
def test_evaluations_are_counted_as_the_network_sees_them(monkeypatch, sampler, guided):
    unet = make_small_unet(**({"num_class_embeds": 3, "_null_class": 2} if guided == "by class" else {}))
    pipe = with_sampler(DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)), sampler)
    options = {"num_inference_steps": 5} | ({} if guided == "not" else {"guidance_scale": 2.0})
    if guided == "on an interval":
        options["guidance_interval"] = (30, 70)
    if guided in ("by a model", "on an interval"):
        pipe.guide = DDPMPipeline(make_small_unet(1), DDPMScheduler(num_train_timesteps=100))
    seen, forward = [], UNet2DModel.forward
    monkeypatch.setattr(
        UNet2DModel, "forward", lambda self, x, *a, **kw: seen.append(len(x)) or forward(self, x, *a, **kw)
    )
    pipe(seeds=[0, 1], output_type="pt", **options, **({"class_labels": 0} if guided == "by class" else {}))
    assert pipe.network_evaluations(**options) == sum(seen) / 2
    if guided == "not":
        assert sum(seen) / 2 == (9 if sampler == "heun" else 5)


def test_second_order_samplers_come_to_a_timestep_twice_on_purpose(small_unet):
    """Against a loop of stock's parts, as its documentation has it."""
    config = DDPMScheduler(num_train_timesteps=100).config
    scheduler = diffusers.HeunDiscreteScheduler.from_config(config)
    pipe = DDPMPipeline(small_unet, diffusers.HeunDiscreteScheduler.from_config(config))
    made = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=8, output_type="pt").images
    scheduler.set_timesteps(8)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = small_unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x).prev_sample
    assert len(scheduler.timesteps) > len(scheduler.timesteps.unique())
    assert (made - (x / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5


def test_networks_whose_images_pil_does_not_have():
    two = UNet2DModel(**{**SMALL_NETWORK, "in_channels": 2, "out_channels": 2})
    pipe = DDPMPipeline(two, DDPMScheduler(num_train_timesteps=10))
    with pytest.raises(ValueError, match="PIL has no images of 2 channels"):
        pipe()
    assert pipe(output_type="np").images.shape == (1, 8, 8, 2)
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="no sample_size"):
        pipe(output_type="np")


@pytest.mark.filterwarnings("error")
def test_masks_and_images_as_numpy_gives_them(small_pipeline):
    """PIL's arrays are read-only; PyTorch warns of them."""
    grey = np.asarray(Image.new("L", (8, 8), 100))
    small_pipeline(image=grey[..., None], mask_image=np.asarray(Image.new("L", (8, 8), 255)), resample_times=1)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\], got torch.float64 from 0 to 255"):
        small_pipeline(image=grey[..., None], mask_image=np.eye(8) * 255)
    with pytest.raises(ValueError, match="mask_image is an empty list"):
        small_pipeline(image=grey[..., None], mask_image=[])


def test_a_late_start_is_said_once(small_pipeline, monkeypatch, caplog):
    """Two steps of `leading` spacing begin at t = 500; stock does so too, without a word."""
    monkeypatch.setattr("ddpm_hf.pipelines.schedulers._warned_of_a_late_start", False)
    monkeypatch.setattr(diffusers.utils.logging._get_library_root_logger(), "propagate", True)
    for steps in (1000, 2, 1):
        set_timesteps(small_pipeline.scheduler, steps)
    said = [record.message for record in caplog.records if "pure noise" in record.message]
    assert len(said) == 1
    assert "num_inference_steps=2 starts from pure noise at t=500" in said[0]
    assert said[0].endswith("better: timestep_spacing='trailing'")


# ------------------------------------------------------------------------- what is not finite is not an image


def quiet(unet, scheduler) -> DDPMPipeline:
    pipe = DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Failing(UNet2DModel):
    """A network whose output is `value` at timestep `at`, and 0 elsewhere."""

    at, value = 500, float("nan")

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        made = torch.zeros_like(sample)
        made[-1, 0, 0, 0] = self.value if int(timestep) == self.at else 0
        return UNet2DOutput(sample=made)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sampler", [DDPMScheduler, diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler])
def test_an_output_that_is_not_finite_at_one_timestep_makes_no_image(sampler, value):
    """An infinite one would be clipped to black or white."""
    options = {} if sampler is diffusers.DPMSolverMultistepScheduler else {"clip_sample": True}
    pipe = quiet(Failing(**SMALL_NETWORK), sampler(**options))
    pipe.scheduler.set_timesteps(10)
    pipe.unet.value, pipe.unet.at = value, int(pipe.scheduler.timesteps[4])
    for output_type in ("pil", "np", "pt"):
        with pytest.raises(NotFiniteError, match=r"the images are not finite: the network, in float32, or"):
            pipe(seeds=[0, 1], num_inference_steps=10, output_type=output_type)
    image = np.full((8, 8, 1), 0.5)
    with pytest.raises(NotFiniteError):
        pipe(image=image, strength=0.9, seeds=[0], num_inference_steps=10)
    if sampler is not diffusers.DPMSolverMultistepScheduler:
        with pytest.raises(NotFiniteError):
            pipe(image=image, mask_image=np.ones((8, 8)), seeds=[0], num_inference_steps=10)
    pipe.unet.at = -1
    assert pipe(seeds=[0], num_inference_steps=10, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("name", ["conv_in.weight", "conv_out.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_weight_that_is_not_finite_is_named(small_pipeline, name, value):
    with torch.no_grad():
        small_pipeline.unet.get_parameter(name).view(-1)[0] = value
    with pytest.raises(NotFiniteError, match=rf"the network's weights {name} hold NaN or infinity"):
        small_pipeline(seeds=[0], num_inference_steps=2)


def test_an_overflow_of_float16_says_what_helps(small_pipeline):
    class Overflowing(UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            return UNet2DOutput(sample=sample * 1e4 * 1e4)

    pipe = quiet(Overflowing(**SMALL_NETWORK).half(), small_pipeline.scheduler)
    with pytest.raises(NotFiniteError, match="float16 ends at 65504, use bfloat16 or float32"):
        pipe(seeds=[0], num_inference_steps=2)


@pytest.mark.parametrize("process", [{"rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"}])
@pytest.mark.parametrize("steps", [2, 5, 10])
def test_ddim_with_eta_1_where_no_signal_is_left(small_unet, process, steps):
    """Song et al. 2021, Eq. 12 and 16, in float64; stock's float32 takes the root of -6e-8 there."""
    config = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False, **process}
    scheduler = diffusers.DDIMScheduler(**config)
    pipe = quiet(small_unet, scheduler)
    image = pipe(seeds=[3], num_inference_steps=steps, eta=1.0, output_type="pt").images
    alpha_bar = scheduler.alphas_cumprod.double()
    draws, shape = SeededNoise([3]), (1, 1, 8, 8)
    x_t = draws.normal(shape).double()
    for t in scheduler.timesteps.tolist():
        a, a_prev = alpha_bar[t], alpha_bar[t - 1000 // steps] if t >= 1000 // steps else scheduler.final_alpha_cumprod
        with torch.no_grad():
            v = small_unet(x_t.float(), t).sample.double()
        x_0, eps = a.sqrt() * x_t - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x_t
        variance = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        x_t = a_prev**0.5 * x_0 + (1 - a_prev - variance).clamp(min=0).sqrt() * eps
        x_t = x_t + variance.sqrt() * draws.normal(shape)
    assert (image - (x_t / 2 + 0.5).clamp(0, 1)).abs().max() < 0.5 / 255


@pytest.mark.parametrize("sampler", [diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler, DDPMScheduler])
def test_epsilon_where_no_signal_is_left_is_refused(small_unet, sampler):
    """Stock divides by 0 and clips: black and white noise."""
    pipe = quiet(small_unet, sampler(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    with pytest.raises(ValueError, match=r"alpha_bar vanishes at t=999, where 'epsilon' says nothing about x_0"):
        pipe(seeds=[0], num_inference_steps=10)
