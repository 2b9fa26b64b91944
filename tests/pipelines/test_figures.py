"""The paper's figures: closed forms for Gaussian data, loops written out with stock diffusers, and bad arguments."""

import math
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import DIGITS_MODEL, make_small_unet, stock_draws
from oracles import GaussianData
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel, cli
from ddpm_hf.data.datasets import load_digits
from ddpm_hf.pipelines.figures import (
    LAMBDAS,
    coarse_to_fine,
    interpolate,
    progressive_generation,
    shared_latents,
)
from ddpm_hf.sampling.generation import with_sampler
from ddpm_hf.utils.randomness import SeededNoise
from ddpm_hf.utils.visualize import save_animation

SHORT = {"num_inference_steps": 10}


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return load_digits("train").images


@pytest.fixture(scope="module")
def trained() -> DDPMPipeline:
    return DDPMPipeline.from_pretrained(DIGITS_MODEL)


# ---------------------------------------------------------------------- Gaussian data


class ExactNoise(UNet2DModel):
    """The best prediction of the noise, E[epsilon|x_t]; the weights go unused."""

    data: GaussianData

    def forward(self, sample, timestep, class_labels=None):
        slope, offset = self.data.expected_noise(int(timestep))
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=slope * sample + offset)


@pytest.fixture(scope="module")
def gaussian() -> tuple[DDPMPipeline, GaussianData]:
    scheduler = DDPMScheduler(
        num_train_timesteps=40, beta_start=0.01, beta_end=0.2, variance_type="fixed_small", clip_sample=False
    )
    unet = ExactNoise(**make_small_unet().config)
    unet.data = GaussianData(0.3, 0.4, scheduler._betas)
    return DDPMPipeline(unet, scheduler), unet.data


def moments_from(data: GaussianData, t: int, mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance of x_0 from those of x_t, down the whole chain with the exact noise and beta_tilde."""
    for index in range(t - 1, -1, -1):
        a_t, a_s = data.alpha_bar[index], data.alpha_bar[index - 1] if index else 1.0
        beta = 1 - a_t / a_s
        slope, offset = data.expected_x_0(index)
        from_x_0 = math.sqrt(a_s) * beta / (1 - a_t)
        gain = from_x_0 * slope + math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t)
        mean, variance = gain * mean + from_x_0 * offset, gain**2 * variance + beta * (1 - a_s) / (1 - a_t)
        if not index:
            variance -= beta * (1 - a_s) / (1 - a_t)
    return mean, variance


@pytest.mark.parametrize("same_noise", [False, True])
@pytest.mark.parametrize("t", [5, 20])
def test_interpolation_of_gaussian_data_has_the_exact_moments(gaussian, t, same_noise):
    pipe, data = gaussian
    pairs, (a, b) = 150, (0.1, 0.9)
    images = [torch.full((pairs, 1, 8, 8), level) for level in (a, b)]
    lambdas = (0, 0.25, 0.5, 1)
    made = interpolate(pipe, *images, t, lambdas, range(pairs), same_noise=same_noise, batch_size=1000).images.double()
    a_bar = data.alpha_bar[t - 1]  # the paper's t counts from 1
    for share, values in zip(lambdas, made.unbind(1), strict=True):
        start = math.sqrt(a_bar) * ((1 - share) * (2 * a - 1) + share * (2 * b - 1))  # in the [-1, 1] scale
        noise = (1 - a_bar) * (1 if same_noise else (1 - share) ** 2 + share**2)
        mean, variance = moments_from(data, t, start, noise)
        n = values.numel()
        assert abs(values.mean() - mean) < 4 * math.sqrt(variance / n)
        assert abs(values.var() / variance - 1) < 4 * math.sqrt(2 / n)
    # With the noise the same for every lambda, and an affine network, the images lie on a line.
    line = made[:, [0]] + torch.tensor(lambdas).view(-1, 1, 1, 1) * (made[:, [3]] - made[:, [0]])
    assert (made - line).abs().max() < 1e-5


def test_the_predicted_x_0_of_gaussian_data_is_its_conditional_mean(gaussian):
    pipe, data = gaussian
    made = progressive_generation(pipe, [3, 4])
    assert made.ts == list(range(40, -1, -1))
    for point, t in enumerate(made.ts[:-1]):
        slope, offset = data.expected_x_0(t - 1)
        expected = slope * made.x_t[:, point].double() + offset
        assert (made.pred_original_sample[:, point] - expected).abs().max() < 2e-5


# ---------------------------------------------------------------------- the loop, written out with stock diffusers


def stock_decoding(pipe, x_t: torch.Tensor, start: int, noise: SeededNoise, steps: int, ddim: bool = False):
    """x_0 from one x_t `[1, C, H, W]` by stock's scheduler; all x on the way."""
    scheduler = (diffusers.DDIMScheduler if ddim else diffusers.DDPMScheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    options = {"eta": 0.0, "use_clipped_model_output": True} if ddim else {}
    on_the_way = [x_t]
    for timestep in scheduler.timesteps[start:]:
        with torch.no_grad():
            output = pipe.unet(on_the_way[-1], timestep).sample
        with stock_draws(noise):
            on_the_way.append(scheduler.step(output, timestep, on_the_way[-1], **options).prev_sample)
    return on_the_way


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_interpolation_is_the_loop_written_out(trained, digits, sampler):
    pipe, (a, b) = with_sampler(trained, sampler), digits[:2]
    lambdas, steps, start, seed = (0.0, 0.4, 1.0), 20, 10, 7  # t = 451, timestep 450
    made = interpolate(pipe, a, b, 450, lambdas, [seed], same_noise=True, num_inference_steps=steps)
    assert made.t == 451
    alpha_bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:451])
    for share, image in zip(lambdas, made.images[0], strict=True):
        source = SeededNoise([seed])
        noise = source.normal((1, 1, 8, 8))
        x_a, x_b = (math.sqrt(alpha_bar) * (x / 127.5 - 1) + math.sqrt(1 - alpha_bar) * noise for x in (a, b))
        expected = stock_decoding(pipe, (1 - share) * x_a + share * x_b, start, source, steps, sampler == "ddim")
        assert (image - expected[-1][0]).abs().max() < 2 / 127.5  # stock's tables are float32
    assert (made.images[0, 0] - made.images[0, 2]).abs().max() > 0.2


