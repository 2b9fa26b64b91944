"""Trackers: the real tensorboard's files, the real trackio's database, and what others are given."""

import io
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import small_preset, trainer  # noqa: F401  (the fixture, which is used by itself)
from trackio.sqlite_storage import SQLiteStorage
from trackio.utils import MEDIA_DIR

from ddpm_hf.training import trainer as training_trainer
from ddpm_hf.training.tracking import PROJECT, known_trackers
from ddpm_hf.utils.errors import UserError


def test_tensorboard_gets_numbers_and_grids_at_their_updates(tmp_path):
    settings = {"validation_steps": 2, "save_images_steps": 3, "logging_steps": 4}
    trainer(tmp_path / "run", report_to="tensorboard", **settings).train()
    events = EventAccumulator(str(next((tmp_path / "run" / "logs").rglob("events.out.*")).parent))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "images_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [4, 6]
    assert [event.step for event in events.Scalars("bits_per_dim")] == [2, 4, 6]
    grids, curves = (
        {event.step: event.encoded_image_string for event in events.Images(name)} for name in ("samples", "curve")
    )
    assert list(curves) == [2, 4, 6]
    assert same_picture(io.BytesIO(curves[6]), tmp_path / "run" / "curve.png")
    assert list(grids) == [3, 6]
    for step, name in {3: "samples-3.png", 6: "samples.png"}.items():
        assert same_picture(io.BytesIO(grids[step]), tmp_path / "run" / name)


def same_picture(one, two) -> bool:
    pixels = [np.asarray(Image.open(file).convert("RGB")) for file in (one, two)]
    return np.array_equal(*pixels)


def test_trackio_gets_numbers_and_grids_and_a_resumed_run_continues_its_curves(tmp_path):
    settings = {"report_to": "trackio", "logging_steps": 2, "max_train_steps": 5}
    trainer(tmp_path / "first", **settings).train()
    folder = tmp_path / "second"
    shutil.copytree(tmp_path / "first" / "checkpoint-3", folder / "checkpoint-3")
    for more in ({"output_dir": str(tmp_path / "first2")}, {"resume_from_checkpoint": "latest"}):
        trainer(**{"output_dir": str(folder), **settings, **more}).train()

    def logs(run: str) -> list[dict]:
        return SQLiteStorage.get_logs(PROJECT, run)

    assert sorted(SQLiteStorage.get_runs(PROJECT)) == ["first", "first2", "second"]
    assert [entry["step"] for entry in logs("first") if "loss" in entry] == [2, 4, 5]
    assert [entry["step"] for entry in logs("second") if "loss" in entry] == [4, 5]
    assert [entry["step"] for entry in logs("first") if "bits_per_dim" in entry] == [5]
    (grid,) = (entry for entry in logs("first") if "samples" in entry)
    assert grid["step"] == 5
    assert grid["samples"]["_type"] == "trackio.image"
    assert same_picture(MEDIA_DIR / grid["samples"]["file_path"], tmp_path / "first" / "samples.png")
    config = SQLiteStorage.get_run_config(PROJECT, "first")
    assert (config["preset"], config["max_train_steps"]) == ("digits", 5)
    assert "hub_token" not in config


def test_what_trackers_are_asked_for(tmp_path, monkeypatch):
    """A Space of trackio's is private; wandb and swanlab take pictures in lists; others get numbers only."""
    started, shown = {}, []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, project, **options: started.update(options))
    run = trainer(tmp_path / "name", report_to="trackio")
    run.tracking.start(resumed=True)
    assert started["init_kwargs"]["wandb"] == {"name": "name"}
    assert started["init_kwargs"]["trackio"]["private"] is True
    assert started["init_kwargs"]["trackio"]["resume"] == "allow"
    run.tracking.start(resumed=False)
    assert started["init_kwargs"]["trackio"]["resume"] == "never"
    tracker = SimpleNamespace(log_images=lambda *values, **options: shown.append((values, options)))
    run.accelerator.trackers = [SimpleNamespace(name="comet_ml"), SimpleNamespace(name="wandb", **vars(tracker))]
    run.tracking.picture(7, "samples", picture := Image.new("L", (4, 4)))
    assert shown == [(({"samples": [picture]},), {"step": 7})]


