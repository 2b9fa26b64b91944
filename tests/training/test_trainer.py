"""The training loop: what an update sees, exact resume, equal cuts of a batch, what is published."""

import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import diffusers
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import (
    DDPMPipeline,
    DDPMScheduler,
    EvaluationReport,
    Trainer,
    TrainingConfig,
    UNet2DModel,
)
from ddpm_hf.diffusion.objectives import simple_loss
from ddpm_hf.evaluation.features import make_extractor
from ddpm_hf.hub.files import published_files
from ddpm_hf.pipelines.checkpoints import list_checkpoints
from ddpm_hf.presets import PRESETS
from ddpm_hf.training import run as training_run
from ddpm_hf.training import trainer as training_trainer
from ddpm_hf.training.checkpointing import changeable_settings, check_checkpoint, fixed_settings
from ddpm_hf.training.configuration import TrainingError
from ddpm_hf.training.evaluation import names_of_numbers
from ddpm_hf.training.run import choose_computation
from ddpm_hf.utils.errors import NotFiniteError, UserError
from ddpm_hf.utils.processes import only_run_in, reduce_in_float32, stop_signals
from ddpm_hf.utils.text import plain

QUICK = {
    "preset": "digits",
    "max_train_steps": 6,
    "total_batch_size": 16,
    "lr_warmup_steps": 2,
    "checkpointing_steps": 3,
    "num_sample_images": 4,
    "ddpm_num_inference_steps": 4,
    "sampler": "ddim",
    "eval_num_images": 4,
    "eval_num_evaluations": 4,
}


@pytest.fixture(autouse=True, scope="module")
def small_preset():
    """The digits preset with a network that trains in an instant, and dropout so that its masks count."""
    unet = {**PRESETS["digits"].unet, "block_out_channels": (8, 16), "norm_num_groups": 8, "dropout": 0.1}
    small = dataclasses.replace(PRESETS["digits"], unet=unet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_hf.presets.PRESETS", {**PRESETS, "digits": small})
        yield


def trainer(output_dir, **settings) -> Trainer:
    return Trainer(TrainingConfig(**{**QUICK, "output_dir": str(output_dir), **settings}))


@pytest.fixture(scope="module")
def whole(small_preset, tmp_path_factory) -> Path:
    """The folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer(folder).train()
    return folder


def curve(folder) -> dict[int, dict[str, float]]:
    """The numbers of a run's curve by update."""
    entries = json.loads((folder / "curve.json").read_text())
    assert all(entry["images"] == 16 * entry["update"] and entry["seconds"] > 0 for entry in entries)
    about = ("update", "images", "seconds")
    return {entry["update"]: {k: v for k, v in entry.items() if k not in about} for entry in entries}


def same_files(a, b, step):
    for name in ("model", "ema", "optimizer", "posthoc_ema"):
        one = load_file(a / f"checkpoint-{step}" / f"{name}.safetensors")
        two = load_file(b / f"checkpoint-{step}" / f"{name}.safetensors")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_a_run_publishes_a_pipeline_with_card_numbers_and_samples(tmp_path, capsys):
    pipe = trainer(tmp_path / "run").train()
    folder = tmp_path / "run"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *("model_index.json", "unet", "scheduler", "README.md", "samples.png", "evaluation.json"),
        *("training_config.yaml", "checkpoint-3", "checkpoint-6", "ema", ".lock"),
    }
    loaded = DDPMPipeline.from_pretrained(folder)
    ema = load_file(folder / "checkpoint-6" / "ema.safetensors")
    raw = load_file(folder / "checkpoint-6" / "model.safetensors")
    for key, value in loaded.unet.state_dict().items():
        assert torch.equal(value, ema[key])
        assert torch.equal(value, pipe.unet.state_dict()[key])
    assert any(not torch.equal(ema[key], raw[key]) for key in raw)
    assert "bits/dim on 4 images of validation" in capsys.readouterr().out


def test_a_resumed_run_ends_in_the_same_bits(tmp_path, whole):
    shutil.copytree(whole / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    torch.manual_seed(123)  # whatever the new process has drawn before
    resumed = trainer(tmp_path / "resumed", resume_from_checkpoint="latest")
    assert resumed.step == 3
    resumed.train()
    same_files(whole, tmp_path / "resumed", 6)


CHANNELS_LAST = {"channels_last": True}
BF16 = {"mixed_precision": "bf16"}
ACCUMULATION = {"train_batch_size": 4}
CHECKPOINTING = {"gradient_checkpointing": True}
CLASSES = {"class_conditional": True, "class_dropout": 0.3}
COMPILE = {"compile": True}


def advance(run: Trainer, last: int) -> None:
    """Updates up to `last`, then a checkpoint."""
    run.model.train()
    while run.step < last:
        run._update(run.step)
        run.step += 1
    run.output_dir.mkdir(exist_ok=True)
    run._save()


def interrupted(tmp_path, options, restored=lambda run: None) -> list[Path]:
    """The folders of a whole run of 3 + 3 updates, and of one whose last 3 started from the files of the first."""
    whole = trainer(tmp_path / "whole", **options)
    advance(whole, 3)
    advance(whole, 6)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = trainer(tmp_path / "resumed", resume_from_checkpoint="latest", **options)
    assert resumed.step == 3
    restored(resumed)
    advance(resumed, 6)
    return [whole.output_dir, resumed.output_dir]


@pytest.mark.parametrize(
    "modes",
    [  # every pair of modes in one of the first three, and every pair with compile in the last
        pytest.param(BF16 | ACCUMULATION | CHECKPOINTING | CLASSES, id="bf16-accumulation-checkpointing-classes"),
        pytest.param(CHANNELS_LAST | CHECKPOINTING | CLASSES, id="channels_last-checkpointing-classes"),
        pytest.param(CHANNELS_LAST | BF16 | ACCUMULATION, id="channels_last-bf16-accumulation"),
        pytest.param(CHANNELS_LAST | BF16 | ACCUMULATION | CHECKPOINTING | CLASSES | COMPILE, id="all"),
    ],
)
def test_a_resumed_run_ends_in_the_same_bits_in_every_mode(tmp_path, modes, monkeypatch):
    # the default backend, which takes a minute of C++ compilation, has its test in tests/test_kill.py
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    same_files(*interrupted(tmp_path, modes), 6)


def strides(tensor):
    """How a tensor lies in memory: the step along an axis of one element means nothing."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def test_what_is_restored_lies_in_memory_as_its_parameter(tmp_path):
    trainer(tmp_path / "run", max_train_steps=1).train()  # without channels_last: files know nothing of it
    run = trainer(tmp_path / "run", resume_from_checkpoint="latest", channels_last=True)
    saved = {part: load_file(tmp_path / "run" / "checkpoint-1" / f"{part}.safetensors") for part in ("model", "ema")}
    moments = load_file(tmp_path / "run" / "checkpoint-1" / "optimizer.safetensors")

    def check():
        for (name, parameter), averaged in zip(run.unet.named_parameters(), run.ema.shadow_params, strict=True):
            state = run._adam.state[parameter]
            others = {"average": averaged, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            if parameter.grad is not None:
                others["gradient"] = parameter.grad
            for what, tensor in others.items():
                assert strides(tensor) == strides(parameter), (name, what)
            assert (state["step"].dtype, state["step"].shape) == (torch.float32, ())

    check()
    for (name, parameter), averaged in zip(run.unet.named_parameters(), run.ema.shadow_params, strict=True):
        assert torch.equal(parameter, saved["model"][name])
        assert torch.equal(averaged, saved["ema"][name])
        for entry in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(run._adam.state[parameter][entry], moments[f"{name}.{entry}"])
    assert run.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    before = run._adam.register_step_pre_hook(lambda *_: check())  # gradients too, when Adam takes them
    run._update(1)
    before.remove()
    check()


def test_moments_in_another_layout_would_be_found(tmp_path):
    """What 0.1.0 did with channels_last: right values, whose memory Adam's fused kernel pairs with other weights."""

    def contiguous(run):
        for state in run._adam.state.values():
            state |= {name: value.contiguous() for name, value in state.items()}

    ends = [
        load_file(run / "checkpoint-6" / "model.safetensors")
        for run in interrupted(tmp_path, CHANNELS_LAST, contiguous)
    ]
    assert max((ends[0][name] - ends[1][name]).abs().max() for name in ends[0]) > 1e-3


@pytest.mark.parametrize("cuda", [False, True])
def test_updates_alone_use_deterministic_algorithms_where_they_are_wanted(tmp_path, monkeypatch, cuda):
    monkeypatch.setattr(training_trainer, "has_deterministic_algorithms", lambda device: cuda)
    run = trainer(tmp_path / "run", save_images_steps=3)
    update, show, enabled = run._update, run.publisher.show, {}

    def noted(name, function):
        def call(*arguments):
            enabled.setdefault(name, set()).add(torch.are_deterministic_algorithms_enabled())
            return function(*arguments)

        return call

    monkeypatch.setattr(run, "_update", noted("update", update))
    monkeypatch.setattr(run.publisher, "show", noted("show", show))
    run.train()
    assert enabled == {"update": {cuda}, "show": {False}}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "modes", [{}, CHANNELS_LAST, CLASSES, BF16], ids=["float32", "channels_last", "classes", "bf16"]
)
def test_runs_on_a_gpu_repeat_and_resume_to_the_same_bits(tmp_path, modes):
    for name in ("whole", "again"):
        trainer(tmp_path / name, **modes).train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    trainer(tmp_path / "resumed", resume_from_checkpoint="latest", **modes).train()
    same_files(tmp_path / "whole", tmp_path / "again", 6)
    same_files(tmp_path / "whole", tmp_path / "resumed", 6)