def test_lambda_0_is_what_the_pipeline_makes_of_a_and_lambda_1_knows_nothing_of_a(trained, digits):
    a, b, c = digits[:3]
    made = interpolate(trained, a, b, 451, (0, 0.5, 1), [5], num_inference_steps=20).images[0]
    from_a = trained(image=a, strength=0.5, seeds=[5], num_inference_steps=20, output_type="pt").images[0]
    assert (made[0].clamp(-1, 1) / 2 + 0.5 - from_a).abs().max() < 1e-4
    other = interpolate(trained, c, b, 451, (0, 0.5, 1), [5], num_inference_steps=20).images[0]
    assert (made[2] - other[2]).abs().max() < 1e-4
    assert (made[0] - other[0]).abs().max() > 0.1
    # Each image has noise of its own: with one for both, B becomes another image.
    shared = interpolate(trained, a, b, 451, (0, 0.5, 1), [5], same_noise=True, num_inference_steps=20).images[0]
    assert (made[0] - shared[0]).abs().max() < 1e-4
    assert (made[2] - shared[2]).abs().max() > 0.1


def test_shared_latents_are_the_loop_written_out(trained):
    steps = 20
    made = shared_latents(trained, [3, 11, 12], num_inference_steps=steps)
    assert made.ts == [951, 751, 501, 251]
    source = SeededNoise([3])
    noise = source.normal((1, 1, 8, 8))
    chain = stock_decoding(trained, noise, 0, source, steps)
    assert torch.equal(made.x_t[:1], noise)
    for row, start in enumerate([0, 4, 9, 14]):
        assert (made.x_t[row] - chain[start][0]).abs().max() < 0.01
        for column, seed in enumerate([11, 12]):
            last = stock_decoding(trained, made.x_t[[row]], start, SeededNoise([seed]), steps)[-1]
            assert (made.samples[row, column] - last[0]).abs().max() < 2 / 127.5


