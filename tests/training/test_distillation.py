"""Distillation: the teacher's flow, the loss, a student's run, what a student can do, and what is refused."""

import json

import diffusers
import pytest
import torch
from conftest import SMALL_NETWORK, gaussian_pipeline, make_small_unet
from diffusers.models.unets.unet_2d import UNet2DOutput
from oracles import GaussianData
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline, DDPMScheduler, Trainer, UNet2DModel
from ddpm_hf.cli import main
from ddpm_hf.cli.train import parse_distillation_config
from ddpm_hf.diffusion.noise_schedule import make_betas
from ddpm_hf.sampling.generation import with_sampler
from ddpm_hf.training.configuration import DistillationConfig
from ddpm_hf.training.distillation import Distillation, teacher_times
from ddpm_hf.utils.errors import UserError

CLASSES = {"num_class_embeds": 4, "_class_names": ["a", "b", "c"], "_null_class": 3}


def save_teacher(folder, unet=None, **settings) -> str:
    DDPMPipeline(unet or make_small_unet(), DDPMScheduler(**settings)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def load(teacher, **settings) -> Distillation:
    return Distillation.load(DistillationConfig(**{"steps": 2, "teacher_steps": 4, **settings}, model=teacher))


def distil(teacher, output, **settings):
    quick = {"max_train_steps": 4, "total_batch_size": 4, "checkpointing_steps": 2, "num_sample_images": 4}
    steps = {"steps": 2, "teacher_steps": 4}
    config = DistillationConfig(**{**quick, **steps, **settings}, model=teacher, output_dir=str(output))
    return Trainer(config).train()


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("student") / "run"
    distil(teacher, folder)
    return folder


# ---------------------------------------------------------------------- mathematics

STOPS = [999, 749, 499, 249]


def gaussian_distillation(stops: list[int], per_step: int) -> tuple[Distillation, GaussianData]:
    data = GaussianData(0.2, 0.5, make_betas("linear", 1000, 1e-4, 0.02))
    pipe = gaussian_pipeline(DDPMScheduler(clip_sample=False), data)
    return Distillation("teacher", None, "", pipe, stops, teacher_times(stops, per_step), 1.0), data


def zero_and_one() -> torch.Tensor:
    """What becomes of them says what an affine map is."""
    return torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)


def stock_ddim(**settings) -> diffusers.DDIMScheduler:
    process = {"beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction", "clip_sample": False}
    return diffusers.DDIMScheduler(**process, timestep_spacing="trailing", set_alpha_to_one=True, **settings)


@pytest.mark.parametrize(("stops", "per_step"), [([999], 8), (STOPS, 4), ([999, 499], 1)])
def test_the_teacher_s_flow_of_gaussian_data_is_the_closed_form(stops, per_step):
    distillation, data = gaussian_distillation(stops, per_step)
    points = distillation.trajectory(zero_and_one())
    mean, variance = data.dpm_solver_2m(distillation.times)
    assert points[-1][0].mean().item() == pytest.approx(mean, abs=1e-5)
    assert (points[-1][1] - points[-1][0]).mean().square().item() == pytest.approx(variance, rel=1e-4)
    assert points.shape == (len(stops) + 1, 2, 1, 8, 8)
    assert torch.equal(points[0], zero_and_one())


def exact_step(data: GaussianData, t: int, s: int) -> tuple[float, float]:
    """(slope, offset) of the exact flow from x_t to x_s, which maps quantiles to quantiles; s = -1 is the data."""
    (m_t, v_t), (m_s, v_s) = data.marginal(t), (data.mean, data.std**2) if s < 0 else data.marginal(s)
    slope = (v_s / v_t) ** 0.5
    return slope, m_s - slope * m_t