def test_gradient_checkpointing_changes_no_bit(tmp_path):
    """The second forward draws the masks of the first."""
    for name, options in {"plain": {}, "checkpointing": CHECKPOINTING}.items():
        advance(trainer(tmp_path / name, dropout=0.3, **options), 3)
    same_files(tmp_path / "plain", tmp_path / "checkpointing", 3)


def test_pictures_during_training_do_not_change_the_run(tmp_path, whole):
    trainer(tmp_path / "watched", save_images_steps=2).train()
    assert (tmp_path / "watched" / "samples-2.png").is_file()
    same_files(whole, tmp_path / "watched", 6)


def test_another_seed_is_another_run(tmp_path, whole):
    trainer(tmp_path / "b", seed=1).train()
    with pytest.raises(AssertionError):
        same_files(whole, tmp_path / "b", 6)


def test_accumulation_is_the_same_as_a_larger_batch(tmp_path):
    losses = {}
    for name, cut in {"whole": {}, "cut": {"train_batch_size": 4}}.items():
        run = trainer(tmp_path / name, dropout=0.0, **cut)
        assert run.plan.accumulation == (1 if name == "whole" else 4)
        losses[name] = [run._update(step)[0].item() for step in range(6)]
    assert torch.allclose(torch.tensor(losses["whole"]), torch.tensor(losses["cut"]), atol=1e-5)