def test_samples_that_share_x_t_early_differ_more_than_late(trained):
    made = shared_latents(trained, range(17), ts=(1000, 500, 250, 50), num_inference_steps=50)
    spread = made.samples.var(dim=1).mean(dim=(1, 2, 3))
    assert made.samples.shape == (4, 16, 1, 8, 8)
    assert spread[0] > spread[1] > 1.5 * spread[2] > 4 * spread[3] > 0


def test_progressive_generation_ends_with_the_pipelines_images(trained):
    made = progressive_generation(trained, [0, 9], num_inference_steps=50, points=10)
    assert made.ts == [981, 881, 781, 681, 581, 481, 381, 281, 181, 81, 0]
    assert made.x_t.shape == made.pred_original_sample.shape == (2, 11, 1, 8, 8)
    for row, seed in enumerate([0, 9]):
        source = SeededNoise([seed])
        noise = source.normal((1, 1, 8, 8))
        chain = torch.cat(stock_decoding(trained, noise, 0, source, 50))
        assert (made.x_t[row] - chain[::5]).abs().max() < 0.02
    assert torch.equal(made.x_t[:, -1], made.pred_original_sample[:, -1])
    # The prediction from pure noise says little, and becomes the image bit by bit.
    error = (made.pred_original_sample - made.x_t[:, -1:]).square().mean(dim=(0, 2, 3, 4))
    assert error[0] > 10 * error[-2]


# ---------------------------------------------------------------------- what holds whatever the network


def test_interpolation_is_symmetric(small_pipeline, digits):
    options = {"lambdas": (0, 0.3, 0.7, 1), "same_noise": True, "num_inference_steps": 10}
    there = interpolate(small_pipeline, digits[0], digits[1], **options).images
    back = interpolate(small_pipeline, digits[1], digits[0], **options).images
    assert (there - back.flip(1)).abs().max() < 1e-3
    assert (there - back).abs().max() > 0.1


def test_without_diffusion_pixels_are_mixed(small_pipeline, digits):
    a, b = digits[:2].numpy().astype(np.float64) / 127.5 - 1
    rows = coarse_to_fine(small_pipeline, digits[0], digits[1], **SHORT).rows
    assert rows[-1].t == 0
    expected = np.stack([(1 - share) * a + share * b for share in np.arange(11) / 10])
    assert np.abs(rows[-1].images[0].numpy() - expected).max() < 1e-6
    assert np.abs(rows[-2].images[0].numpy() - expected).max() > 0.1


def test_rows_of_coarse_to_fine_are_interpolations(small_pipeline, digits):
    figure = coarse_to_fine(small_pipeline, digits[0], digits[1], [1000, 300], (0, 0.5), 4, **SHORT)
    assert [row.t for row in figure.rows] == [901, 301]
    for t, row in zip([1000, 300], figure.rows, strict=True):
        alone = interpolate(small_pipeline, digits[0], digits[1], t, (0, 0.5), [4], **SHORT)
        assert (row.images - alone.images).abs().max() < 1e-3


def test_batches_change_nothing(small_pipeline, digits):
    def all_figures(batch_size: int) -> list[torch.Tensor]:
        options = {"batch_size": batch_size, "num_inference_steps": 5}
        progressive = progressive_generation(small_pipeline, [0, 5, 9], **options)
        shared = shared_latents(small_pipeline, range(4), **options)
        pairs = interpolate(small_pipeline, digits[:2], digits[2:4], **options)
        rows = coarse_to_fine(small_pipeline, digits[0], digits[1], [1000, 500], (0.3, 0.5), **options).rows
        return [
            progressive.x_t,
            progressive.pred_original_sample,
            shared.x_t,
            shared.samples,
            pairs.images,
            *(row.images for row in rows),
        ]

    whole = all_figures(64)
    for batch_size in (1, 3):
        for expected, actual in zip(whole, all_figures(batch_size), strict=True):
            assert (expected - actual).abs().max() < 1e-3


