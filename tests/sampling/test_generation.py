"""Seeds to files."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import DIGITS_MODEL, SMALL_NETWORK, gaussian_pipeline, make_small_unet
from diffusers.models.unets.unet_2d import UNet2DOutput
from oracles import GaussianData
from PIL import Image
from programs import run_ranks

import ddpm_hf.sampling.generation as generation
from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel
from ddpm_hf.data.datasets import load_digits
from ddpm_hf.pipelines.schedulers import set_timesteps
from ddpm_hf.sampling.generation import SAMPLERS, class_sequence, generate, parse_seeds, with_sampler, write_samples
from ddpm_hf.utils.errors import NotFiniteError, UserError


def test_seed_lists():
    assert parse_seeds("0-3") == [0, 1, 2, 3]
    assert parse_seeds("7") == [7]
    assert parse_seeds("5, 8-10,2") == [5, 8, 9, 10, 2]
    for wrong in ("", "99999999999999999999", "0-99999999999", "a", "1-", "-1", "3-1", "1,,2", "1,1", "0.5"):
        with pytest.raises(ValueError, match=r"seed|range"):
            parse_seeds(wrong)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batches_do_not_change_images(small_pipeline, batch_size):
    def images(size):
        parts = list(generate(small_pipeline, range(7), batch_size=size, num_inference_steps=10))
        assert [seed for seeds, _ in parts for seed in seeds] == list(range(7))
        return torch.cat([part for _, part in parts])

    difference = (images(batch_size).int() - images(4).int()).abs().max()
    assert difference <= 1


def test_a_folder_is_continued(tmp_path, small_pipeline):
    options = {"num_inference_steps": 5}
    assert write_samples(small_pipeline, [0, 1, 1000], tmp_path / "out", **options) == 3
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    assert files == ["00000/00000000.png", "00000/00000001.png", "00001/00001000.png"]
    untouched = (tmp_path / "out" / files[0]).stat().st_mtime_ns
    assert write_samples(small_pipeline, [0, 1, 2, 1000], tmp_path / "out", **options) == 1
    assert (tmp_path / "out" / files[0]).stat().st_mtime_ns == untouched


def test_files_hold_what_the_pipeline_draws(tmp_path, small_pipeline):
    expected = small_pipeline(seeds=[4, 5], num_inference_steps=5).images
    write_samples(small_pipeline, [4, 5], tmp_path / "x.npz", num_inference_steps=5)
    write_samples(small_pipeline, [4, 5], tmp_path / "x", num_inference_steps=5)
    array = np.load(tmp_path / "x.npz", allow_pickle=False)["arr_0"]
    assert array.dtype == np.uint8
    for row, seed in enumerate((4, 5)):
        assert np.array_equal(array[row, ..., 0], np.asarray(expected[row]))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "x" / "00000" / f"{seed:08d}.png")), array[row, ..., 0])
    assert not list(tmp_path.rglob("*.partial"))


def test_samplers(small_pipeline):
    assert with_sampler(small_pipeline, "ddpm") is small_pipeline
    ddim = with_sampler(small_pipeline, "ddim")
    assert type(ddim.scheduler).__name__ == "DDIMScheduler"
    assert ddim.unet is small_pipeline.unet
    small = with_sampler(small_pipeline, "ddpm", "fixed_small", "trailing").scheduler.config
    assert (small.variance_type, small.timestep_spacing) == ("fixed_small", "trailing")
    for arguments, message in (
        (("euler",), "'euler'"),
        (("dpmsolver",), "did you mean 'dpmsolver\\+\\+'"),
        (("ddim", "fixed_small"), "is for the ddpm sampler"),
        (("ddpm", "learned"), "does not go with this network"),
        (("ddpm", "fixed_smal"), "'fixed_smal'"),
        (("ddpm", None, "middle"), "'middle'"),
    ):
        with pytest.raises(ValueError, match=message):
            with_sampler(small_pipeline, *arguments)


BETAS = np.linspace(1e-4, 0.02, 1000)
DATA = GaussianData(mean=0.2, std=0.4, betas=BETAS)


def moments(pipe, sampler, steps):
    """Mean and variance of what a deterministic sampler makes of N(0, 1), read off what becomes of 0 and of 1."""
    scheduler = with_sampler(pipe, sampler).scheduler
    scheduler.set_timesteps(steps)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    for t in scheduler.timesteps:
        slope, offset = DATA.expected_noise(int(t))
        x = scheduler.step(slope * x + offset, t, x).prev_sample
    zero, one = x.flatten().tolist()
    return (zero, (one - zero) ** 2), scheduler.timesteps.tolist()


def distance(found, expected):
    return max(abs(found[0] - expected[0]) / expected[1] ** 0.5, abs(found[1] / expected[1] - 1))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 20, 50, 100])
def test_deterministic_samplers_on_gaussian_data(small_unet, steps, spacing):
    """DDIM and DPM-Solver++ against their papers' updates written out again, and all against the exact flow."""
    pipe = DDPMPipeline(small_unet, DDPMScheduler(clip_sample=False, timestep_spacing=spacing))
    ddim, timesteps = moments(pipe, "ddim", steps)
    assert distance(ddim, DATA.ddim(timesteps)) < 1e-4  # stock's tables are float32
    solver, solver_timesteps = moments(pipe, "dpmsolver++", steps)
    assert distance(solver, DATA.dpm_solver_2m(solver_timesteps)) < 1e-3
    unipc, unipc_timesteps = moments(pipe, "unipc", steps)
    assert distance(unipc, DATA.exact_flow(unipc_timesteps)) < 0.06
    if spacing == "leading":  # trailing leaves out the last and hardest part of the flow, for all of them
        first_order = distance(ddim, DATA.exact_flow(timesteps))
        assert first_order < 8 / steps
        assert distance(solver, DATA.exact_flow(solver_timesteps)) < first_order / 3
        assert distance(unipc, DATA.exact_flow(unipc_timesteps)) < first_order / 3