def test_every_epoch_sees_every_image_once(tmp_path):
    run = trainer(tmp_path / "run")
    n = len(run.data)
    updates = -(-2 * n // 16)
    seen = torch.cat([run.batches.image_indices(step) for step in range(updates)])
    assert torch.equal(seen[:n].sort().values, torch.arange(n))
    assert torch.equal(seen[n : 2 * n].sort().values, torch.arange(n))
    assert not torch.equal(seen[:n], seen[n : 2 * n])


def test_draws_of_an_update_depend_on_seed_and_update_only(tmp_path):
    one, other = trainer(tmp_path / "a"), trainer(tmp_path / "b", seed=9)
    first = one.batches.draws(4)
    one.batches.draws(0)
    again = one.batches.draws(4)
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert torch.equal(one.batches.read(4, 0)[0], one.batches.read(4, 0)[0])
    assert not torch.equal(one.batches.draws(5)["noise"], first["noise"])
    assert not torch.equal(other.batches.draws(4)["noise"], first["noise"])


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_timesteps_are_uniform(tmp_path, sampling):
    run = trainer(tmp_path / "a", timestep_sampling=sampling, total_batch_size=100)
    t = torch.stack([run.batches.draws(step)["t"] for step in range(100)])
    counts = t.flatten().bincount(minlength=1000).view(10, 100).sum(1)
    # 10,000 draws over ten bins: a standard deviation of 30 each for uniform, 0 for stratified draws
    assert (counts - 1000).abs().max() < (130 if sampling == "uniform" else 1)
    if sampling == "stratified":
        assert torch.equal((t.sort(dim=1).values // 10)[0], torch.arange(100))
        assert not torch.equal(t[0].sort().values, t[0])  # and not in the order of the images


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_equals_a_float64_reference(tmp_path, monkeypatch, warmup):
    preset = dataclasses.replace(TrainingConfig(preset="digits").resolved_preset(), ema_warmup=warmup)
    monkeypatch.setattr("ddpm_hf.presets.PRESETS", {"digits": preset})
    run = trainer(tmp_path / "a", ema_max_decay=0.97)
    weights = list(run.unet.parameters())
    reference = [w.detach().double().clone() for w in weights]
    for n in range(1, 101):
        with torch.no_grad():
            for w in weights:
                w.add_(torch.randn_like(w), alpha=0.01)
        run.ema.step(weights)
        decay = min(0.97, (1 + n) / (10 + n)) if warmup else 0.97
        reference = [decay * r + (1 - decay) * w.detach().double() for r, w in zip(reference, weights, strict=True)]
    for averaged, expected in zip(run.ema.shadow_params, reference, strict=True):
        assert torch.allclose(averaged.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_stop_signal_saves_and_the_run_resumes_to_the_same_bits(tmp_path, monkeypatch, capsys, whole):
    stopped = trainer(tmp_path / "stopped", checkpointing_steps=100)
    update = stopped._update

    def interrupted(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(step)

    monkeypatch.setattr(stopped, "_update", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    assert stopped.train() is None
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "--resume_from_checkpoint latest" in capsys.readouterr().out
    assert (tmp_path / "stopped" / "checkpoint-4").is_dir()
    assert not (tmp_path / "stopped" / "model_index.json").exists()
    trainer(tmp_path / "stopped", resume_from_checkpoint="latest").train()
    same_files(whole, tmp_path / "stopped", 6)


def test_a_later_second_interrupt_leaves_at_once(monkeypatch):
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, handed on by a launcher
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 5)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_loss_that_is_not_finite_stops_with_a_sentence_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", max_train_steps=60)
    weights = {}

    def spoiled(unet, scheduler, x_0, t, noise):
        losses = simple_loss(unet, scheduler, x_0, t, noise)
        if run.step == 3:
            weights.update({name: value.clone() for name, value in run.unet.state_dict().items()})
        return losses * float("nan") if run.step >= 3 else losses

    monkeypatch.setattr(run.update, "objective", spoiled)
    with pytest.raises(
        TrainingError, match=r"loss nan.*27 updates in a row.*learning rate.*precision float32.*checkpoint-"
    ):
        run.train()
    # 20 skipped updates from update 4 on are noticed at the next look, update 30; nothing was changed by them.
    assert run.step == 29
    assert all(torch.equal(run.unet.state_dict()[name], value) for name, value in weights.items())
    last = load_file(tmp_path / "run" / "checkpoint-27" / "model.safetensors")
    assert all(torch.equal(last[name], value) for name, value in weights.items())


def test_one_bad_update_is_skipped_and_training_continues(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")

    def spoiled(unet, scheduler, x_0, t, noise):
        return simple_loss(unet, scheduler, x_0, t, noise) * (float("inf") if run.step == 2 else 1.0)

    monkeypatch.setattr(run.update, "objective", spoiled)
    pipe = run.train()
    assert run.step == 6
    assert all(value.isfinite().all() for value in pipe.unet.state_dict().values())


def test_one_batch_can_be_learned_by_heart(tmp_path):
    run = trainer(
        tmp_path / "run",
        dropout=0.0,
        learning_rate=3e-3,
        lr_scheduler="constant",
        total_batch_size=64,
        lr_warmup_steps=0,
    )
    run.batches.data = run.data.subset(torch.zeros(64, dtype=torch.long))
    losses = [run._update(step)[0].item() for step in range(150)]
    assert 0.9 < losses[0] < 1.2  # a fresh network predicts 0, so the loss is the noise's variance
    assert sum(losses[-10:]) / 10 < 0.15


def test_a_run_is_not_mixed_with_another(tmp_path):
    trainer(tmp_path / "run").train()
    with pytest.raises(ValueError, match="already holds a run"):
        trainer(tmp_path / "run")
    with pytest.raises(ValueError, match="seed 0, and this run has 5"):
        trainer(tmp_path / "run", resume_from_checkpoint="latest", seed=5)
    with pytest.raises(ValueError, match="total_batch_size 16, and this run has 8"):
        trainer(tmp_path / "run", resume_from_checkpoint="latest", total_batch_size=8)


def test_a_run_keeps_the_order_of_its_classes(tmp_path, capsys):
    """A checkpoint whose classes were in the order of text is not trained on with others under the same numbers."""
    for name in ("1", "2", "10"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.effect_noise((8, 8), 60).save(tmp_path / "images" / name / "a.png")
    options = {"train_data_dir": str(tmp_path / "images"), "class_conditional": True, "eval_num_images": 0}
    run = trainer(tmp_path / "run", resolution=8, **options)
    run.train()
    assert "3 classes: 1, 2, 10\n" in capsys.readouterr().out
    assert run.unet.config["_class_names"] == ["1", "2", "10"]
    was = fixed_settings(run.run)
    was["network"] = {**was["network"], "_class_names": ["1", "10", "2"]}
    with pytest.raises(ValueError, match=r"'1', '10', '2'.* and this run has .*'1', '2', '10'"):
        check_checkpoint(run.run, tmp_path / "run" / "checkpoint-6", plain(was))
    trainer(tmp_path / "plain", resolution=8, **{**options, "class_conditional": False}).train()
    assert "the images' 3 classes are not used (--class_conditional): 1, 2, 10\n" in capsys.readouterr().out


def test_the_paper_s_ema_has_its_full_decay_from_the_first_update(tmp_path, monkeypatch):
    paper = dataclasses.replace(TrainingConfig(preset="digits").resolved_preset(), ema_warmup=False)
    monkeypatch.setattr("ddpm_hf.presets.PRESETS", {"digits": paper})
    run = trainer(tmp_path / "run", ema_max_decay=0.9999)
    assert run.ema.get_decay(1) == 0.9999


def test_published_network_is_float32_and_has_the_preset_s_configuration(tmp_path):
    pipe = trainer(tmp_path / "run", mixed_precision="bf16").train()
    assert isinstance(pipe.unet, UNet2DModel)
    assert isinstance(pipe.scheduler, DDPMScheduler)
    assert pipe.unet.dtype == torch.float32
    assert pipe.scheduler.config.variance_type == PRESETS["digits"].scheduler["variance_type"]


def save_folders(folder, sizes=((12, 9),), count=12):
    """Two classes of colour images, of the given (width, height)."""
    for i in range(count):
        path = folder / ("cats" if i % 2 else "dogs") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(sizes[i % len(sizes)], 60).convert("RGB").save(path)


def test_class_conditional_training_is_saved_so_that_stock_loads_it(tmp_path):
    save_folders(tmp_path / "images")
    monkey = {"train_data_dir": str(tmp_path / "images"), "resolution": 8, "eval_num_images": 0}
    monkey |= {"class_conditional": True, "class_dropout": 0.3, "save_images_steps": 4}
    run = trainer(tmp_path / "run", **monkey)
    pipe = run.train()
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path / "run")
    assert stock.unet.config.num_class_embeds == 3  # two classes, and one that stands for none
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(stock.unet.state_dict()[name], value)
    loaded = DDPMPipeline.from_pretrained(tmp_path / "run")
    assert loaded.unet.config["_class_names"] == ["cats", "dogs"]
    assert loaded.classes.null == 2

    def images(**options):
        return loaded(seeds=[0, 1], num_inference_steps=4, output_type="pt", **options).images

    torch.manual_seed(0)  # so short a training leaves the output's last layer near zero
    torch.nn.init.normal_(loaded.unet.conv_out.weight, std=0.3)
    torch.nn.init.normal_(loaded.unet.class_embedding.weight, std=3.0)
    assert not torch.equal(images(class_labels=0), images(class_labels=1))
    assert torch.equal(images(class_labels=[0, 1])[1], images(class_labels=torch.tensor([1, 1]))[1])
    assert torch.equal(images(), images(class_labels=[None, None]))
    assert not torch.equal(images(class_labels=0, guidance_scale=3.0), images(class_labels=0))
    for wrong in (2, 3, -1, [0, 1, 1]):
        with pytest.raises(ValueError, match=r"class"):
            images(class_labels=wrong)


def test_labels_reach_the_network_and_are_dropped_as_often_as_asked(tmp_path, monkeypatch):
    save_folders(tmp_path / "images")
    common = {"train_data_dir": str(tmp_path / "images"), "resolution": 8, "total_batch_size": 200}
    run = trainer(tmp_path / "run", class_conditional=True, class_dropout=0.25, **common)
    seen = []

    def spy(unet, scheduler, x_0, t, noise, class_labels):
        seen.append(class_labels)
        return simple_loss(unet, scheduler, x_0, t, noise, class_labels=class_labels)

    monkeypatch.setattr(run.update, "objective", spy)
    for step in range(5):
        run._update(step)
    labels = torch.cat(seen)
    assert abs((labels == 2).float().mean() - 0.25) < 0.05
    expected = torch.cat([run.batches.read(step, 0)[1] for step in range(5)])
    assert torch.equal(labels[labels != 2], expected[labels != 2])


def test_class_conditional_needs_classes(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="needs classes"):
        trainer(tmp_path / "run", train_data_dir=str(tmp_path / "images"), class_conditional=True)


def test_images_that_are_not_square_and_a_network_for_them(tmp_path):
    save_folders(tmp_path / "images", sizes=((20, 11), (9, 30)))
    options = {"train_data_dir": str(tmp_path / "images"), "resolution": [8, 12], "validation_split": 0.25}
    pipe = trainer(tmp_path / "run", **options).train()
    assert pipe.image_shape == (1, 8, 12)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["num_images"] == 3


def test_random_crops_and_flips_resume_to_the_same_bits(tmp_path):
    save_folders(tmp_path / "images", sizes=((20, 11), (9, 30)))
    options = {"train_data_dir": str(tmp_path / "images"), "resolution": 8, "center_crop": False, "random_flip": True}
    trainer(tmp_path / "whole", **options).train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    trainer(tmp_path / "resumed", resume_from_checkpoint="latest", **options).train()
    same_files(tmp_path / "whole", tmp_path / "resumed", 6)
    trainer(tmp_path / "cut", train_batch_size=4, **options).batches.read(0, 0)
    whole, cut = trainer(tmp_path / "w", **options), trainer(tmp_path / "c", train_batch_size=4, **options)
    parts = torch.cat([cut.batches.read(2, micro)[0] for micro in range(4)])
    assert torch.equal(whole.batches.read(2, 0)[0], parts)


def save_parquet(folder):
    """Thirty grey images, as a dataset that `datasets` reads."""
    features = datasets.Features({"image": datasets.Image()})
    rows = []
    for level in range(30):
        buffer = io.BytesIO()
        Image.new("L", (8, 8), 8 * level).save(buffer, format="PNG")
        rows.append({"bytes": buffer.getvalue()})
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(folder / "train.parquet")


def test_a_stream_resumes_to_the_same_bits(tmp_path):
    save_parquet(tmp_path / "set")
    options = {"dataset_name": str(tmp_path / "set"), "streaming": True, "cache_dir": str(tmp_path / "cache")}
    trainer(tmp_path / "whole", **options).train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    trainer(tmp_path / "resumed", resume_from_checkpoint="latest", **options).train()
    same_files(tmp_path / "whole", tmp_path / "resumed", 6)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_card_does_not_say_where_on_this_machine_the_images_are(tmp_path, capsys, streaming):
    images = tmp_path / "secret" / "levels"
    save_parquet(images)
    options = {"dataset_name": str(images), "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    trainer(tmp_path / "run", max_train_steps=1, **options).train()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "trained on **levels**" in card
    assert f"- images: {'a stream' if streaming else '30 images'} of levels" in card
    assert "secret" not in card
    assert f"of {images}" in capsys.readouterr().out  # who trains is told in full


def test_a_card_in_another_encoding_does_not_end_the_run(tmp_path, capsys):
    run = trainer(tmp_path / "run", max_train_steps=3)
    run.train()
    offered = []
    run.publisher.pushes = SimpleNamespace(offer=offered.append)
    (tmp_path / "run" / "README.md").write_bytes("# Modèle".encode("latin-1"))
    run.publisher.push(run._ema_state_dict(), 3)
    assert "not published after update 3: README.md is not a text in UTF-8" in capsys.readouterr().out
    assert offered == []


@pytest.mark.parametrize("option", ["channels_last", "gradient_checkpointing", "compile"])
def test_ways_to_run_the_network_change_nothing_but_rounding(tmp_path, option, monkeypatch):
    if option == "compile":  # the default backend needs a minute of C++ compilation
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, other = trainer(tmp_path / "plain", dropout=0.0), trainer(tmp_path / "other", dropout=0.0, **{option: True})
    for step in range(3):
        assert abs(plain._update(step)[0].item() - other._update(step)[0].item()) < 1e-5
    other.step = 3
    other.output_dir.mkdir()
    other.config.save(other.output_dir / "training_config.yaml")
    other._save()
    fresh = trainer(tmp_path / "other", dropout=0.0, resume_from_checkpoint="latest")
    assert fresh.step == 3


def test_a_disk_that_refuses_gets_a_sentence_and_the_last_checkpoint_is_intact(tmp_path, monkeypatch, whole):
    run = trainer(tmp_path / "run")
    update = run._update

    def fill_the_disk(step):
        if step == 5:
            limit = (tmp_path / "run" / "checkpoint-3" / "model.safetensors").stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return update(step)

    monkeypatch.setattr(run, "_update", fill_the_disk)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the error instead of the signal
    try:
        with pytest.raises(OSError, match=r"cannot write .*checkpoint-6.*checkpoint-3"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, before)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"training_config.yaml", "checkpoint-3", "ema", ".lock"}
    trainer(tmp_path / "run", resume_from_checkpoint="latest").train()
    same_files(whole, tmp_path / "run", 6)


def test_going_back_behind_later_checkpoints_is_refused(tmp_path):
    trainer(tmp_path / "run").train()
    with pytest.raises(ValueError, match=r"also holds checkpoint-6, which checkpoint-3 would lead away from"):
        trainer(tmp_path / "run", resume_from_checkpoint="checkpoint-3")
    with pytest.raises(ValueError, match="already past max_train_steps=4"):
        trainer(tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=4)
    elsewhere = trainer(tmp_path / "other", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    elsewhere.train()
    same_files(tmp_path / "run", tmp_path / "other", 6)


def test_a_changed_learning_rate_counts_and_is_said(tmp_path, capsys):
    trainer(tmp_path / "run", max_train_steps=3).train()
    resumed = trainer(tmp_path / "run", resume_from_checkpoint="latest", learning_rate=1e-9)
    assert "learning_rate was 0.003 and is 1e-09 from now on" in capsys.readouterr().out
    before = [p.detach().clone() for p in resumed.unet.parameters()]
    resumed._update(3)
    assert resumed.lr_schedule.get_last_lr()[0] < 1e-9
    assert all((p - q).abs().max() < 1e-7 for p, q in zip(resumed.unet.parameters(), before, strict=True))


@pytest.mark.parametrize("other", [{"loss": "vlb"}, {"class_conditional": True}, {"variance_type": "fixed_small"}])
def test_another_network_or_objective_is_another_run(tmp_path, other):
    trainer(tmp_path / "run", max_train_steps=3).train()
    with pytest.raises(ValueError, match="was trained with"):
        trainer(tmp_path / "run", resume_from_checkpoint="latest", **other)


def test_hybrid_training_of_a_learned_variance(tmp_path):
    pipe = trainer(tmp_path / "run", loss="hybrid", variance_type="learned_range").train()
    assert pipe.unet.config.out_channels == 2
    assert pipe.scheduler.config.variance_type == "learned_range"
    with pytest.raises(ValueError, match="variance_type='learned_range'"):
        trainer(tmp_path / "other", loss="hybrid")


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    run = trainer(tmp_path / "run")
    (tmp_path / "run").mkdir()
    with only_run_in(tmp_path / "run"), pytest.raises(ValueError, match="another run is writing"):
        run.train()
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["README.md", "unet", "model_index.json"])
def test_other_people_s_files_are_not_overwritten(tmp_path, name):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / name).write_text("mine")
    for options in ({}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ValueError, match=f"holds {name}"):
            trainer(tmp_path / "project", **options)


def test_what_is_held_out_is_checked_before_training(tmp_path):
    save_folders(tmp_path / "images")
    common = {"train_data_dir": str(tmp_path / "images"), "resolution": 8}
    with pytest.raises(ValueError, match=r"validation_split=0.01 .* holds out no image"):
        trainer(tmp_path / "run", validation_split=0.01, **common)
    with pytest.raises(ValueError, match="validation_steps needs images that are held out"):
        trainer(tmp_path / "run", validation_steps=2, **common)


def test_what_killed_writes_left_is_removed(tmp_path):
    for name in (".checkpoint-17.partial", ".checkpoint-2.removed"):
        (tmp_path / "run" / name).mkdir(parents=True)
    trainer(tmp_path / "run").train()
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_a_stop_signal_does_not_wait_for_a_sample_grid(tmp_path, monkeypatch, whole):
    run = trainer(tmp_path / "stopped", save_images_steps=4, checkpointing_steps=100)
    reached = []

    def endless(pipe, name, step):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10_000_000):
            pass
        reached.append(name)

    monkeypatch.setattr(run.publisher, "sample_grid", endless)
    assert run.train() is None
    assert reached == []
    assert (tmp_path / "stopped" / "checkpoint-4").is_dir()
    trainer(tmp_path / "stopped", resume_from_checkpoint="latest").train()
    same_files(whole, tmp_path / "stopped", 6)


def test_a_process_trains_in_one_precision_the_flag_s_or_the_launcher_s(tmp_path, monkeypatch):
    trainer(tmp_path / "plain").train()
    assert "precision: float32" in (tmp_path / "plain" / "README.md").read_text()
    with pytest.raises(UserError, match=r"has already been initialized .* pass `mixed_precision='bf16'`"):
        trainer(tmp_path / "low", mixed_precision="bf16")
    AcceleratorState._reset_state()  # as in another process
    trainer(tmp_path / "low", mixed_precision="bf16").train()
    assert "precision: bf16" in (tmp_path / "low" / "README.md").read_text()
    with pytest.raises(UserError, match="pass `mixed_precision='no'`"):  # nothing asked for is not bf16
        trainer(tmp_path / "again")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what `accelerate launch` leaves for the processes
    assert trainer(tmp_path / "launched").run.precision == "bf16"
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision='fp16' needs a GPU"):
        trainer(tmp_path / "half")
    ends = [load_file(tmp_path / run / "checkpoint-6" / "model.safetensors") for run in ("low", "plain")]
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.fixture
def half_precision_on_cpus(monkeypatch):
    """What accelerate does with fp16 on a GPU, on the CPU; the loss scale is so high that some updates overflow."""

    class HalfOnCPU(Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)

    monkeypatch.setattr(training_run, "Accelerator", HalfOnCPU)


def test_fp16_skips_updates_that_overflow_and_lowers_its_scale(tmp_path, half_precision_on_cpus):
    run = trainer(tmp_path / "run", mixed_precision="fp16", dropout=0.0, max_train_steps=20)
    dtypes = set()
    run.unet.conv_in.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    averaged = [p.detach().double().clone() for p in run.ema.shadow_params]
    decay = run.ema.get_decay
    skipped = made = in_a_row = 0
    for step in range(20):
        before = [p.detach().clone() for p in run.unet.parameters()]
        scale = run.accelerator.scaler.get_scale()
        _, norm = run._update(step)
        run.step += 1
        after = [p.detach() for p in run.unet.parameters()]
        rate = decay(step + 1)
        averaged = [rate * a + (1 - rate) * p.double() for a, p in zip(averaged, after, strict=True)]
        assert run.lr_schedule.last_epoch == step + 1  # a function of the update, skipped or not
        if all(torch.equal(p, q) for p, q in zip(before, after, strict=True)):
            skipped, in_a_row = skipped + 1, in_a_row + 1
            assert not norm.isfinite()
            assert run.accelerator.scaler.get_scale() == scale / 2
        else:
            made, in_a_row = made + 1, 0
            assert norm < 100  # of the loss itself, not of the scaled one
            assert run.accelerator.scaler.get_scale() in (scale, 2 * scale)
        assert run.update.skipped_in_a_row == in_a_row
    assert dtypes == {torch.float16}
    assert skipped > 2
    assert made > 5
    steps = {int(state["step"]) for state in run._adam.state.values()}
    assert steps == {made}  # Adam counts the updates it made
    assert all(p.dtype == torch.float32 for p in run.unet.parameters())
    for value, expected in zip(run.ema.shadow_params, averaged, strict=True):
        assert torch.allclose(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_fp16_resumes_to_the_same_bits(tmp_path, half_precision_on_cpus):
    options = {"mixed_precision": "fp16", "max_train_steps": 12, "checkpointing_steps": 6, "eval_num_images": 0}
    trainer(tmp_path / "whole", **options).train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    resumed = trainer(tmp_path / "resumed", resume_from_checkpoint="latest", **options)
    state = json.loads((tmp_path / "whole" / "checkpoint-6" / "state.json").read_text())
    assert state["scaler"]["scale"] < 2.0**24
    assert resumed.accelerator.scaler.state_dict() == state["scaler"]
    resumed.train()
    same_files(tmp_path / "whole", tmp_path / "resumed", 12)
    ends = [json.loads((tmp_path / run / "checkpoint-12" / "state.json").read_text()) for run in ("whole", "resumed")]
    assert all(end.pop("seconds") > 0 for end in ends)
    assert ends[0] == ends[1]


def test_fp16_that_always_overflows_ends_with_a_sentence(tmp_path, half_precision_on_cpus, monkeypatch):
    def spoiled(unet, scheduler, x_0, t, noise):
        return simple_loss(unet, scheduler, x_0, t, noise) * float("inf")

    run = trainer(tmp_path / "run", mixed_precision="fp16", max_train_steps=60)
    monkeypatch.setattr(run.update, "objective", spoiled)
    weights = [p.detach().clone() for p in run.unet.parameters()]
    with pytest.raises(TrainingError, match=r"20 updates in a row.*precision fp16"):
        run.train()
    assert all(torch.equal(p, q) for p, q in zip(weights, run.unet.parameters(), strict=True))


def test_what_ends_in_other_bits_is_said(tmp_path, capsys):
    common = {"max_train_steps": 3, "class_conditional": True, "resume_from_checkpoint": "latest"}
    trainer(tmp_path / "run", class_dropout=0.1, **common).train()
    capsys.readouterr()
    changed = {"class_dropout": 0.3, "center_crop": False, "train_batch_size": 8, "channels_last": True, "tf32": True}
    trainer(tmp_path / "run", **changed, **common)
    was = {"class_dropout": 0.1, "center_crop": True, "train_batch_size": 16, "channels_last": False, "tf32": False}
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == sorted(
        f"changed since checkpoint-3: {name} was {was[name]} and is {here} from now on"
        for name, here in changed.items()
    )


def test_checkpoints_of_0_1_0_resume_and_nothing_is_said(tmp_path, capsys):
    """They say less of how they came about; their tensors are the same."""
    run = trainer(tmp_path / "run", channels_last=True)
    here = changeable_settings(run.run)
    new = {"class_dropout", "center_crop", "tf32", "channels_last", "compile", "train_batch_size"}
    old = {k: v for k, v in here.items() if k not in new | {"number of processes", "device"}}
    assert len(old) == len(here) - 8
    state = {"step": 3, **fixed_settings(run.run), "recipe": old}
    check_checkpoint(run.run, tmp_path / "checkpoint-3", json.loads(json.dumps(state)))
    assert capsys.readouterr().out == ""


def test_a_change_of_precision_is_said(tmp_path, capsys):
    trainer(tmp_path / "run", max_train_steps=3).train()
    AcceleratorState._reset_state()  # as in another process
    trainer(tmp_path / "run", resume_from_checkpoint="latest", mixed_precision="bf16")
    assert "precision was float32 and is bf16 from now on" in capsys.readouterr().out


def test_a_stop_signal_does_not_wait_for_the_published_samples(tmp_path, monkeypatch, capsys, whole):
    run = trainer(tmp_path / "stopped")
    sample_grid = run.publisher.sample_grid

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        sample_grid(*arguments)

    monkeypatch.setattr(run.publisher, "sample_grid", interrupted)
    assert run.train() is None
    said = capsys.readouterr().out
    assert f"the model is in {tmp_path}/stopped; missing: samples.png and evaluation.json, made by" in said
    assert DDPMPipeline.from_pretrained(tmp_path / "stopped").unet.config.sample_size == 8
    assert not (tmp_path / "stopped" / "samples.png").exists()
    assert trainer(tmp_path / "stopped", resume_from_checkpoint="latest").train() is not None
    for name in ("samples.png", "unet/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_engines_that_pickle_are_refused(tmp_path, monkeypatch, engine):
    with monkeypatch.context() as patch:
        patch.setenv(f"ACCELERATE_USE_{engine}", "true")  # what `accelerate launch` leaves for the processes
        with pytest.raises(UserError, match="accelerate cannot be set up as configured"):  # it is not installed here
            trainer(tmp_path / "run")
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[engine])
    with pytest.raises(UserError, match=f"{engine} saves its state with pickle"):
        trainer(tmp_path / "run")


@pytest.mark.parametrize(("version", "flags", "words"), [(1, {}, "use FSDP 2"), (2, {"channels_last": True}, "leave")])
def test_what_fsdp_cannot_shard_is_refused(tmp_path, monkeypatch, version, flags, words):
    plugin = SimpleNamespace(fsdp_version=version, mixed_precision_policy=None)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(UserError, match=words):
        trainer(tmp_path / "run", **flags)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fsdp_adds_gradients_up_in_float32(precision):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision(precision)  # as accelerate does
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert plugin.mixed_precision_policy.reduce_dtype == low
    state = SimpleNamespace(fsdp_plugin=plugin)
    reduce_in_float32(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state))
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (low, torch.float32)


# ---------------------------------------------------------------------- evaluation in the loop, and the best model

WATCHED = {"validation_steps": 2, "eval_metrics": "nll,fid,kid,prc", "eval_features": "pixels", "eval_num_samples": 8}


def scripted(run: Trainer, monkeypatch, name: str, values: dict[int, float]) -> list[int]:
    """Let a run measure these values of a number; the updates it measured."""
    measured = []
    measure = run.evaluation.measure

    def measure_as_told(pipe):
        report = measure(pipe)
        report.values[name]["value"] = values[run.step]
        measured.append(run.step)
        return report

    monkeypatch.setattr(run.evaluation, "measure", measure_as_told)
    return measured


def best_weights(folder):
    return load_file(folder / "best" / "unet" / "diffusion_pytorch_model.safetensors")


def test_evaluation_in_the_loop_changes_nothing_and_gives_the_promised_numbers(tmp_path, whole):
    run = trainer(tmp_path / "watched", best_metric="fd_pixels_validation_float", **WATCHED)
    run.train()
    same_files(whole, tmp_path / "watched", 6)
    folder = tmp_path / "watched"
    history = curve(folder)
    assert list(history) == [2, 4, 6]
    assert Image.open(folder / "curve.png").width > 500
    assert "![numbers during the training](curve.png)" in (folder / "README.md").read_text()
    final = json.loads((folder / "evaluation.json").read_text())["values"]
    assert {name: entry["value"] for name, entry in final.items()} == history[6]
    extractors = [make_extractor("pixels", (1, 8, 8))]
    assert set(names_of_numbers(run.evaluation.metrics, extractors, ["train", "validation"])) == set(final)
    assert not (folder / ".evaluation").exists()
    # The best one by the numbers on disk, readable by stock, with its own report; the Hub gets none of it.
    best = min(history, key=lambda step: history[step]["fd_pixels_validation_float"])
    report = EvaluationReport.load(folder / "best" / "evaluation.json")
    assert report.model["update"] == best
    assert {name: entry["value"] for name, entry in report.values.items()} == history[best]
    stock = diffusers.DDPMPipeline.from_pretrained(folder / "best")
    assert all(torch.equal(value, best_weights(folder)[name]) for name, value in stock.unet.state_dict().items())
    published = published_files(folder)
    assert "curve.png" in published
    assert not any(name.startswith(("best", "curve.json")) for name in published)


def test_samples_are_measured_without_a_likelihood(tmp_path):
    run = trainer(tmp_path / "run", max_train_steps=2, eval_num_images=0, **WATCHED)
    run.train()
    measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())["values"]
    assert "fd_pixels_train_uint8" in measured
    assert "bits_per_dim" not in measured


def test_images_at_a_time_change_no_number_and_no_picture(tmp_path, monkeypatch):
    seen, forward = [], UNet2DModel.forward

    def noted(self, sample, *arguments, **options):
        if not self.training:
            seen.append(len(sample))
        return forward(self, sample, *arguments, **options)

    monkeypatch.setattr(UNet2DModel, "forward", noted)
    reports, pictures = {}, {}
    for size in (4, 256):
        run = trainer(tmp_path / str(size), eval_batch_size=size, num_sample_images=9, eval_num_images=9, **WATCHED)
        monkeypatch.setattr(run, "_update", lambda step: (torch.zeros(()), torch.zeros(())))
        seen.clear()
        run.train()
        assert (max(seen) <= 4) == (size == 4)  # at most: the likelihood has some of each image's t in a batch
        reports[size] = json.loads((tmp_path / str(size) / "evaluation.json").read_text())["values"]
        pictures[size] = Image.open(tmp_path / str(size) / "samples.png").tobytes()
    assert reports[4].keys() == reports[256].keys()
    for name, entry in reports[4].items():
        assert entry["value"] == pytest.approx(reports[256][name]["value"], rel=1e-4), name
    assert pictures[4] == pictures[256]


@pytest.mark.parametrize("part", ["measure", "sample_grid"])
@pytest.mark.parametrize("when", [2, 6])
def test_too_little_memory_for_an_evaluation_names_its_flag(tmp_path, monkeypatch, part, when):
    run = trainer(tmp_path / "run", save_images_steps=2, **WATCHED)  # a checkpoint is due after 3 and 6

    def too_large(*_):
        if run.step == when:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run.evaluation if part == "measure" else run.publisher, part, too_large)
    monkeypatch.setattr(run.evaluation, "record", lambda *_: None)
    with pytest.raises(TrainingError, match=f"after update {when}; give a smaller eval_batch_size, and resume with"):
        run.train()
    assert list_checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{when}"


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("bits_per_dim", {2: 3.0, 4: 2.0, 6: 2.0}, 4),  # the first of two equals
        ("bits_per_dim", {2: float("nan"), 4: 5.0, 6: float("nan")}, 4),
        ("precision_pixels_train_uint8", {2: 0.1, 4: 0.3, 6: 0.2}, 4),  # more is better
    ],
)
def test_the_best_model_is_kept(tmp_path, monkeypatch, name, values, best):
    watched = {"validation_steps": 2} if name == "bits_per_dim" else WATCHED
    run = trainer(tmp_path / "run", best_metric=name, checkpointing_steps=2, checkpoints_total_limit=1, **watched)
    scripted(run, monkeypatch, name, values)
    averaged = {}
    record = run.evaluation.record

    def noted(pipe, report, step, *more):
        averaged[step] = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
        record(pipe, report, step, *more)

    monkeypatch.setattr(run.evaluation, "record", noted)
    run.train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    assert all(torch.equal(value, averaged[best][key]) for key, value in best_weights(tmp_path / "run").items())
    assert EvaluationReport.load(tmp_path / "run" / "best" / "evaluation.json").model["update"] == best