def test_samplers_that_go_by_earlier_steps_too(small_pipeline, digits):
    pipe = with_sampler(small_pipeline, "dpmsolver++")
    assert isinstance(pipe.scheduler, diffusers.DPMSolverMultistepScheduler)
    pipe.set_progress_bar_config(disable=True)
    rows = coarse_to_fine(pipe, digits[0], digits[1], (1000, 450, 300), (0, 0.5), 4, **SHORT).rows
    for row, strength in zip(rows, (1.0, 0.5, 0.3), strict=True):
        options = {"strength": strength, "seeds": [4], "output_type": "pt", **SHORT}
        expected = pipe(image=digits[0], **options).images
        assert (row.images[:, 0].clamp(-1, 1) / 2 + 0.5 - expected).abs().max() < 1e-3
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler is deterministic"):
        shared_latents(pipe, [0, 1])


def test_shared_latents_with_a_random_ddim(small_pipeline):
    made = shared_latents(with_sampler(small_pipeline, "ddim"), [0, 1, 2], eta=1.0, **SHORT)
    assert (made.samples[:, 0] - made.samples[:, 1]).abs().amax((1, 2, 3)).min() > 0.1


def test_a_shorter_chain_takes_the_nearest_step_and_says_so(small_pipeline, digits):
    options = {"num_inference_steps": 4}  # timesteps 750, 500, 250, 0
    figure = coarse_to_fine(small_pipeline, digits[0], digits[1], **options)
    assert [row.t for row in figure.rows] == [751, 501, 251, 1, 0]
    assert interpolate(small_pipeline, digits[0], digits[1], 376, **options).t == 501
    assert interpolate(small_pipeline, digits[0], digits[1], 375, **options).t == 251
    assert shared_latents(small_pipeline, [0, 1], ts=[3, 300, 260], **options).ts == [1, 251]


def test_another_number_of_diffusion_steps(small_unet, digits):
    pipe = DDPMPipeline(small_unet, DDPMScheduler(num_train_timesteps=16))
    assert interpolate(pipe, digits[0], digits[1]).t == 8
    assert shared_latents(pipe, [0, 1]).ts == [16, 12, 8, 4]
    assert [row.t for row in coarse_to_fine(pipe, digits[0], digits[1]).rows] == [16, 14, 12, 10, 8, 6, 4, 2, 0]
    with pytest.raises(ValueError, match="0 to 16, got 500"):
        interpolate(pipe, digits[0], digits[1], 500)


def test_classes_are_handed_on(digits):
    unet = make_small_unet(num_class_embeds=3, _null_class=2)
    with torch.no_grad():
        unet.class_embedding.weight.mul_(20)
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 2.0, "num_inference_steps": 10}
    expected = pipe(seeds=[4, 4], class_labels=[0, 1], output_type="pt", **options).images * 2 - 1
    assert (expected[0] - expected[1]).abs().max() > 0.1
    for batch_size in (1, 2):
        made = progressive_generation(pipe, [4, 4], class_labels=[0, 1], batch_size=batch_size, **options)
        assert (made.x_t[:, -1].clamp(-1, 1) - expected).abs().max() < 1e-3
    pairs = interpolate(pipe, digits[:2], digits[2:4], class_labels=[0, 1], seeds=[4, 4], **options).images
    for row in (0, 1):
        alone = interpolate(pipe, digits[row], digits[row + 2], class_labels=row, seeds=[4], **options).images
        assert (pairs[row] - alone[0]).abs().max() < 1e-3
    shared = shared_latents(pipe, [0, 4, 4], class_labels=[None, 0, 1], **options)
    assert (shared.samples[:, 0] - shared.samples[:, 1]).abs().max() > 0.1
    with pytest.raises(ValueError, match="got 2 class_labels for 3 seeds"):
        progressive_generation(pipe, [0, 1, 2], class_labels=[0, 1])
    with pytest.raises(ValueError, match="class 7"):
        progressive_generation(pipe, [0], class_labels=7)