@pytest.mark.parametrize(
    ("sampler", "spacing", "steps"), [("dpmsolver++", "linspace", 1000), ("unipc", "leading", 600), ("ddim", None, 2)]
)
def test_chains_that_stock_rounds_wrongly(sampler, spacing, steps):
    """Stock's `leading` spacing rounds T / K down, its `linspace` repeats itself where K is near T."""
    pipe = gaussian_pipeline(DDPMScheduler(clip_sample=False), DATA)
    stock = with_sampler(pipe, sampler, timestep_spacing=spacing).scheduler
    stock.set_timesteps(steps)
    assert stock.timesteps[0] < 700 or len(stock.timesteps.unique()) < steps
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    made = with_sampler(pipe, sampler, timestep_spacing=spacing)
    *_, last = made.denoise(x, num_inference_steps=steps)
    zero, one = last.prev_sample.flatten().tolist()
    expected = (DATA.ddim if sampler == "ddim" else DATA.exact_flow)(made.scheduler.timesteps.tolist())
    assert distance((zero, (one - zero) ** 2), expected) < 0.01


def test_one_spacing_that_cannot_start_is_refused(small_pipeline):
    with pytest.raises(
        UserError, match="from noise at t=500 with num_inference_steps=2; use timestep_spacing='trailing'"
    ):
        with_sampler(small_pipeline, "ddim", timestep_spacing="leading")(seeds=[0], num_inference_steps=2)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("sampler", "error"), [("heun", 0.05), ("deis", 0.08), ("sa_solver", 0.12)])
