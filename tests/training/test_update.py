"""The update as a captured graph, rehearsed on the CPU: all that changes between updates lies in static tensors."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from test_trainer import small_preset, trainer  # noqa: F401  (the fixture, which is used by itself)

from ddpm_hf.diffusion.objectives import simple_loss
from ddpm_hf.training import update as training_update
from ddpm_hf.training.configuration import TrainingError
from ddpm_hf.training.update import CapturedUpdate
from ddpm_hf.utils.machine import DelayedScalar


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
    for found, expected in zip(*(run.update.powers.state_dict().values() for run in (graph, plain)), strict=True):
        assert torch.equal(found, expected)
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
    monkeypatch.setattr(training_update, "record", refuse)
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


def replace_ema(run):
    """Load half of the EMA weights: `load_state_dict` puts new tensors in the place of the old ones."""
    state = run.ema.state_dict()
    run.ema.load_state_dict({**state, "shadow_params": [weight / 2 for weight in state["shadow_params"]]})


def replace_moments(run):
    run._adam.load_state_dict(deepcopy(run._adam.state_dict()))


def replace_parameter(run):
    old = run.unet.conv_in.bias
    run.unet.conv_in.bias = torch.nn.Parameter(old.detach() + 1)
    (group,) = run._adam.param_groups
    group["params"] = [run.unet.conv_in.bias if p is old else p for p in group["params"]]


def change_adam(run):
    run._adam.param_groups[0]["betas"] = (0.8, 0.9)


def renew_generator(run):
    """As a capture of samples does that failed, with versions of PyTorch before 2.14."""
    training_update.cuda_graphs.renewals += isinstance(run.update, CapturedUpdate)


@pytest.mark.parametrize("replace", [replace_ema, replace_moments, replace_parameter, change_adam, renew_generator])
def test_what_is_replaced_from_python_is_captured_anew(tmp_path, monkeypatch, replace):
    plain, graph = trainer(tmp_path / "plain"), captured(trainer(tmp_path / "graph"))
    record, records = training_update.record, []
    monkeypatch.setattr(training_update, "record", lambda *which: records.append(len(records)) or record(*which))
    for step in range(4):
        if step == 2:
            assert records == [0]
            replace(plain)
            replace(graph)
        assert torch.equal(graph._update(step)[0], plain._update(step)[0])
    assert records == [0, 1]  # and once more is enough
    for found, expected in zip(graph.unet.parameters(), plain.unet.parameters(), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(graph.ema.shadow_params, plain.ema.shadow_params, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_lasting_gradients_that_are_dropped_are_captured_anew(tmp_path, monkeypatch):
    """With accumulation two graphs share the gradients."""
    options = {"gradient_accumulation_steps": 2, "total_batch_size": 4}
    plain, graph = trainer(tmp_path / "plain", **options), captured(trainer(tmp_path / "graph", **options))
    record, records = training_update.record, []
    monkeypatch.setattr(training_update, "record", lambda *which: records.append(len(records)) or record(*which))
    for step in range(3):
        if step == 1:
            graph.model.zero_grad(set_to_none=True)
        assert torch.equal(graph._update(step)[0], plain._update(step)[0])
    assert records == [0, 1, 2, 3]


def test_a_number_read_late_ends_a_run_at_the_next_check(tmp_path, monkeypatch):
    """As on a GPU, where the check reads what the check before has copied."""
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    run = trainer(tmp_path / "run", max_train_steps=60)
    run.update.skipped_on_host = DelayedScalar(run.update.skipped_in_a_row, delayed=True)
    run.update.objective = lambda *arguments: simple_loss(*arguments) * float("nan")
    for step in range(29):
        run._update(step)
        run.step += 1
    with pytest.raises(TrainingError, match=r"at update 30: 30 updates in a row were skipped"):
        run._update(29)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_after_a_capture_that_failed_a_gpu_draws_and_trains(tmp_path):
    plain, graph = (trainer(tmp_path / name, compile=False, cuda_graphs=False) for name in ("plain", "graph"))
    captured(graph)
    objective = graph.update.objective

    def synchronizing(*arguments, **options):
        losses = objective(*arguments, **options)
        if torch.cuda.is_current_stream_capturing():
            losses.sum().item()  # not allowed while capturing
        return losses

    graph.update.objective = synchronizing
    for step in range(3):
        torch.testing.assert_close(graph._update(step)[0], plain._update(step)[0], rtol=1e-2, atol=1e-2)
    assert graph.update._graphs == []
    torch.randn(3, device="cuda")
