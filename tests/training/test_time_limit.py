"""Runs that end at a time, by a clock of the test: it moves by a second per update, and by what the test adds."""

import json
import math
from functools import partialmethod

import pytest
import torch
from diffusers.optimization import get_scheduler
from programs import ROOT, run_ranks
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline, Trainer, TrainingConfig, UNet2DModel
from ddpm_hf.training import time_limit
from ddpm_hf.training.configuration import TrainingError
from ddpm_hf.training.publishing import Publisher
from ddpm_hf.training.time_limit import TimeLimit

RUN = {
    "preset": "digits",
    "total_batch_size": 4,
    "lr_warmup_steps": 4,
    "num_sample_images": 1,
    "eval_num_images": 0,
    "sampler": "ddim",
    "ddpm_num_inference_steps": 1,
    "posthoc_ema": False,
}


class Clock:
    now, seconds = 0.0, 1.0

    def __init__(self):
        self.rates = []  # the learning rate of each update
        self.before = lambda step: None  # what the test does before an update

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves: an update takes `seconds`, the end of a run 5 (writing about 0)."""
    clock = Clock()
    update = Trainer._update

    def timed(self, step):
        clock.before(step)
        clock.rates.append(self._adam.param_groups[0]["lr"])
        clock.now += clock.seconds if step else 10  # the first one compiles
        return update(self, step)

    monkeypatch.setattr(time_limit, "clock", clock)
    monkeypatch.setattr(Trainer, "_update", timed)
    monkeypatch.setattr(Publisher, "seconds_to_complete", lambda self, weights, step: {"grid": 5.0, "numbers": 0.0})
    return clock


def takes(clock, monkeypatch, **seconds):
    """Let a grid, the numbers or a checkpoint of every run take so many seconds of the clock."""
    owners = {"grid": (Publisher, "sample_grid"), "numbers": (Publisher, "_measure")}
    owners |= {"checkpoint": (Trainer, "_write_checkpoint"), "card": (Publisher, "_write_card")}

    def slow(self, make, cost, *arguments):
        clock.now += cost
        return make(self, *arguments)

    for what, cost in seconds.items():
        owner, name = owners[what]
        monkeypatch.setattr(owner, name, partialmethod(slow, getattr(owner, name), cost))


def stop(clock, trainer, at):
    """Train until a Ctrl-C in the update after so many."""

    def stopped(step):
        if step == at:
            raise KeyboardInterrupt

    clock.before = stopped
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def run(folder, **settings) -> Trainer:
    return Trainer(TrainingConfig(**{**RUN, "output_dir": str(folder), **settings}))


def test_a_steady_clock_gives_the_run_of_so_many_updates_bit_for_bit(clock, tmp_path, capsys):
    timed = run(tmp_path / "timed", max_train_minutes=1.0)
    timed.train()
    # 60 s - 10 s of the first update - 5 s of the end, less the writing, which is below 1 s: 44 further updates
    assert timed.step == 45
    assert clock.now == 54
    assert (
        "1 minutes are about 45 updates; kept for the end: 1 s to write the model and 5 s" in capsys.readouterr().out
    )
    # linear warm-up, then half a cosine
    expected = [min(n / 4, 0.5 + 0.5 * math.cos(math.pi * max(0, n - 4) / 41)) for n in range(45)]
    assert clock.rates == pytest.approx([3e-3 * share for share in expected], rel=1e-12)
    run(tmp_path / "counted", max_train_steps=45).train()
    a, b = (load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("timed", "counted"))
    assert all((a[key] == b[key]).all() for key in a)
    card = (tmp_path / "timed" / "README.md").read_text()
    assert "45 of 4 images, seed 0; planned for 1 minutes" in card


def test_a_slower_machine_ends_in_time_and_at_zero(clock, tmp_path):
    trainer = run(tmp_path / "run", max_train_minutes=1.0)

    def slower(step):
        clock.seconds = 1.0 if step < 15 else 2.5

    clock.before = slower
    trainer.train()
    assert 50 < clock.now <= 55  # and the end takes 5 s
    assert trainer.step < 45
    falling = clock.rates[4:]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.02 * falling[0]


def test_a_resumed_run_counts_the_time_before(clock, tmp_path, capsys):
    folder = tmp_path / "run"
    first = run(folder, max_train_minutes=1.0, checkpointing_steps=10)

    stop(clock, first, 20)
    state = json.loads((folder / "checkpoint-20" / "state.json").read_text())
    assert state["seconds"] == 29  # 10 + 19
    clock.now += 1000  # nobody is charged for the time between
    again = run(folder, max_train_minutes=1.0, resume_from_checkpoint="latest")
    start, clock.before, clock.rates = clock.now, lambda step: None, []
    again.train()
    assert again.step == 45
    assert clock.now - start == 25
    plan = state["time_limit"]
    progress = plan["done"] + (1 - plan["done"]) * (20 - plan["from"]) / (plan["last"] - plan["from"])
    assert clock.rates[0] == pytest.approx(3e-3 * (0.5 + 0.5 * math.cos(math.pi * progress)), rel=1e-12)
    assert clock.rates == sorted(clock.rates, reverse=True)
    assert clock.rates[-1] < 0.01 * 3e-3
    assert "resumed after update 20" in capsys.readouterr().out


def test_a_finished_run_continues_where_it_gets_more_minutes(clock, tmp_path):
    folder = tmp_path / "run"
    run(folder, max_train_minutes=0.5).train()
    resume = {"resume_from_checkpoint": "latest"}
    again = run(folder, max_train_minutes=0.5, **resume)
    again.train()
    assert again.step == 15  # 30 s - 10 s - 5 s, with the first update
    clock.rates = []
    longer = run(folder, max_train_minutes=1.0, **resume)
    longer.train()
    assert 50 < longer.seconds() <= 55
    assert longer.step == 45
    assert clock.rates[0] > 0.9 * 3e-3
    assert clock.rates == sorted(clock.rates, reverse=True)
    assert clock.rates[-1] < 0.01 * 3e-3


def test_the_curve_keeps_when_an_update_was_reached(clock, tmp_path):
    settings = {"max_train_steps": 4, "validation_steps": 2, "eval_num_images": 1, "eval_num_evaluations": 2}
    run(tmp_path / "run", max_train_minutes=1.0, **settings).train()
    again = run(tmp_path / "run", max_train_minutes=1.0, **settings, resume_from_checkpoint="latest")
    clock.now += 4  # measured again, later
    again.train()
    curve = json.loads((tmp_path / "run" / "curve.json").read_text())
    assert [(entry["update"], entry["seconds"]) for entry in curve] == [(2, 11), (4, 13)]


def test_a_constant_rate_begins_to_fall_where_a_run_gets_a_time(clock, tmp_path):
    run(tmp_path / "run", max_train_steps=8, lr_scheduler="constant").train()
    clock.rates = []
    settings = {"max_train_minutes": 1.0, "max_train_steps": 20, "lr_scheduler": "cosine"}
    run(tmp_path / "run", resume_from_checkpoint="latest", **settings).train()
    expected = [3e-3 * (0.5 + 0.5 * math.cos(math.pi * n / 12)) for n in range(12)]
    assert clock.rates == pytest.approx(expected, rel=1e-9)


def test_a_run_whose_time_was_used_up_is_finished(clock, tmp_path, capsys):
    run(tmp_path / "run", max_train_steps=8, checkpointing_steps=4).train()
    (tmp_path / "run" / "checkpoint-8").rename(tmp_path / "checkpoint-8")
    late = run(tmp_path / "run", max_train_minutes=0.1, resume_from_checkpoint="latest", max_train_steps=100)
    late.train()
    assert late.step == 5
    assert "the time is used up after update 5" in capsys.readouterr().out
    DDPMPipeline.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(("minutes", "at"), [(0.2, 1), (0.27, 2), (0.28, 3)])
def test_a_time_that_is_too_short_is_one_sentence(clock, tmp_path, minutes, at):
    trainer = run(tmp_path / "run", max_train_minutes=minutes)
    with pytest.raises(TrainingError, match=rf"max_train_minutes={minutes} is too short: .* give 0\.5 or more"):
        trainer.train()
    assert trainer.step == at
    clock.now = 0.0
    run(tmp_path / "run", max_train_minutes=0.5).train()  # the folder can be used again


def test_a_grid_that_took_long_shortens_the_rest(clock, tmp_path, monkeypatch):
    takes(clock, monkeypatch, grid=20)
    trainer = run(tmp_path / "run", max_train_minutes=2.0, save_images_steps=30)
    trainer.train()
    # 120 s: 9 + n for the updates, 20 for the grid after update 30, and 20 for that at the end leave 71 updates; one
    # after update 60 would leave less than 60. So the grid at the end is that of update 60, where the plan ends.
    assert trainer.step == 60
    assert clock.now == 9 + 60 + 20 + 20
    assert clock.rates[-1] < 0.02 * 3e-3


def test_what_is_done_at_different_intervals_is_counted_by_its_own_time(clock, tmp_path, monkeypatch):
    takes(clock, monkeypatch, grid=2, numbers=31, checkpoint=4)
    steps = {"save_images_steps": 10, "validation_steps": 40, "checkpointing_steps": 20}
    trainer = run(tmp_path / "run", max_train_minutes=4.0, eval_num_images=1, **steps)
    trainer.train()
    n = trainer.step
    assert clock.now == 9 + n + 2 * ((n - 1) // 10 + 1) + 31 * ((n - 1) // 40 + 1) + 4 * ((n - 1) // 20 + 1)
    # The numbers at the end take 31 s, though a grid of 2 s was the last thing that took time.
    assert n % 40 not in (0, 1)
    assert 240 - 0.5 * 4 - 1 <= clock.now <= 240  # half a checkpoint's time is kept for the model
    assert clock.rates[-1] < 0.02 * 3e-3


def test_numbers_that_take_longer_than_the_updates_between_them_leave_time_for_updates(clock, tmp_path, monkeypatch):
    estimate = {"grid": 0.0, "numbers": 20.0}
    monkeypatch.setattr(Publisher, "seconds_to_complete", lambda self, weights, step: estimate)
    takes(clock, monkeypatch, numbers=20)
    trainer = run(tmp_path / "run", max_train_minutes=2.0, validation_steps=10, eval_num_images=1)
    trainer.train()
    # Two evaluations on the way; the third would leave the 31 seconds for update 31, but none to write the model.
    assert (trainer.step, clock.now) == (30, 9 + 30 + 2 * 20 + 20)


def test_time_is_kept_for_small_files_too(clock, tmp_path, monkeypatch):
    clock.seconds = 0.1
    takes(clock, monkeypatch, grid=5, card=0.2)
    trainer = run(tmp_path / "run", max_train_minutes=0.5)
    trainer.train()
    assert 29.5 < trainer.seconds() <= 30.0  # two cards among it


def test_a_second_update_that_compiles_again_is_no_measure(clock, tmp_path):
    def again(step):
        clock.seconds = 30.0 if step == 1 else 1.0

    clock.before = again
    trainer = run(tmp_path / "run", max_train_minutes=1.0)
    trainer.train()
    assert trainer.step == 2 + 14  # 60 s - 10 s - 30 s - 5 s, less the writing
    assert clock.rates[4] == 3e-3  # no plan of a slow machine has begun the decay before


def test_a_resumed_run_keeps_time_for_what_was_measured_last(clock, tmp_path, monkeypatch):
    settings = {"max_train_minutes": 2.0, "validation_steps": 20, "checkpointing_steps": 10, "eval_num_images": 1}
    takes(clock, monkeypatch, numbers=15)
    first = run(tmp_path / "run", **settings)

    stop(clock, first, 30)
    clock.before = lambda step: None
    again = run(tmp_path / "run", **settings, resume_from_checkpoint="latest")
    again.train()
    assert 100 < again.seconds() <= 120


@pytest.mark.parametrize(
    ("sampler", "steps", "grid", "numbers"), [("ddim", 1, 4 * 2, 4 * 30), ("heun", 8, 2 * 2 * 15, 2 * 30)]
)
def test_the_end_is_estimated_from_the_networks_own_time(tmp_path, monkeypatch, sampler, steps, grid, numbers):
    settings = {"num_sample_images": 2, "eval_num_images": 3, "eval_num_evaluations": 10}
    trainer = run(tmp_path / "run", **settings, sampler=sampler, ddpm_num_inference_steps=steps)
    ticks = iter(range(0, 1000, 8))
    monkeypatch.setattr("ddpm_hf.training.publishing.time.monotonic", lambda: next(ticks))
    # The grid needs 2 x 1 evaluations, the likelihood 3 x 10. 8 s are for 2 images of one step: 4 s an evaluation; or
    # for two steps of Heun's 2 x 8 - 1.
    estimate = trainer.publisher.seconds_to_complete(trainer._ema_state_dict(), 1)
    assert estimate == pytest.approx({"grid": grid, "numbers": numbers})


@pytest.mark.parametrize("posthoc_ema", [False, True])
def test_a_checkpoint_is_expected_to_be_as_large_as_it_is_on_the_disk(clock, tmp_path, monkeypatch, posthoc_ema):
    expected = []
    monkeypatch.setattr(TimeLimit, "expect", lambda self, seconds: expected.append(seconds["checkpoint"]))
    run(tmp_path / "run", max_train_minutes=1.0, max_train_steps=1, posthoc_ema=posthoc_ema).train()
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoint-1").glob("*.safetensors"))
    assert expected == [pytest.approx(size / 1e8, rel=0.02)]  # at 100 MB/s; files have headers


def test_the_estimate_follows_the_runs_own_chain_and_warns_of_no_short_one(tmp_path, monkeypatch):
    trainer, seen = run(tmp_path / "run", ddpm_num_inference_steps=1000), []
    forward = UNet2DModel.forward

    def recorded(self, sample, timestep, *arguments, **options):
        seen.append(int(timestep))
        return forward(self, sample, timestep, *arguments, **options)

    monkeypatch.setattr(UNet2DModel, "forward", recorded)
    trainer.publisher.seconds_to_complete(trainer._ema_state_dict(), 1)
    assert seen == [999, 998] * 2


def test_too_little_memory_for_the_estimate_names_the_flag_of_the_samples(tmp_path, monkeypatch):
    trainer = run(tmp_path / "run", max_train_minutes=1.0)

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DDPMPipeline, "denoise", full)
    with pytest.raises(TrainingError, match=r"samples and numbers after update 1; give a smaller eval_batch_size"):
        trainer.train()


def test_two_processes_end_at_the_update_that_the_first_ones_clock_decides(tmp_path):
    command = [str(ROOT / "tests" / "driver_time_limit.py"), str(tmp_path / "run")]
    ends = run_ranks(command, command)
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-2000:]
    first, second = (json.loads(end.stdout.splitlines()[-1]) for end in ends)
    # 60 s - 5 s for the end, less a moment for the files; the grid after update 25 takes no time, nor then does the
    # one at the end: 59 updates. By the second clock there would be 19.
    assert first == {"updates": 59, "rate": [0.0], "written": [59]}
    assert second == {"updates": 59, "rate": [0.0], "written": []}
    weights = load_file(tmp_path / "run" / "unet/diffusion_pytorch_model.safetensors")
    ema = load_file(tmp_path / "run" / "checkpoint-59" / "ema.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in ema.items())


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_schedules_are_those_of_diffusers(decay):
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if decay == "constant" else decay
    stock = get_scheduler(name, adam, num_warmup_steps=5, num_training_steps=40)
    counts = {"max_train_steps": 40, "lr_warmup_steps": 5}
    config = TrainingConfig(preset="digits", max_train_minutes=1.0, lr_scheduler=decay, **counts)
    limit = TimeLimit(config, config.resolved_preset(), lambda: 0.0)
    for step in range(41):
        assert limit.factor(step) == pytest.approx(stock.get_last_lr()[0], abs=1e-12)
        adam.step()
        stock.step()


def test_the_papers_constant_rate_becomes_a_cosine_unless_it_is_asked_for():
    assert TrainingConfig(max_train_minutes=5).resolved_preset().lr_scheduler == "cosine"
    assert TrainingConfig(max_train_minutes=5, lr_scheduler="linear").resolved_preset().lr_scheduler == "linear"
    assert TrainingConfig(max_train_minutes=5, lr_scheduler="constant").resolved_preset().lr_scheduler == "constant"
    assert TrainingConfig().resolved_preset().lr_scheduler == "constant"