def test_further_samplers_on_gaussian_data(sampler, spacing, error):
    """At 50 network evaluations, against the data: Heun's flow, DEIS's, and SA-Solver's random path in moments."""
    pipe = gaussian_pipeline(DDPMScheduler(clip_sample=False, timestep_spacing=spacing), DATA)
    x = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean()) / x.std()
    made = with_sampler(pipe, sampler)
    steps = 25 if sampler == "heun" else 50
    set_timesteps(made.scheduler, steps)
    *_, last = made.denoise(x * made.scheduler.init_noise_sigma, num_inference_steps=steps)
    found = last.prev_sample.mean().item(), last.prev_sample.var().item()
    assert distance(found, (DATA.mean, DATA.std**2)) < 0.15
    assert distance(found, DATA.exact_flow(list(dict.fromkeys(made.scheduler.timesteps.int().tolist())))) < error


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 150), ("linspace", 70)])
def test_stocks_own_ddim_step_fails_where_steps_differ(small_pipeline, spacing, steps):
    """Stock's DDIM steps T // K down; its own closed form shows that too much variance comes of it elsewhere."""
    pipe = DDPMPipeline(small_pipeline.unet, DDPMScheduler(clip_sample=False, timestep_spacing=spacing))
    found, timesteps = moments(pipe, "ddim", steps)
    assert distance(found, DATA.ddim(timesteps)) > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_clips_as_the_pipeline_does(small_unet, sampler):
    def last(clip):
        pipe = with_sampler(DDPMPipeline(small_unet, DDPMScheduler(clip_sample=clip)), sampler)
        *_, step = pipe.progressive(seeds=[0, 1], num_inference_steps=10)
        return step.prev_sample.abs().max().item()  # the last step gives the predicted x_0

    end = 1.05 if sampler in ("deis", "sa_solver") else 1 + 1e-5  # stock's end at the noise of t = 0
    assert last(True) <= end
    assert last(False) > 1.1


def test_a_folder_of_other_images_is_not_mixed(tmp_path, small_pipeline):
    write_samples(small_pipeline, [0, 1], tmp_path / "out", num_inference_steps=5)
    with pytest.raises(ValueError, match="other num_inference_steps"):
        write_samples(small_pipeline, [0, 2], tmp_path / "out", num_inference_steps=6)
    with torch.no_grad():
        small_pipeline.unet.conv_out.bias.add_(1)
    with pytest.raises(ValueError, match="other weights"):
        write_samples(small_pipeline, [0, 2], tmp_path / "out", num_inference_steps=5)


def test_classes_by_name_and_number_interleaved():
    pipe = DDPMPipeline(make_small_unet(num_class_embeds=3, _class_names=["cats", "dogs"]), DDPMScheduler())
    assert class_sequence(pipe, "cats, 1", 3) == [0, 1, 0]
    assert class_sequence(pipe, None, 3) is None
    with pytest.raises(ValueError, match="'cows' is no class of this network; it has cats, dogs"):
        class_sequence(pipe, "cows", 1)


class Stop(Exception):
    """In place of a Ctrl-C."""


@pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
def test_an_interrupted_run_resumes(tmp_path, small_pipeline, monkeypatch, name):
    options = {"num_inference_steps": 3, "batch_size": 2}
    write_samples(small_pipeline, range(6), tmp_path / f"whole{name}", **options)
    real, calls = generation.generate, []

    def breaks(pipe, seeds, **options):
        for i, batch in enumerate(real(pipe, seeds, **options)):
            calls.append(batch[0])
            if i == 2:
                raise Stop
            yield batch

    monkeypatch.setattr(generation, "generate", breaks)
    with pytest.raises(Stop):
        write_samples(small_pipeline, range(6), tmp_path / name, **options)
    assert not (tmp_path / name).is_file()  # one file is there when it is complete
    assert write_samples(small_pipeline, range(6), tmp_path / name, **options) == 2
    assert calls[-1] == [4, 5]
    if name == "out":
        whole, again = ([p.read_bytes() for p in sorted((tmp_path / x).rglob("*.png"))] for x in ("wholeout", "out"))
        assert whole == again
        assert len(whole) == 6
    else:
        assert (tmp_path / name).read_bytes() == (tmp_path / f"whole{name}").read_bytes()
        assert [p.name for p in tmp_path.glob(".*")] == []