def test_a_model_whose_images_are_not_finite_is_not_the_best_one_and_training_continues(tmp_path, monkeypatch, capsys):
    run = trainer(
        tmp_path / "run", validation_steps=2, save_images_steps=2, checkpointing_steps=2, best_metric="bits_per_dim"
    )
    made, broken = run.publisher.pipeline, {2}

    def pipeline(averaged):
        pipe = made(averaged)
        if run.step in broken:
            pipe.unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
        return pipe

    monkeypatch.setattr(run.publisher, "pipeline", pipeline)
    run.train()
    said = capsys.readouterr().out
    assert "no grid after update 2: the network's weights conv_in.weight hold NaN or infinity" in said
    assert "no numbers after update 2: " in said
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.glob("samples*.png")) == ["samples-4.png", "samples.png"]
    assert list(curve(folder)) == [4, 6]
    assert EvaluationReport.load(folder / "best" / "evaluation.json").model["update"] in (4, 6)
    broken.add(6)  # the last one: it is said, and not with exit code 0
    last = trainer(tmp_path / "last", checkpointing_steps=6)
    monkeypatch.setattr(last.publisher, "pipeline", pipeline)
    with pytest.raises(NotFiniteError, match=r"conv_in\.weight"):
        last.train()
    assert not list((tmp_path / "last").glob("samples*.png"))
    assert [path.name for path in list_checkpoints(tmp_path / "last")] == ["checkpoint-6"]