def test_curves_of_two_runs_and_of_a_resumed_one_share_their_updates(tmp_path, monkeypatch):
    """Whatever the clock says; the oracle is what each update returned."""

    def curves(name, seconds, **settings):
        monkeypatch.setattr(training_trainer, "_SECONDS_BETWEEN_READINGS", seconds)
        run = trainer(tmp_path / name, report_to="tensorboard", logging_steps=2, max_train_steps=7, **settings)
        update, returned = run._update, {}

        def noted(step):
            returned[step + 1] = update(step)
            return returned[step + 1]

        monkeypatch.setattr(run, "_update", noted)
        run.train()
        events = EventAccumulator(str(next((tmp_path / name / "logs").rglob("events.out.*")).parent))
        events.Reload()
        shown = {key: {e.step: e.value for e in events.Scalars(key)} for key in ("loss", "grad_norm", "lr")}
        for place, key in enumerate(("loss", "grad_norm")):
            assert shown[key] == {step: pytest.approx(returned[step][place].item()) for step in shown[key]}
        return shown

    slow, fast = curves("slow", 1e9, validation_steps=3), curves("fast", 0.0)
    assert list(slow["loss"]) == [2, 4, 6, 7]
    assert slow == fast
    shutil.copytree(tmp_path / "slow" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    shutil.copy(tmp_path / "slow" / "training_config.yaml", tmp_path / "resumed")
    resumed = curves("resumed", 1e9, resume_from_checkpoint="latest")
    assert resumed == {key: {s: v for s, v in curve.items() if s > 3} for key, curve in slow.items()}


@pytest.mark.parametrize(
    ("text", "trackers"),
    [
        (None, []),
        ("none", []),
        ("None", []),
        ("tensorboard", ["tensorboard"]),
        ("TensorBoard, tensorboard", ["tensorboard"]),
        ("all", [str(name) for name in get_available_trackers()]),
    ],
)
def test_which_trackers(text, trackers, tmp_path):
    assert known_trackers(text) == trackers
    with pytest.raises(ValueError, match="'wandbb' is not an installed tracker"):
        trainer(tmp_path / "other", report_to="wandbb")
    for several, alone in {"tensorboard,none": "none", "all, tensorboard": "all"}.items():
        with pytest.raises(UserError, match=f"report_to='{alone}' stands alone, got '{several}'; leave out"):
            known_trackers(several)


def test_all_trackers_where_none_is_installed(monkeypatch):
    monkeypatch.setattr("ddpm_hf.training.tracking.get_available_trackers", list)
    assert known_trackers("none") == []
    with pytest.raises(UserError, match=r"no tracker is installed; pip install 'ddpm-hf\[train\]' first, or"):
        known_trackers("all")


def test_images_per_second_are_those_of_updates(tmp_path, monkeypatch, capsys):
    now, noted = [0.0], {}

    def take(seconds, method):
        def slow(*arguments, **options):
            now[0] += seconds
            return method(*arguments, **options)

        return slow

    monkeypatch.setattr(training_trainer.time_limit, "clock", lambda: now[0])
    run = trainer(tmp_path / "run", validation_steps=2, save_images_steps=3, logging_steps=1)
    monkeypatch.setattr(run, "_update", take(2, run._update))
    monkeypatch.setattr(run.publisher, "show", take(1000, lambda *_: None))
    monkeypatch.setattr(run.publisher, "complete", lambda *_: None)
    monkeypatch.setattr(run.tracking, "note", lambda step, loss, norm, numbers: noted.update({step: numbers}))
    run.train()
    # 16 images in the 2 s of an update, whatever was shown after updates 2, 3 and 4
    assert {step: numbers["images_per_second"] for step, numbers in noted.items()} == dict.fromkeys(range(1, 7), 8.0)
    assert "trained 6 updates in 12.0 s, 8 images/s" in capsys.readouterr().out


def test_a_tracker_that_cannot_start_is_a_sentence(tmp_path, monkeypatch):
    def not_logged_in(self, *_, **__):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(Accelerator, "init_trackers", not_logged_in)
    with pytest.raises(UserError, match="report_to tensorboard cannot start: api_key not configured"):
        trainer(tmp_path / "run", report_to="tensorboard").train()