def test_targets_of_gaussian_data_are_the_v_of_the_exact_segments():
    distillation, data = gaussian_distillation(STOPS, 60)
    points = distillation.trajectory(zero_and_one())
    for t, s, x_t, v in zip(STOPS, [*STOPS[1:], -1], points, distillation.targets(points), strict=False):
        slope, offset = exact_step(data, t, s)
        # x_s = (alpha_s alpha_t + sigma_s sigma_t) x_t + (sigma_s alpha_t - alpha_s sigma_t) v, a rotation
        a_t, a_s = data.alpha_bar[t], 1.0 if s < 0 else data.alpha_bar[s]
        along = (a_s * a_t) ** 0.5 + ((1 - a_s) * (1 - a_t)) ** 0.5
        across = ((1 - a_s) * a_t) ** 0.5 - (a_s * (1 - a_t)) ** 0.5
        torch.testing.assert_close(v, ((slope - along) * x_t + offset) / across, rtol=0.01, atol=0.02)


def test_a_perfect_student_of_gaussian_data_samples_the_exact_flow(monkeypatch):
    distillation, data = gaussian_distillation(STOPS, 60)
    points = distillation.trajectory(zero_and_one())
    v = dict(zip(STOPS, distillation.targets(points), strict=True))
    v = {t: ((y[1] - y[0]) / (x[1] - x[0]), y[0], x[0]) for (t, y), x in zip(v.items(), points, strict=False)}

    def forward(self, x_t, t, class_labels=None):
        slope, y_0, x_0 = v[int(t)]
        return UNet2DOutput(sample=y_0 + slope * (x_t - x_0))

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("ddpm_hf.pipelines.pipeline_ddpm.standard_normal", lambda *_: noise)
    pipe = DDPMPipeline(make_small_unet(_distilled_steps=4), stock_ddim())
    slope, offset = exact_step(data, 999, -1)
    expected = ((slope * noise + offset) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipe(batch_size=2, output_type="pt").images, expected, rtol=0, atol=0.01)