KEPT = {"validation_steps": 2, "checkpointing_steps": 2, "best_metric": "bits_per_dim"}
MEASURED = {2: 3.0, 4: 2.0, 6: 2.5}


@pytest.fixture(scope="module")
def kept(small_preset, tmp_path_factory) -> Path:
    """The folder of a whole run that keeps the best model by these numbers."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    run = trainer(folder, **KEPT)
    with pytest.MonkeyPatch.context() as patch:
        assert scripted(run, patch, "bits_per_dim", MEASURED) == []
        run.train()
    return folder


class Killed(BaseException):
    """Nobody catches it, as nobody catches a kill."""


@pytest.mark.parametrize("moment", ["measuring", "before the rename", "between the renames", "before it is noted"])
def test_a_killed_run_keeps_the_same_best_model(tmp_path, monkeypatch, moment, kept):
    """Killed in the evaluation of update 4, whose checkpoint is there already, so that no update is repeated."""
    run = trainer(tmp_path / "run", **KEPT)
    scripted(run, monkeypatch, "bits_per_dim", MEASURED)
    evaluation, rename = run.evaluation, Path.rename

    def killed(*_):
        raise Killed

    def rename_or_die(path, target):
        if run.step == 4 and path.name == ".best.partial":
            if moment == "before the rename":
                rename(tmp_path / "run" / ".best.old", tmp_path / "run" / "best")
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        if moment == "measuring":
            measure = evaluation.measure
            patch.setattr(evaluation, "measure", lambda pipe: killed() if run.step == 4 else measure(pipe))
        elif moment == "before it is noted":
            write = evaluation._write_curve
            patch.setattr(evaluation, "_write_curve", lambda h: killed() if run.step == 4 else write(h))
        else:
            patch.setattr(Path, "rename", rename_or_die)
        with pytest.raises(Killed):
            run.train()
    if moment == "between the renames":
        assert not (tmp_path / "run" / "best").exists()
    resumed = trainer(tmp_path / "run", resume_from_checkpoint="latest", **KEPT)
    assert resumed.step == 4
    measured = scripted(resumed, monkeypatch, "bits_per_dim", MEASURED)
    resumed.train()
    assert measured == [4, 6]
    for file in ("unet/diffusion_pytorch_model.safetensors", "model_index.json"):
        assert (tmp_path / "run" / "best" / file).read_bytes() == (kept / "best" / file).read_bytes()
    assert curve(kept) == curve(tmp_path / "run")
    assert {step: numbers["bits_per_dim"] for step, numbers in curve(kept).items()} == MEASURED
    same_files(kept, tmp_path / "run", 6)


def test_a_stop_signal_in_an_evaluation_and_a_resumed_run_measure_it_once(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", validation_steps=3)
    measure = run.evaluation.measure

    def interrupted(pipe):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(pipe)

    monkeypatch.setattr(run.evaluation, "measure", interrupted)
    assert run.train() is None
    assert not (tmp_path / "run" / "curve.json").exists()
    trainer(tmp_path / "run", validation_steps=3, resume_from_checkpoint="latest").train()
    assert list(curve(tmp_path / "run")) == [3, 6]


def test_a_stop_signal_before_an_evaluation_is_obeyed_at_once(tmp_path, monkeypatch):
    options = {"validation_steps": 3, "save_images_steps": 3}
    run = trainer(tmp_path / "run", **options)
    update, begun = run._update, []

    def interrupted(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(step)

    monkeypatch.setattr(run, "_update", interrupted)
    monkeypatch.setattr(run.publisher, "show", lambda *_: begun.append(run.step) or (None, None))
    assert run.train() is None
    assert begun == []
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    trainer(tmp_path / "run", resume_from_checkpoint="latest", **options).train()  # which makes what was missed
    assert list(curve(tmp_path / "run")) == [3, 6]
    assert (tmp_path / "run" / "samples-3.png").is_file()


def test_a_best_model_of_another_run_or_another_number_does_not_count(tmp_path, monkeypatch, capsys):
    options = {"validation_steps": 3, "best_metric": "bits_per_dim"}
    run = trainer(tmp_path / "run", **options)
    scripted(run, monkeypatch, "bits_per_dim", {3: 0.5, 6: 1.0})
    run.train()
    other = trainer(tmp_path / "run", resume_from_checkpoint="latest", eval_num_images=3, **options)
    scripted(other, monkeypatch, "bits_per_dim", {6: 2.0})
    other.train()
    assert "is chosen again" in capsys.readouterr().out
    assert EvaluationReport.load(tmp_path / "run" / "best" / "evaluation.json").model["update"] == 6
    for checkpoint in list_checkpoints(tmp_path / "run"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="holds a finished model and no checkpoint"):
        trainer(tmp_path / "run", **options)
    assert (tmp_path / "run" / "best").is_dir()
    (tmp_path / "run" / "model_index.json").unlink()  # and so the folder holds a run that begins anew
    again = trainer(tmp_path / "run", **options)
    scripted(again, monkeypatch, "bits_per_dim", {3: 4.0, 6: 3.0})
    again.train()
    assert EvaluationReport.load(tmp_path / "run" / "best" / "evaluation.json").values["bits_per_dim"]["value"] == 3.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"best_metric": "bits_per_dim"}, "best_metric bits_per_dim needs validation_steps"),
        ({"best_metric": "bits_per_dims", "validation_steps": 2}, "did you mean 'bits_per_dim'"),
        ({"best_metric": "fd_pixels_train_uint8", "validation_steps": 2}, "none of the numbers"),
        ({"eval_metrics": "nll,fdi"}, "'fdi'.*did you mean 'fid'"),
        ({"eval_metrics": " ,"}, "names no metric"),
        ({"eval_metrics": "rate_distortion"}, "for finished models: ddpm-hf evaluate"),
        ({"eval_metrics": "fid"}, "eval_inception_weights FILE.*eval_features='pixels'"),
        ({"eval_metrics": "fid", "eval_features": "pixel"}, "unknown eval_features='pixel'"),
        ({"eval_metrics": "fid", "eval_features": "pixels", "eval_num_samples": 1}, "got eval_num_samples=1"),
        ({"eval_num_images": 0, "validation_steps": 2}, "nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_said_before_training(tmp_path, monkeypatch, options, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_cache_that_cannot_be_written_is_said_before_training(tmp_path, monkeypatch):
    # /proc takes no files, whoever asks
    monkeypatch.setenv("DDPM_HF_CACHE", "/proc/cache")
    with pytest.raises(ValueError, match=r"cannot write to \$DDPM_HF_CACHE /proc/cache"):
        trainer(tmp_path / "run", **WATCHED)
    trainer(tmp_path / "run", validation_steps=2)  # bits/dim need none
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "distributed", "flags", "expected"),
    [
        ("cuda", "NO", {}, (True, True, True)),
        ("cuda", "NO", {"channels_last": False, "compile": False, "cuda_graphs": False}, (False, False, False)),
        ("cuda", "NO", {"gradient_checkpointing": True}, (True, True, False)),
        ("cuda", "MULTI_GPU", {}, (True, True, False)),
        ("cuda", "FSDP", {}, (False, False, False)),
        ("cpu", "NO", {}, (False, False, False)),
        ("cpu", "NO", {"channels_last": True, "compile": True}, (True, True, False)),
    ],
)
def test_what_is_fast_is_the_default_where_it_is_sound(monkeypatch, device, distributed, flags, expected):
    monkeypatch.setattr(training_run, "compiler_problem", lambda device: None)
    assert choose_computation(TrainingConfig(preset="digits", **flags), machine_of(device, distributed)) == expected


def machine_of(device: str, distributed: str = "NO") -> SimpleNamespace:
    """What accelerate says of a machine."""
    return SimpleNamespace(device=torch.device(device), distributed_type=DistributedType[distributed], scaler=None)


def test_without_a_compiler_the_default_says_so_and_the_flag_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(training_run, "compiler_problem", lambda device: "there is no Triton")
    assert choose_computation(TrainingConfig(preset="digits"), machine_of("cuda")) == (True, False, True)
    assert "the network is not compiled, which is slower: there is no Triton" in capsys.readouterr().out
    with pytest.raises(UserError, match="compile=True is not possible here: there is no Triton"):
        choose_computation(TrainingConfig(preset="digits", compile=True), machine_of("cpu"))
