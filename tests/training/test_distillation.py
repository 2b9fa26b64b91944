"""Distillation: the teacher's flow, the loss, a student's run, what a student can do, and what is refused."""

import json
import re
import shutil
from itertools import pairwise
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL_NETWORK, gaussian_pipeline, make_small_unet
from diffusers.models.unets.unet_2d import UNet2DOutput
from huggingface_hub import ModelCard
from oracles import GaussianData
from programs import run_program
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline, DDPMScheduler, Trainer, UNet2DModel
from ddpm_hf.cli import main
from ddpm_hf.cli.train import distillation_parser, parse_distillation_config
from ddpm_hf.diffusion.noise_schedule import make_betas
from ddpm_hf.hub.model_card import CardFacts, ModelFacts, make_card
from ddpm_hf.sampling.generation import with_sampler
from ddpm_hf.training.configuration import DistillationConfig
from ddpm_hf.training.distillation import Distillation, evenly_in_angle
from ddpm_hf.utils.errors import UserError
from ddpm_hf.utils.randomness import SeededNoise, derive_seed

QUICK = {"steps": 2, "teacher_steps": 4, "num_trajectories": 8}
CLASSES = {"num_class_embeds": 4, "_class_names": ["a", "b", "c"], "_null_class": 3}


def save_teacher(folder, unet=None, **settings) -> str:
    DDPMPipeline(unet or make_small_unet(), DDPMScheduler(**settings)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def load(teacher, **settings) -> Distillation:
    return Distillation.load(DistillationConfig(**{**QUICK, **settings}, model=teacher))


def distil(teacher, output, **settings):
    run = {"max_train_steps": 4, "total_batch_size": 4, "checkpointing_steps": 2, "num_sample_images": 4}
    config = DistillationConfig(**{**run, **QUICK, **settings}, model=teacher, output_dir=str(output))
    return Trainer(config).train()


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("student") / "run"
    distil(teacher, folder)
    return folder


# ---------------------------------------------------------------------- mathematics


def gaussian_distillation(K: int, teacher_steps: int) -> tuple[Distillation, GaussianData]:
    data = GaussianData(0.2, 0.5, make_betas("linear", 1000, 1e-4, 0.02))
    pipe = gaussian_pipeline(DDPMScheduler(clip_sample=False), data)
    times = evenly_in_angle(data.alpha_bar, teacher_steps)
    return Distillation("teacher", None, "", pipe, K, times, 1.0), data


def zero_and_one() -> torch.Tensor:
    """What becomes of them says what an affine map is."""
    return torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)


def targets(distillation: Distillation, points: torch.Tensor) -> list[torch.Tensor]:
    """v of each step."""
    one = torch.ones(points.shape[1], dtype=torch.long)
    return [distillation.target(x_t, x_s, one * k) for k, (x_t, x_s) in enumerate(pairwise(points))]


def stock_ddim(distillation: Distillation) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**distillation.preset.scheduler)


@pytest.mark.parametrize(("K", "teacher_steps"), [(1, 8), (4, 16), (2, 2)])
def test_the_teacher_s_flow_of_gaussian_data_is_the_closed_form(K, teacher_steps):
    distillation, data = gaussian_distillation(K, teacher_steps)
    points = distillation.trajectory(zero_and_one())
    mean, variance = data.dpm_solver_2m(distillation.times)
    assert points[-1][0].mean().item() == pytest.approx(mean, abs=1e-5)
    assert (points[-1][1] - points[-1][0]).mean().square().item() == pytest.approx(variance, rel=1e-4)
    assert points.shape == (K + 1, 2, 1, 8, 8)
    assert torch.equal(points[0], zero_and_one())


def exact_step(data: GaussianData, t: int, s: int) -> tuple[float, float]:
    """(slope, offset) of the exact flow from x_t to x_s, which maps quantiles to quantiles; s = -1 is the data."""
    (m_t, v_t), (m_s, v_s) = data.marginal(t), (data.mean, data.std**2) if s < 0 else data.marginal(s)
    slope = (v_s / v_t) ** 0.5
    return slope, m_s - slope * m_t