def test_labels_and_tiles_of_the_pictures(small_pipeline, digits):
    pairs = interpolate(small_pipeline, digits[:2], digits[2:4], **SHORT)
    assert pairs.lambdas == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1] == list(LAMBDAS)
    assert pairs.columns() == ["source A", "rec. A", *(f"0.{i}" for i in range(1, 10)), "rec. B", "source B"]
    picture = np.asarray(pairs.draw())
    # The last column is the second source, enlarged by 8: from the right, 2 pixels of border.
    for row in (0, 1):
        bottom = picture.shape[0] - 2 - (1 - row) * 66
        tile = picture[bottom - 64 : bottom, -66:-2]
        assert np.array_equal(tile[::8, ::8], digits[2 + row, 0].numpy())
    progressive = progressive_generation(small_pipeline, [0, 1], num_inference_steps=30)
    assert len(progressive.frames()) == 31
    assert progressive.draw(columns=4).width < progressive.draw().width
    last = np.asarray(progressive.draw(columns=4))[-66:-2, -66:-2][::8, ::8]
    expected = small_pipeline(seeds=[1], num_inference_steps=30).images[0]
    assert np.abs(last.astype(int) - np.asarray(expected)).max() <= 1


def test_an_animation_of_progressive_generation(tmp_path, small_pipeline):
    made = progressive_generation(small_pipeline, [0, 1], num_inference_steps=7)
    save_animation(made.frames(), tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames == 8


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda pipe, x: progressive_generation(pipe, []), "at least 1 seed, got 0"),
        (lambda pipe, x: progressive_generation(pipe, [0], points=0), "points"),
        (lambda pipe, x: progressive_generation(pipe, [0], batch_size=0), "batch_size"),
        (lambda pipe, x: progressive_generation(pipe, [0], num_inference_steps=0), "got 0"),
        (lambda pipe, x: progressive_generation(pipe, [0], class_labels=1), "class-conditional"),
        (lambda pipe, x: shared_latents(pipe, [0]), "at least 2 seeds, got 1"),
        (lambda pipe, x: shared_latents(pipe, [0, 1], ts=[]), "ts is empty"),
        (lambda pipe, x: shared_latents(pipe, [0, 1], ts=[1001]), "0 to 1000, got 1001"),
        (lambda pipe, x: shared_latents(with_sampler(pipe, "ddim"), [0, 1]), "DDIMScheduler is deterministic"),
        (lambda pipe, x: interpolate(pipe, x[0], x[1], -1), "0 to 1000, got -1"),
        (lambda pipe, x: interpolate(pipe, x[0], x[1], 0.5), "0 to 1000, got 0.5"),
        (lambda pipe, x: interpolate(pipe, x[0], x[1], lambdas=[1.1]), "lambdas"),
        (lambda pipe, x: interpolate(pipe, x[0], x[1], lambdas=[math.nan]), "lambdas"),
        (lambda pipe, x: interpolate(pipe, x[0], x[1], lambdas=[]), "lambdas"),
        (lambda pipe, x: interpolate(pipe, x[:2], x[:3]), "2 first and 3 second images and 2 seeds"),
        (lambda pipe, x: interpolate(pipe, x[:2], x[:2], seeds=[1]), "2 second images and 1 seed$"),
        (lambda pipe, x: interpolate(pipe, x[:0], x[:0]), "give at least one image"),
        (lambda pipe, x: interpolate(pipe, x[0, :, :4], x[1]), "shape"),
        (lambda pipe, x: coarse_to_fine(pipe, x[:2], x[2:4]), "2 first and 2 second images and 1 seed"),
        (lambda pipe, x: coarse_to_fine(pipe, x[0], x[1], []), "ts is empty"),
    ],
)
def test_bad_arguments(small_pipeline, digits, monkeypatch, draw, message):
    monkeypatch.setattr(small_pipeline.unet, "forward", None)  # nothing may be sampled
    with pytest.raises(ValueError, match=message):
        draw(small_pipeline, digits)


