"""The update as a captured graph, rehearsed on the CPU: all that changes between updates lies in static tensors."""

import pytest
import torch
from test_trainer import trainer

from ddpm_hf.training import update as training_update
from ddpm_hf.training.update import CapturedUpdate


def captured(run):
    """The run with a captured update in place of its plain one."""
    run.update = CapturedUpdate.of(run.update)
    return run


OPTIONS = [
    {},
    {"train_batch_size": 2, "gradient_accumulation_steps": 2, "total_batch_size": 4},
    {"class_conditional": True, "class_dropout": 0.3, "mixed_precision": "bf16"},
    {"dropout": 0.3, "channels_last": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_a_captured_update_is_the_same_update(tmp_path, options):
    plain, graph = trainer(tmp_path / "plain", **options), captured(trainer(tmp_path / "graph", **options))
    for step in range(5):
        results = [run._update(step) for run in (plain, graph)]
        for found, expected in zip(results[1], results[0], strict=True):
            assert torch.equal(found, expected)  # loss and gradient norm
        plain.step = graph.step = step + 1
    for found, expected in zip(graph.unet.parameters(), plain.unet.parameters(), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(graph.ema.shadow_params, plain.ema.shadow_params, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # a - w (a - b), rounded at other places
    for key, state in plain._adam.state.items():
        mine = graph._adam.state[dict(zip(plain.unet.parameters(), graph.unet.parameters(), strict=True))[key]]
        assert all(torch.equal(mine[name], value) for name, value in state.items())
    assert graph.ema.optimization_step == plain.ema.optimization_step == 5
    assert graph.lr_schedule.get_last_lr() == plain.lr_schedule.get_last_lr()


def test_a_run_with_captured_updates_resumes_to_the_same_bits(tmp_path):
    options = {"max_train_steps": 6, "checkpointing_steps": 3, "eval_num_images": 0}
    whole = captured(trainer(tmp_path / "whole", **options))
    whole.train()
    part = captured(trainer(tmp_path / "part", **{**options, "max_train_steps": 3}))
    part.train()
    resumed = captured(trainer(tmp_path / "part", **options, resume_from_checkpoint="latest"))
    assert resumed.step == 3
    resumed.train()
    for found, expected in zip(resumed.unet.parameters(), whole.unet.parameters(), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(resumed.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA error: not permitted when stream is capturing\nmore of it"), "not permitted when stream"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_a_capture_that_fails_is_said_and_the_updates_are_made_without(
    tmp_path, monkeypatch, capsys, accumulation, error, reason
):
    def refuse(run, cuda):
        raise error

    options = {"gradient_accumulation_steps": accumulation, "total_batch_size": 4}
    plain = trainer(tmp_path / "plain", **options)
    graph = captured(trainer(tmp_path / "graph", **options))
    monkeypatch.setattr(training_update, "_record", refuse)
    read, micro_batch = [], graph.batches.micro_batch
    monkeypatch.setattr(graph.batches, "micro_batch", lambda *which: read.append(which[:2]) or micro_batch(*which))
    for step in range(3):
        assert graph._update(step)[0].item() == plain._update(step)[0].item()
    assert read == [(step, micro) for step in range(3) for micro in range(accumulation)]  # a stream is read once
    for found, expected in zip(graph.unet.parameters(), plain.unet.parameters(), strict=True):
        assert torch.equal(found, expected)
    said = capsys.readouterr().out
    assert said.count("could not be captured") == 1
    assert reason in said
    assert "more of it" not in said


def test_what_fails_without_a_capture_too_is_raised_and_changes_nothing(tmp_path):
    graph = captured(trainer(tmp_path / "graph"))
    before = [weight.clone() for weight in (*graph.unet.parameters(), *graph.ema.shadow_params)]
    real, calls = graph.update.objective, []

    def too_large(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, **options)

    graph.update.objective = too_large
    with pytest.raises(torch.OutOfMemoryError):
        graph._update(0)
    after = (*graph.unet.parameters(), *graph.ema.shadow_params)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