def test_targets_of_gaussian_data_are_the_v_of_the_exact_segments():
    distillation, data = gaussian_distillation(4, 200)
    points = distillation.trajectory(zero_and_one())
    times = evenly_in_angle(data.alpha_bar, 4)
    for t, s, x_t, v in zip(times, [*times[1:], -1], points, targets(distillation, points), strict=False):
        slope, offset = exact_step(data, t, s)
        # x_s = (alpha_s alpha_t + sigma_s sigma_t) x_t + (sigma_s alpha_t - alpha_s sigma_t) v, a rotation
        a_t, a_s = data.alpha_bar[t], 1.0 if s < 0 else data.alpha_bar[s]
        along = (a_s * a_t) ** 0.5 + ((1 - a_s) * (1 - a_t)) ** 0.5
        across = ((1 - a_s) * a_t) ** 0.5 - (a_s * (1 - a_t)) ** 0.5
        torch.testing.assert_close(v, ((slope - along) * x_t + offset) / across, rtol=0.01, atol=0.02)


def test_a_perfect_student_of_gaussian_data_samples_the_exact_flow(monkeypatch):
    distillation, data = gaussian_distillation(4, 200)
    points = distillation.trajectory(zero_and_one())
    v = dict(zip([999, 749, 499, 249], targets(distillation, points), strict=True))
    v = {t: ((y[1] - y[0]) / (x[1] - x[0]), y[0], x[0]) for (t, y), x in zip(v.items(), points, strict=False)}

    def forward(self, x_t, t, class_labels=None):
        slope, y_0, x_0 = v[int(t)]
        return UNet2DOutput(sample=y_0 + slope * (x_t - x_0))

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("ddpm_hf.pipelines.pipeline_ddpm.standard_normal", lambda *_: noise)
    pipe = DDPMPipeline(make_small_unet(_distilled_steps=4), stock_ddim(distillation))
    slope, offset = exact_step(data, 999, -1)
    expected = ((slope * noise + offset) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipe(batch_size=2, output_type="pt").images, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("K", [1, 3, 4])
def test_stock_s_steps_with_the_targets_land_on_the_teacher_s_points(K):
    distillation, data = gaussian_distillation(K, 12)
    points = distillation.trajectory(torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    stock = stock_ddim(distillation)
    stock.set_timesteps(K)
    T = K * (1000 // K)  # whose steps stock can make equally long
    assert stock.timesteps.tolist() == [T * k // K - 1 for k in range(K, 0, -1)]
    expected = torch.from_numpy(data.alpha_bar[evenly_in_angle(data.alpha_bar, K)])
    torch.testing.assert_close(stock.alphas_cumprod[stock.timesteps].double(), expected, rtol=1e-3, atol=1e-6)
    assert (stock.alphas_cumprod.diff() < 0).all()
    for t, x_t, v, x_s in zip(stock.timesteps, points, targets(distillation, points), points[1:], strict=False):
        torch.testing.assert_close(stock.step(v, t, x_t).prev_sample, x_s, rtol=1e-3, atol=1e-3)


def test_the_loss_is_the_error_of_v_at_the_timestep_that_is_drawn():
    distillation, _ = gaussian_distillation(4, 16)
    draw = torch.Generator().manual_seed(0)
    points = distillation.trajectory(torch.randn(5, 1, 8, 8, generator=draw))
    output, seen = torch.randn(5, 1, 8, 8, generator=draw), []

    def unet(x_t, t):
        seen.append((x_t, t))
        return UNet2DOutput(sample=output)

    t = torch.tensor([0, 249, 250, 700, 999])
    loss = distillation.loss(unet, None, points.transpose(0, 1).flatten(1, 2), t, torch.zeros(5, 1, 8, 8))
    ((x_t, at),) = seen
    assert at.tolist() == [249, 249, 499, 749, 999]
    which, v = [3, 3, 2, 1, 0], torch.stack(targets(distillation, points))
    assert torch.equal(x_t, torch.stack([points[k, i] for i, k in enumerate(which)]))
    errors = torch.stack([output[i] - v[k, i] for i, k in enumerate(which)]).square()
    torch.testing.assert_close(loss, errors.mean((1, 2, 3)))


def test_times_are_even_in_the_angle_of_signal_and_noise():
    cosine = np.cos(np.arange(1, 101) / 100 * np.pi / 2) ** 2  # the angle grows evenly with t
    assert evenly_in_angle(cosine, 4) == [99, 74, 49, 24]
    assert evenly_in_angle(cosine, 1) == [99]
    assert evenly_in_angle(cosine[:4], 4) == [3, 2, 1, 0]
    assert evenly_in_angle(np.full(4, 0.5), 3) == [2, 1, 0]  # all as near


def test_a_student_starts_where_its_teacher_is(teacher):
    distillation, own = load(teacher, steps=4), make_small_unet(1)
    distillation.initialize(own)
    x_t = torch.randn(4, 1, 8, 8)
    points = torch.tensor(evenly_in_angle(distillation.teacher.scheduler.alpha_bar, 4))
    with torch.no_grad():
        expected = distillation.teacher.unet(x_t, points).sample
        torch.testing.assert_close(own(x_t, torch.tensor([999, 749, 499, 249])).sample, expected, rtol=0, atol=1e-5)
    changed = [n for n, w in own.state_dict().items() if not torch.equal(w, distillation.teacher.unet.state_dict()[n])]
    assert changed == ["time_embedding.linear_2.weight"]


def test_trajectories_depend_on_seed_and_number_alone(teacher):
    one, other = load(teacher), load(teacher, num_trajectories=5)
    accelerator = Accelerator(cpu=True)
    images = one.trajectories(3, accelerator, 4).images
    assert images.shape == (8, 3, 8, 8)
    assert images.dtype == torch.float32
    torch.testing.assert_close(other.trajectories(3, accelerator, 1).images, images[:5], rtol=0, atol=1e-5)
    noise = SeededNoise([derive_seed(3, "trajectory", i) for i in range(8)]).normal((8, 1, 8, 8))
    torch.testing.assert_close(one.trajectory(noise).transpose(0, 1).flatten(1, 2), images, rtol=0, atol=1e-3)
    assert not torch.equal(one.trajectories(4, accelerator, 4).images[:, 0], images[:, 0])


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_share_the_trajectories(teacher, rank):
    distillation = load(teacher, num_trajectories=11)
    one = Accelerator(cpu=True)
    expected = distillation.trajectories(3, one, 4).images
    two = {"num_processes": 2, "process_index": rank, "gather": lambda own: torch.cat([own, own])}
    names = ("device", "mixed_precision", "is_main_process")
    images = distillation.trajectories(
        3, SimpleNamespace(**{n: getattr(one, n) for n in names}, **two), batch_size=1
    ).images
    own = [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7, 10]][rank]  # 4 of 8, and then half of the 3 that are left
    torch.testing.assert_close(images[own], expected[own], rtol=0, atol=1e-5)


def test_trajectories_are_made_by_deterministic_algorithms(teacher, tmp_path, monkeypatch):
    """As updates are on GPUs: a resumed run makes them again, and has to see the same bits."""
    seen, trajectory = [], Distillation.trajectory

    def recorded(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return trajectory(*arguments)

    monkeypatch.setattr("ddpm_hf.training.trainer.has_deterministic_algorithms", lambda device: True)
    monkeypatch.setattr(Distillation, "trajectory", recorded)
    Trainer(DistillationConfig(**QUICK, model=teacher, output_dir=str(tmp_path / "run")))
    assert set(seen) == {True}


def test_a_teacher_that_makes_nan_is_refused(tmp_path, capsys):
    unet = make_small_unet()
    torch.nn.init.constant_(unet.conv_out.weight, 3e38)  # finite, unlike its sums
    teacher = save_teacher(tmp_path / "teacher", unet)
    assert main(["distill", "--model", teacher, "--output", str(tmp_path / "student"), "--num_trajectories", "4"]) == 2
    assert "error: --model teacher makes NaN or infinities, in fp32" in capsys.readouterr().err


# ---------------------------------------------------------------------- a run


def test_a_resumed_distillation_ends_in_the_same_bits(teacher, student, tmp_path):
    (tmp_path / "run").mkdir()
    (student / "checkpoint-2").rename(tmp_path / "run" / "checkpoint-2")
    distil(teacher, tmp_path / "run", resume_from_checkpoint="latest")
    (tmp_path / "run" / "checkpoint-2").rename(student / "checkpoint-2")
    for name in ("model", "ema", "optimizer"):
        one, two = (load_file(f / "checkpoint-4" / f"{name}.safetensors") for f in (student, tmp_path / "run"))
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_a_run_is_not_resumed_with_another_teacher(teacher, student, tmp_path, monkeypatch):
    monkeypatch.setattr(Distillation, "trajectories", lambda *arguments: pytest.fail("the teacher made images"))
    other = save_teacher(tmp_path / "other", make_small_unet(1))
    with pytest.raises(UserError, match="was trained with"):
        distil(other, student, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="was trained with distillation") as error:
        distil(teacher, student, teacher_steps=6, resume_from_checkpoint="latest")
    assert "digest" not in str(error.value)  # what is the same is left out
    with pytest.raises(UserError, match="was trained with num_trajectories=8, and this run has 5;"):
        distil(teacher, student, num_trajectories=5, resume_from_checkpoint="latest")


def test_a_wrong_checkpoint_is_refused_before_the_teacher_makes_anything(student, tmp_path, monkeypatch):
    monkeypatch.setattr(Distillation, "load", lambda config: pytest.fail("the teacher was loaded"))
    config = {**QUICK, "model": "nowhere", "output_dir": str(student)}
    with pytest.raises(UserError, match=r"no checkpoint 'checkpoint-3'; .* has checkpoint-2, checkpoint-4"):
        Trainer(DistillationConfig(**config, resume_from_checkpoint="checkpoint-3"))
    damaged = shutil.copytree(student / "checkpoint-2", tmp_path / "checkpoint-2")
    (damaged / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged: ema.safetensors"):
        Trainer(DistillationConfig(**config, resume_from_checkpoint=str(damaged)))


def test_help_has_the_recipe_of_distillation_and_not_the_papers():
    actions = distillation_parser("x")._actions
    helps = {action.dest: action.help for action in actions}
    assert helps["max_train_steps"] == "optimizer updates; default: 2000"
    assert helps["learning_rate"].endswith("; default: 0.002")
    assert not any("the paper" in text for text in helps.values())
    assert [action.dest for action in actions[2:4]] == ["model", "steps"]  # first, after --help and --config


def test_a_class_conditional_teacher(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", make_small_unet(**CLASSES))
    distillation = load(teacher, guidance_scale=2.0)
    images = distillation.trajectories(0, Accelerator(cpu=True), 4)
    assert images.labels.tolist() == [0, 1, 2, 3] * 2  # "no class" is one
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
    alpha_bar = DDPMScheduler(beta_schedule="jsd", num_train_timesteps=20).alpha_bar
    expected = torch.from_numpy(alpha_bar[evenly_in_angle(alpha_bar, 4)])
    stock = stock_ddim(distillation)
    torch.testing.assert_close(stock.alphas_cumprod[[19, 14, 9, 4]].double(), expected, rtol=1e-5, atol=1e-6)
    points = distillation.trajectory(torch.randn(2, 1, 8, 8))  # from where alpha_bar is 0
    assert torch.stack(targets(distillation, points)).isfinite().all()
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
    assert "a distilled model has one sampler, its own; leave out --sampler" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(student), "--dataset", "digits", "--metrics", "nll"]) == 2
    assert "a distilled model has no likelihood" in capsys.readouterr().err


SNIPPET = """
import sys
sys.modules["ddpm_hf"] = None  # importing it raises ImportError
from diffusers import UNet2DModel
forward, seen = UNet2DModel.forward, []
UNet2DModel.forward = lambda self, x, *a, **kw: seen.append(tuple(x.shape)) or forward(self, x, *a, **kw)
exec(open(sys.argv[1]).read())
assert seen == [(4, 1, 8, 8)] * 2, seen
assert len(images) == 4
"""


def test_the_card_s_snippet_for_stock_takes_the_student_s_steps(student, tmp_path):
    _, stock = re.findall(r"```python\n(.*?)```", (student / "README.md").read_text(), re.DOTALL)
    assert "ddpm_hf" not in stock
    (tmp_path / "snippet.py").write_text(stock.replace(f'"{student.name}"', f'"{student}"'))
    (tmp_path / "program.py").write_text(SNIPPET)
    done = run_program(tmp_path / "program.py", tmp_path / "snippet.py")
    assert done.returncode == 0, done.stderr


def test_a_card_says_beside_a_student_s_numbers_how_many_evaluations_they_took(student, tmp_path):
    evaluate = ["evaluate", "--model", str(student), "--dataset", "digits", "--metrics", "fid", "--features", "pixels"]
    assert main([*evaluate, "--num_samples", "8", "--output", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    card = ModelCard(make_card(ModelFacts.read(student), CardFacts("run", report=report)))
    names = [result.metric_name for result in card.data.eval_results]
    assert names
    assert all("8 samples (" in name and ") of 2 network evaluations each, against" in name for name in names)
    assert "sampler DDIMScheduler, num_inference_steps 2, network_evaluations 2, seed 0." in card.text


def test_the_number_of_steps_stays_with_the_network(student, tmp_path):
    diffusers.DDPMPipeline.from_pretrained(student).save_pretrained(tmp_path / "by_stock")
    ours = DDPMPipeline.from_pretrained(tmp_path / "by_stock")
    other = DDPMPipeline(ours.unet, diffusers.DDIMScheduler.from_config(ours.scheduler.config))
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
    assert "from t = 999, 257 of 4 steps of the teacher" in (tmp_path / "early" / "README.md").read_text()
    assert main(["ema", str(student), "--sigma_rel", "0.1", "--output", str(tmp_path / "ema")]) == 0
    averaged = DDPMPipeline.from_pretrained(tmp_path / "ema")
    assert (averaged.distilled_steps, type(averaged.scheduler)) == (2, diffusers.DDIMScheduler)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("best_timesteps --num_inference_steps 2", "leaves ddpm-hf best_timesteps nothing to choose"),
        ("scale_epsilon --num_inference_steps 2 --output NEW", "leaves ddpm-hf scale_epsilon nothing to choose"),
        ("optimal_variance", "leaves ddpm-hf optimal_variance nothing to choose"),
        ("optimal_variance --output NEW", "leaves ddpm-hf optimal_variance nothing to choose"),
        (
            "evaluate --metrics nll,fid --features pixels --num_samples 8 --output NEW",
            "has no likelihood: it knows its",
        ),
        ("evaluate --metrics rate_distortion --output NEW", "has no likelihood: it knows its own 2 timesteps only"),
        ("ema --sweep --sigma_rel 0.1 --metrics nll", "has no likelihood: it knows its own 2 timesteps only"),
        ("sample --figure shared_latents --output NEW.png", "a distilled model is deterministic from x_t on; draw"),
        ("sample --figure progressive --num_inference_steps 3 --output NEW.png", "and can do no other number, got 3"),
        ("train --preset digits --output_dir NEW", "is distilled, and knows its own 2 timesteps only; start from"),
        ("sample --guidance_scale 2 --output NEW", "the guide is distilled into 2 steps"),
        ("publish --evaluate --output NEW", "a distilled model has a sampler and steps of its own"),
    ],
)
def test_what_a_student_cannot_do_is_one_sentence_and_writes_nothing(
    teacher, student, tmp_path, capsys, command, sentence
):
    name, *flags = command.replace("NEW", str(tmp_path / "new")).split()
    flags += ["--dataset", "digits"] * (name not in ("sample", "publish"))
    needs_a_run = "no published model here" if "NEW" not in command else sentence
    for model, expected in {student: sentence, student / "checkpoint-2": needs_a_run}.items():
        given = {"ema": [model], "publish": [model], "train": ["--init_from", model]}.get(name, ["--model", model])
        if "--guidance_scale" in flags:
            given = ["--model", teacher, "--guide", model]
        before = {path: path.stat().st_mtime_ns for path in student.rglob("*")}
        assert main([name, *map(str, given), *flags]) == 2
        error = capsys.readouterr().err
        assert (expected if name != "ema" or model == student else "has no snapshots") in error
        assert error.count("\n") == 1
        assert {path: path.stat().st_mtime_ns for path in student.rglob("*")} == before
        assert list(tmp_path.iterdir()) == []


def test_figures_of_a_student(student, tmp_path):
    for figure in ("progressive", "interpolation", "coarse_to_fine"):
        images = [] if figure == "progressive" else ["--dataset", "digits"]
        output = ["--seeds", "0", "--output", str(tmp_path / f"{figure}.png")]
        for model in (student, student / "checkpoint-2"):
            assert main(["sample", "--model", str(model), "--figure", figure, *images, *output]) == 0


def test_the_configuration_beside_a_student_resumes_it(student, capsys):
    config = parse_distillation_config(["--config", str(student / "training_config.yaml")])
    assert (config.steps, config.teacher_steps, config.total_batch_size) == (2, 4, 4)
    assert main(["train", "--config", str(student / "training_config.yaml")]) == 2
    assert "unknown key 'model'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "network", "flags", "sentence"),
    [
        ({}, {}, ["--teacher_steps", "15"], "--teacher_steps must be a multiple of --steps, and at most the"),
        ({"num_train_timesteps": 8}, {}, ["--steps", "4"], "at most the teacher's T = 8; got 24 and 4"),
        ({"variance_type": "learned_range"}, {"out_channels": 2}, [], "predicts its variance, which cannot be"),
        ({"prediction_type": "posterior_mean"}, {}, [], "predicts the posterior's mean, which cannot be distilled"),
        ({}, {}, ["--guidance_scale", "2"], "--class_labels and --guidance_scale are for class-conditional networks"),
        ({}, {}, ["--dataset", "digits"], "unknown flag --dataset"),
        ({}, {}, ["--num_trajectories", "9" * 12], "GB, and this machine has less; give fewer"),
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