def test_outputs_that_cannot_be_are_refused_before_anything_is_drawn(tmp_path, small_pipeline, monkeypatch):
    monkeypatch.setattr(DDPMPipeline, "denoise", lambda *_, **__: pytest.fail("it drew"))
    (tmp_path / "a.npz").mkdir()
    (tmp_path / "file").write_text("")
    for output, message in (("a.npz", "is a folder"), ("file", "is a file"), ("x.jpg", "FILE.png or FILE.npz")):
        with pytest.raises(ValueError, match=message):
            write_samples(small_pipeline, [0], tmp_path / output)
    with pytest.raises(ValueError, match="this one is not"):
        write_samples(small_pipeline, [0], tmp_path / "guided.png", guidance_scale=3.0)
    with pytest.raises(OSError, match="file"):
        write_samples(small_pipeline, [0], tmp_path / "file" / "inside")
    for options in ({"eta": 7.0}, {"eta": 0.5}):
        with pytest.raises(ValueError, match="eta"):
            write_samples(small_pipeline, [0], tmp_path / "eta.png", **options)
    two = DDPMPipeline(make_small_unet(in_channels=2, out_channels=2), DDPMScheduler())
    with pytest.raises(ValueError, match="2 channels are no PNGs"):
        write_samples(two, [0], tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "file"]


def test_images_of_other_classes_are_not_mixed(tmp_path):
    pipe = DDPMPipeline(make_small_unet(num_class_embeds=3), DDPMScheduler())
    write_samples(pipe, [0, 1], tmp_path / "out", num_inference_steps=2, class_labels=[0, 1])
    write_samples(pipe, [1, 2], tmp_path / "out", num_inference_steps=2, class_labels=[1, 2])
    with pytest.raises(ValueError, match="other class_labels"):
        write_samples(pipe, [2, 3], tmp_path / "out", num_inference_steps=2, class_labels=[0, 1])


