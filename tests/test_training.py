"""The training loop: what an update sees, exact resume, equal cuts of a batch, what is published."""

import dataclasses
import os
import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline, DDPMScheduler, Trainer, TrainingConfig, UNet2DModel, training
from ddpm_hf.presets import PRESETS
from ddpm_hf.training import TrainingError

QUICK = {
    "preset": "digits",
    "max_train_steps": 6,
    "total_batch_size": 16,
    "lr_warmup_steps": 2,
    "checkpointing_steps": 3,
    "num_sample_images": 4,
    "ddpm_num_inference_steps": 3,
    "sampler": "ddim",
    "eval_num_images": 4,
    "eval_num_evaluations": 4,
}


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    """The digits preset with a network that trains in an instant, and dropout so that its masks count."""
    unet = {**PRESETS["digits"].unet, "block_out_channels": (8, 16), "norm_num_groups": 8, "dropout": 0.1}
    small = dataclasses.replace(PRESETS["digits"], unet=unet)
    monkeypatch.setattr("ddpm_hf.presets.PRESETS", {**PRESETS, "digits": small})
    AcceleratorState._reset_state()  # accelerate keeps one precision per process; here each test has its own


def trainer(output_dir, **settings) -> Trainer:
    return Trainer(TrainingConfig(**{**QUICK, "output_dir": str(output_dir), **settings}))


def same_files(a, b, step):
    for name in ("model", "ema", "optimizer"):
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
        *("training_config.yaml", "checkpoint-3", "checkpoint-6"),
    }
    loaded = DDPMPipeline.from_pretrained(folder)
    ema = load_file(folder / "checkpoint-6" / "ema.safetensors")
    raw = load_file(folder / "checkpoint-6" / "model.safetensors")
    for key, value in loaded.unet.state_dict().items():
        assert torch.equal(value, ema[key])
        assert torch.equal(value, pipe.unet.state_dict()[key])
    assert any(not torch.equal(ema[key], raw[key]) for key in raw)
    assert "bits/dim on 4 held-out images" in capsys.readouterr().out


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    trainer(tmp_path / "whole").train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    torch.manual_seed(123)  # whatever the new process has drawn before
    resumed = trainer(tmp_path / "resumed", resume_from_checkpoint="latest")
    assert resumed.step == 3
    resumed.train()
    same_files(tmp_path / "whole", tmp_path / "resumed", 6)


def test_pictures_during_training_do_not_change_the_run(tmp_path):
    trainer(tmp_path / "plain").train()
    trainer(tmp_path / "watched", save_images_steps=2).train()
    assert (tmp_path / "watched" / "samples-2.png").is_file()
    same_files(tmp_path / "plain", tmp_path / "watched", 6)


def test_another_seed_is_another_run(tmp_path):
    trainer(tmp_path / "a").train()
    trainer(tmp_path / "b", seed=1).train()
    with pytest.raises(AssertionError):
        same_files(tmp_path / "a", tmp_path / "b", 6)


def test_accumulation_is_the_same_as_a_larger_batch(tmp_path):
    losses = {}
    for name, cut in {"whole": {}, "cut": {"train_batch_size": 4}}.items():
        run = trainer(tmp_path / name, dropout=0.0, **cut)
        assert run.accumulation == (1 if name == "whole" else 4)
        losses[name] = [run._update(step)[0].item() for step in range(6)]
    assert torch.allclose(torch.tensor(losses["whole"]), torch.tensor(losses["cut"]), atol=1e-5)


def test_every_epoch_sees_every_image_once(tmp_path):
    run = trainer(tmp_path / "run")
    n = len(run.data)
    updates = -(-2 * n // 16)
    seen = torch.cat([run._image_indices(step) for step in range(updates)])
    assert torch.equal(seen[:n].sort().values, torch.arange(n))
    assert torch.equal(seen[n : 2 * n].sort().values, torch.arange(n))
    assert not torch.equal(seen[:n], seen[n : 2 * n])


def test_draws_of_an_update_depend_on_seed_and_update_only(tmp_path):
    one, other = trainer(tmp_path / "a"), trainer(tmp_path / "b", seed=9)
    first = one._batch(4)
    one._batch(0)
    for again, was in zip(one._batch(4), first, strict=True):
        assert torch.equal(again, was)
    assert not torch.equal(one._batch(5)[2], first[2])
    assert not torch.equal(other._batch(4)[2], first[2])


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_timesteps_are_uniform(tmp_path, sampling):
    run = trainer(tmp_path / "a", timestep_sampling=sampling, total_batch_size=100)
    t = torch.stack([run._batch(step)[1] for step in range(100)])
    counts = t.flatten().bincount(minlength=1000).view(10, 100).sum(1)
    # 10,000 draws over ten bins: a standard deviation of 30 each for uniform, 0 for stratified draws
    assert (counts - 1000).abs().max() < (130 if sampling == "uniform" else 1)
    if sampling == "stratified":
        assert torch.equal((t.sort(dim=1).values // 10)[0], torch.arange(100))
        assert not torch.equal(t[0].sort().values, t[0])  # and not in the order of the images


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_equals_a_float64_reference(tmp_path, monkeypatch, warmup):
    preset = dataclasses.replace(training.TrainingConfig(preset="digits").resolved_preset(), ema_warmup=warmup)
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


def test_a_stop_signal_saves_and_the_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    trainer(tmp_path / "whole").train()
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
    same_files(tmp_path / "whole", tmp_path / "stopped", 6)


def test_the_second_interrupt_leaves_at_once():
    with training.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop["requested"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_loss_that_is_not_finite_stops_with_a_sentence_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")
    update = run._update

    def spoiled(step):
        loss, norm = update(step)
        return (loss * float("nan"), norm) if step >= 3 else (loss, norm)

    monkeypatch.setattr(run, "_update", spoiled)
    with pytest.raises(TrainingError, match=r"loss nan.*update 6.*learning rate.*precision no.*checkpoint-3"):
        run.train()
    assert [p.name for p in tmp_path.joinpath("run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_one_batch_can_be_learned_by_heart(tmp_path):
    run = trainer(
        tmp_path / "run",
        dropout=0.0,
        learning_rate=3e-3,
        lr_scheduler="constant",
        total_batch_size=64,
        lr_warmup_steps=0,
    )
    run.data = run.data.subset(torch.zeros(64, dtype=torch.long))
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


def test_the_paper_s_ema_has_its_full_decay_from_the_first_update(tmp_path, monkeypatch):
    paper = dataclasses.replace(training.TrainingConfig(preset="digits").resolved_preset(), ema_warmup=False)
    monkeypatch.setattr("ddpm_hf.presets.PRESETS", {"digits": paper})
    run = trainer(tmp_path / "run", ema_max_decay=0.9999)
    assert run.ema.get_decay(1) == 0.9999


def test_published_network_is_float32_and_has_the_preset_s_configuration(tmp_path):
    pipe = trainer(tmp_path / "run", mixed_precision="bf16").train()
    assert isinstance(pipe.unet, UNet2DModel)
    assert isinstance(pipe.scheduler, DDPMScheduler)
    assert pipe.unet.dtype == torch.float32
    assert pipe.scheduler.config.variance_type == PRESETS["digits"].scheduler["variance_type"]