def test_stock_s_steps_with_the_targets_land_on_the_teacher_s_points():
    distillation, _ = gaussian_distillation(STOPS, 4)
    points = distillation.trajectory(torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    stock = stock_ddim()
    stock.set_timesteps(4)
    assert stock.timesteps.tolist() == STOPS
    for t, x_t, v, x_s in zip(STOPS, points, distillation.targets(points), points[1:], strict=False):
        torch.testing.assert_close(stock.step(v, t, x_t).prev_sample, x_s, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_error_of_v():
    distillation, _ = gaussian_distillation(STOPS, 4)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    points = distillation.trajectory(noise)
    output = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = []

    def unet(x_t, t):
        seen.append((x_t, t))
        return UNet2DOutput(sample=output)

    loss = distillation.loss(unet, None, torch.zeros(3, 1, 8, 8), torch.zeros(3).long(), noise)
    ((x_t, t),) = seen
    assert torch.equal(x_t.view(4, 3, 1, 8, 8), points[:4])
    assert t.tolist() == [stop for stop in STOPS for _ in range(3)]
    errors = (output.view(4, 3, 1, 8, 8) - distillation.targets(points)).square()
    torch.testing.assert_close(loss, errors.mean((0, 2, 3, 4)))


def test_times_of_the_teacher():
    assert teacher_times([999, 499], 2) == [999, 749, 499, 249]
    assert teacher_times([999, 499], 1) == [999, 499]
    assert teacher_times([7, 5, 3, 1], 2) == [7, 6, 5, 4, 3, 2, 1, 0]


# ---------------------------------------------------------------------- a run


def test_a_resumed_distillation_ends_in_the_same_bits(teacher, student, tmp_path):
    (tmp_path / "run").mkdir()
    (student / "checkpoint-2").rename(tmp_path / "run" / "checkpoint-2")
    distil(teacher, tmp_path / "run", resume_from_checkpoint="latest")
    (tmp_path / "run" / "checkpoint-2").rename(student / "checkpoint-2")
    for name in ("model", "ema", "optimizer"):
        one, two = (load_file(f / "checkpoint-4" / f"{name}.safetensors") for f in (student, tmp_path / "run"))
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_a_run_starts_from_its_teacher_and_is_not_resumed_with_another(teacher, student, tmp_path):
    first = Trainer(DistillationConfig(model=teacher, output_dir=str(tmp_path / "new")))
    weights = DDPMPipeline.from_pretrained(teacher).unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.unet.state_dict().items())
    other = save_teacher(tmp_path / "other", make_small_unet(1))
    with pytest.raises(UserError, match="was trained with"):
        distil(other, student, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="was trained with distillation"):
        distil(teacher, student, teacher_steps=6, resume_from_checkpoint="latest")


def test_a_class_conditional_teacher(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", make_small_unet(**CLASSES))
    distillation = load(teacher, guidance_scale=2.0)
    images = distillation.images()
    assert images.labels.bincount().tolist() == [len(images) // 4] * 4  # "no class" is one
    noise = torch.randn(1, 1, 8, 8).expand(2, 1, 8, 8)
    (a, b), (_, plain) = (d.trajectory(noise, torch.tensor([3, 1]))[-1] for d in (distillation, load(teacher)))
    assert not torch.equal(a, b)  # another class
    assert not torch.equal(b, plain)  # guided
    pipe = distil(teacher, tmp_path / "student")
    assert pipe.unet.config["_class_names"] == ["a", "b", "c"]
    assert len(pipe(class_labels=["b", None], batch_size=2).images) == 2
    assert "- classes: 3" in (tmp_path / "student" / "README.md").read_text()
    with pytest.raises(UserError, match="a distilled model takes no eta, guidance_scale"):
        pipe(class_labels="a", guidance_scale=2.0)


def test_a_schedule_that_only_we_have_is_saved_for_stock(tmp_path):
    teacher = save_teacher(tmp_path, beta_schedule="jsd", num_train_timesteps=20, prediction_type="sample")
    distillation = load(teacher, steps=4, teacher_steps=8)
    stock = diffusers.DDIMScheduler(**distillation.preset.scheduler)
    expected = torch.from_numpy(DDPMScheduler(beta_schedule="jsd", num_train_timesteps=20).alpha_bar)
    torch.testing.assert_close(stock.alphas_cumprod.double(), expected, rtol=1e-5, atol=1e-6)
    points = distillation.trajectory(torch.randn(2, 1, 8, 8))  # from where alpha_bar is 0
    assert distillation.targets(points).isfinite().all()
    assert points[-1].abs().max() <= 1


# ---------------------------------------------------------------------- a student


def test_a_student_does_its_own_steps(student, tmp_path, capsys):
    pipe = DDPMPipeline.from_pretrained(student)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert with_sampler(pipe) is pipe
    calls = []
    pipe(seeds=[0], callback_on_step_end=lambda _, i, t, x: calls.append(t))
    assert calls == [999, 499]
    with pytest.raises(UserError, match="distilled for num_inference_steps=2, and can do no other number, got 3"):
        pipe(num_inference_steps=3)
    with pytest.raises(UserError, match="a distilled model takes no eta"):
        pipe(eta=1)
    sample = ["sample", "--model", str(student), "--seeds", "0-4", "--batch_size"]
    assert main([*sample, "2", "--output", str(tmp_path / "two")]) == 0
    assert json.loads((tmp_path / "two" / "sampling.json").read_text())["num_inference_steps"] == 2
    assert main([*sample, "3", "--output", str(tmp_path / "three")]) == 0
    images = [sorted(folder.rglob("*.png")) for folder in (tmp_path / "two", tmp_path / "three")]
    assert len(images[0]) == 5
    assert [a.read_bytes() for a in images[0]] == [b.read_bytes() for b in images[1]]
    card = (student / "README.md").read_text()
    assert "num_inference_steps=2)" in card
    assert "trained on **images made by teacher" in card
    assert main([*sample, "3", "--output", str(tmp_path / "four"), "--sampler", "ddim"]) == 2
    assert "a distilled model has one sampler, its own" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(student), "--dataset", "digits", "--metrics", "nll"]) == 2
    assert "a DDIMScheduler, which has no likelihood" in capsys.readouterr().err


def test_the_number_of_steps_stays_with_the_network(student, tmp_path):
    diffusers.DDPMPipeline.from_pretrained(student).save_pretrained(tmp_path / "by_stock")
    ours = DDPMPipeline.from_pretrained(tmp_path / "by_stock")
    other = DDPMPipeline(ours.unet, stock_ddim())
    for pipe in (ours, other):
        assert pipe.distilled_steps == 2
        assert pipe.checked_steps(None) == 2
    same = [pipe(seeds=[3], output_type="pt").images for pipe in (DDPMPipeline.from_pretrained(student), ours, other)]
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])