def test_a_sampler_that_keeps_its_prediction_to_itself(small_pipeline):
    pipe = DDPMPipeline(small_pipeline.unet, diffusers.DPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler does not return the x_0"):
        progressive_generation(pipe, [0], num_inference_steps=5)


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def folder(tmp_path, small_pipeline, digits):
    """A model, four images, one damaged one."""
    small_pipeline.save_pretrained(tmp_path / "model")
    for i in range(4):
        Image.fromarray(digits[i, 0].numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_text("no image")
    return tmp_path


def sample(folder, text: str) -> int:
    arguments = text.replace("{}", str(folder)).split()
    return cli.main(["sample", "--model", str(folder / "model"), *arguments])


@pytest.mark.parametrize(
    "text",
    [
        "--figure progressive --seeds 0-2 --animation {}/new/x.gif",
        "--figure progressive --seeds 0 --sampler ddim --animation {}/new/x.webp",
        "--figure shared_latents --seeds 0-3",
        "--figure interpolation --images {}/0.png {}/1.png {}/2.png {}/3.png",
        "--figure interpolation --dataset digits --t 250 --seeds 5,6",
        "--figure coarse_to_fine --images {}/0.png {}/1.png",
        "--figure coarse_to_fine --train_data_dir {}/pictures --seeds 3",
    ],
)
def test_figures_from_the_command_line(folder, capsys, text):
    (folder / "pictures").mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(folder / name, folder / "pictures")
    for _ in range(2):  # and again, over what is there
        assert sample(folder, f"{text} --num_inference_steps 5 --output {{}}/new/figure.png") == 0
    out = capsys.readouterr().out
    assert f"wrote {folder}/new/figure.png" in out
    with Image.open(folder / "new" / "figure.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 200
    names = {path.name for path in (folder / "new").iterdir()}
    assert names == {"figure.png"} | ({text.rpartition("/")[2]} if "--animation" in text else set())


def test_the_command_line_draws_what_the_functions_do(folder, small_pipeline, digits):
    assert sample(folder, "--figure interpolation --dataset digits --num_inference_steps 5 --output {}/x.png") == 0
    expected = interpolate(small_pipeline, digits[0:8:2], digits[1:8:2], seeds=range(4), num_inference_steps=5)
    assert np.array_equal(np.asarray(Image.open(folder / "x.png")), np.asarray(expected.draw()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--figure progresive", "unknown --figure 'progresive' (did you mean 'progressive'?)"),
        ("--figure interpolation", "give --images A.png B.png"),
        ("--figure interpolation --images {}/0.png", "pairs of images"),
        ("--figure interpolation --images {}/0.png {}/1.png {}/2.png", "got 3"),
        ("--figure interpolation --images {}/0.png {}/1.png --seeds 0,1", "each of the 2 seeds, got 2"),
        ("--figure interpolation --images {}/0.png {}/9.png", "9.png: No such file"),
        ("--figure interpolation --images {}/0.png {}/bad.png", "bad.png: not an image"),
        ("--figure interpolation --images {}/0.png {}/1.png --dataset digits", "got images and dataset"),
        ("--figure interpolation --dataset digts", "did you mean 'digits'?"),
        ("--figure interpolation --dataset digits --seeds 0-9999", "too few for 10000 pairs"),
        ("--figure interpolation --dataset digits --t 1001", "0 to 1000, got 1001"),
        ("--figure coarse_to_fine --images {}/0.png {}/1.png {}/2.png {}/3.png", "one pair"),
        ("--figure coarse_to_fine --dataset digits --seeds 0,1", "one pair"),
        ("--figure progressive --images {}/0.png {}/1.png", "not with progressive"),
        ("--figure progressive --animation {}/x.mp4", "x.mp4"),
        ("--figure progressive --animation {}/new/figure.png", "same file"),
        ("--figure progressive --animation /proc/nowhere/x.gif", "cannot write to --animation /proc"),
        ("--figure shared_latents --animation {}/x.gif", "not with shared_latents"),
        ("--figure shared_latents --seeds 1", "at least 2 seeds"),
        ("--figure progressive --output {}/figure", "FILE.png"),
        ("--figure progressive --output /proc/nowhere/x.png", "cannot write to --output /proc"),
        ("--figure progressive --output {}/0.png/x.png", "cannot write"),
        ("--figure progressive --num_inference_steps 0", "got 0"),
        ("--figure progressive --class_labels 1", "not class-conditional"),
        ("--animation {}/x.gif", "goes with --figure progressive"),
        ("--dataset digits", "goes with --figure interpolation or coarse_to_fine"),
    ],
)
def test_mistakes_are_refused_before_anything_is_sampled(folder, capsys, monkeypatch, text, words):
    monkeypatch.setattr(UNet2DModel, "forward", None)
    before = sorted(folder.iterdir())
    output = "" if "--output" in text else " --output {}/new/figure.png"
    assert sample(folder, text + output) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert words in err
    assert sorted(folder.iterdir()) == before