def test_digits_are_the_same_for_every_batch_size_and_number_of_processes(tmp_path):
    """Bit for bit, on one thread per process (`OMP_NUM_THREADS=1`, see conftest)."""
    pipe = with_sampler(DDPMPipeline.from_pretrained(DIGITS_MODEL), "ddpm", "fixed_small")
    options = {"num_inference_steps": 20}
    one_by_one = torch.cat([images for _, images in generate(pipe, range(16), batch_size=1, **options)])
    assert len(one_by_one.flatten(1).unique(dim=0)) == 16
    for batch_size in (4, 16):
        batches = torch.cat([images for _, images in generate(pipe, range(16), batch_size=batch_size, **options)])
        assert torch.equal(batches, one_by_one)

    command = [
        "-m",
        "ddpm_hf.cli",
        "sample",
        "--model",
        str(DIGITS_MODEL),
        "--variance_type",
        "fixed_small",
    ]
    command += ["--num_inference_steps", "20", "--seeds", "0-15", "--batch_size", "3"]
    command += ["--output", str(tmp_path / "two.npz")]
    ends = run_ranks(command, command)
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-2000:]
    assert "".join(end.stdout for end in ends).count("wrote 16 images") == 1
    two = torch.from_numpy(np.load(tmp_path / "two.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert torch.equal(two, one_by_one)


def test_a_file_without_content_is_drawn_again_and_strangers_are_left_alone(tmp_path, small_pipeline):
    options = {"num_inference_steps": 3, "epsilon_scale": (1.02, 0.0)}  # a list in sampling.json
    write_samples(small_pipeline, [0, 1], tmp_path / "v1.0", **options)
    whole = (tmp_path / "v1.0" / "00000" / "00000001.png").read_bytes()
    (tmp_path / "v1.0" / "00000" / "00000001.png").write_bytes(b"")
    (tmp_path / "v1.0" / "00000" / "00000007-copy.png").write_bytes(b"mine")
    assert write_samples(small_pipeline, [0, 1], tmp_path / "v1.0", **options) == 1
    assert (tmp_path / "v1.0" / "00000" / "00000001.png").read_bytes() == whole
    (tmp_path / "v1.0" / "sampling.json").write_text("{")
    with pytest.raises(ValueError, match=r"no sampling\.json that can be read"):
        write_samples(small_pipeline, [0, 2], tmp_path / "v1.0", **options)


def test_each_seed_keeps_its_own_image_when_a_run_resumes(tmp_path, small_pipeline):
    """Some are there, the others are drawn: every one from its own image and mask."""
    pipe, digits = with_sampler(small_pipeline, "ddim"), load_digits("train").images
    masks = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    options = {"num_inference_steps": 5, "resample_times": 1}
    rows = [0, 2]
    write_samples(pipe, rows, tmp_path / "out", image=digits[rows], mask_image=masks[rows], **options)
    assert write_samples(pipe, range(4), tmp_path / "out", image=digits[:4], mask_image=masks, **options) == 2
    for seed in range(4):
        expected = pipe(seeds=[seed], image=digits[seed], mask_image=masks[seed], **options).images[0]
        found = np.asarray(Image.open(tmp_path / "out" / "00000" / f"{seed:08d}.png"))
        assert np.array_equal(found, np.asarray(expected))
    with pytest.raises(ValueError, match="image: got 3 for 4 images"):
        write_samples(pipe, range(4), tmp_path / "other", image=digits[:3], strength=0.5)
    assert not (tmp_path / "other").exists()


def test_ddpm_is_ddpm_whatever_the_model_was_saved_with(small_unet):
    saved = DDPMPipeline(small_unet, diffusers.DDIMScheduler(num_train_timesteps=50, beta_schedule="linear"))
    pipe = with_sampler(saved, "ddpm")
    assert type(pipe.scheduler) is DDPMScheduler
    assert torch.allclose(pipe.scheduler.betas.float(), saved.scheduler.betas, rtol=1e-6)
    assert with_sampler(saved, "ddpm", "fixed_large").scheduler.config.variance_type == "fixed_large"


def test_an_unmeasured_error_is_said_before_anything_is_drawn(tmp_path, small_unet):
    pipe = DDPMPipeline(small_unet, DDPMScheduler(num_train_timesteps=50, variance_type="optimal"))
    with pytest.raises(ValueError, match="ddpm-hf optimal_variance"):
        write_samples(pipe, [0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labels", [[0], [0, 1, 2]])
def test_as_many_labels_as_seeds(tmp_path, labels):
    pipe = DDPMPipeline(make_small_unet(num_class_embeds=3), DDPMScheduler(num_train_timesteps=10))
    with pytest.raises(ValueError, match=f"got {len(labels)} class_labels for 2 seeds"):
        list(generate(pipe, [0, 1], class_labels=labels))
    with pytest.raises(ValueError, match=f"got {len(labels)} class_labels for 2 seeds"):
        write_samples(pipe, [0, 1], tmp_path / "out", class_labels=labels)
    assert not list(tmp_path.iterdir())


def test_other_peoples_images_are_not_taken_for_samples(tmp_path, small_pipeline):
    (tmp_path / "00000").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "00000" / "00000000.png")
    with pytest.raises(ValueError, match=r"holds images, and no sampling\.json"):
        write_samples(small_pipeline, [0, 1], tmp_path, num_inference_steps=5)


def test_the_pipeline_keeps_its_progress_bar(small_pipeline):
    small_pipeline.set_progress_bar_config(desc="mine")
    list(generate(small_pipeline, [0], num_inference_steps=5))
    assert small_pipeline._progress_bar_config == {"desc": "mine"}


class FailsLater(UNet2DModel):
    """A network that is right for so many images, and NaN for the next ones."""

    good = 0

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        value = float("nan") if self.good < 0 else 0.1
        if int(timestep) == 0:
            self.good -= len(sample)
        return UNet2DOutput(sample=torch.full_like(sample, value))


@pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
def test_images_that_are_not_finite_are_not_written_and_the_good_ones_before_stay(tmp_path, name):
    pipe = DDPMPipeline(FailsLater(**SMALL_NETWORK), DDPMScheduler(num_train_timesteps=2))
    output = tmp_path / name
    pipe.unet.good = -1
    with pytest.raises(NotFiniteError, match="the images are not finite"):
        write_samples(pipe, [0, 1, 2, 3], output, batch_size=2)
    assert list(tmp_path.iterdir()) == []
    pipe.unet.good = 1  # the first batch of two, and no more
    with pytest.raises(NotFiniteError):
        write_samples(pipe, [0, 1, 2, 3], output, batch_size=2)
    assert not output.is_file()
    pipe.unet.good = 100
    assert write_samples(pipe, [0, 1, 2, 3], output, batch_size=2) == 2


def test_a_strength_that_is_no_number(small_pipeline):
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match="strength must be between 0 and 1, got nan"):
        list(generate(small_pipeline, [0], image=image, strength=float("nan")))