def test_a_checkpoint_of_a_student_is_a_student(student, tmp_path, capsys):
    last, published = (DDPMPipeline.from_pretrained(f) for f in (student / "checkpoint-4", student))
    assert type(last.scheduler) is diffusers.DDIMScheduler
    assert torch.equal(*(pipe(seeds=[1], output_type="pt").images for pipe in (last, published)))
    publish = ["publish", str(student / "checkpoint-2"), "--output", str(tmp_path / "early")]
    assert main([*publish, "--sampler", "ddim"]) == 2
    assert "leave out --evaluate, --sampler" in capsys.readouterr().err
    assert main([*publish, "--num_sample_images", "2"]) == 0
    assert DDPMPipeline.from_pretrained(tmp_path / "early").distilled_steps == 2
    assert "from t = 999, 499 of 4 steps of the teacher" in (tmp_path / "early" / "README.md").read_text()
    assert main(["ema", str(student), "--sigma_rel", "0.1", "--output", str(tmp_path / "ema")]) == 0
    averaged = DDPMPipeline.from_pretrained(tmp_path / "ema")
    assert (averaged.distilled_steps, type(averaged.scheduler)) == (2, diffusers.DDIMScheduler)


def test_the_configuration_beside_a_student_resumes_it(student, capsys):
    config = parse_distillation_config(["--config", str(student / "training_config.yaml")])
    assert (config.steps, config.teacher_steps, config.total_batch_size) == (2, 4, 4)
    assert main(["train", "--config", str(student / "training_config.yaml")]) == 2
    assert "unknown key 'model'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "network", "flags", "sentence"),
    [
        ({}, {}, ["--steps", "3", "--teacher_steps", "6"], "--steps must divide the teacher's T = 1000, and"),
        ({}, {}, ["--teacher_steps", "15"], "--teacher_steps, which is at most T; got 4 and 15"),
        ({"num_train_timesteps": 8}, {}, ["--steps", "4"], "which is at most T; got 4 and 16"),
        ({"variance_type": "learned_range"}, {"out_channels": 2}, [], "predicts its variance, which cannot be"),
        ({"prediction_type": "posterior_mean"}, {}, [], "predicts the posterior's mean, which cannot be distilled"),
        ({}, {}, ["--guidance_scale", "2"], "--class_labels and --guidance_scale are for class-conditional networks"),
        ({}, {}, ["--dataset", "digits"], "unknown flag --dataset"),
    ],
)
def test_what_cannot_be_distilled(tmp_path, capsys, settings, network, flags, sentence):
    teacher = save_teacher(tmp_path / "teacher", UNet2DModel(**{**SMALL_NETWORK, **network}), **settings)
    assert main(["distill", "--model", teacher, "--output", str(tmp_path / "student"), *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_a_teacher_has_to_be_named_there_and_no_student(tmp_path, student, capsys):
    for flags, sentence in (
        ([], "--model names the teacher"),
        (["--model", str(tmp_path / "none")], "cannot load --model"),
        (["--model", str(student)], "is distilled already"),
    ):
        assert main(["distill", "--output", str(tmp_path / "new"), *flags]) == 2
        assert sentence in capsys.readouterr().err
