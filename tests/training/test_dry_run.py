"""`--dry_run`: it says what a run takes, refuses what will not work, and leaves no trace."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_trainer import QUICK, same_files, small_preset, trainer, whole  # noqa: F401  (fixtures, used by themselves)

from ddpm_hf import cli
from ddpm_hf.training.configuration import TrainingError
from ddpm_hf.training.estimate import Pace, time_left
from ddpm_hf.utils.errors import UserError


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_dry_run_writes_nothing_and_says_what_the_run_takes(tmp_path, capsys):
    assert trainer(tmp_path / "new" / "run", dry_run=True, report_to="tensorboard").train() is None
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    # 6 updates of 16 of 1,501 images: 96 / 1501 = 0.0640 epochs
    assert "6 updates of 16 images (96 in all, 0.064 epochs)" in said
    assert re.search(r"s per update: about \d+ s for 6 updates, until ", said)  # 0, but for a busy machine
    assert "GB at most, of the " in said
    assert "2 kept" in said  # a checkpoint after update 3 and 6
    assert "Hub: no push (--push_to_hub)" in said


def test_the_disk_that_is_asked_for_is_what_a_run_takes(tmp_path, whole, monkeypatch, capsys):  # noqa: F811
    trainer(tmp_path / "run", dry_run=True).train()
    said = re.search(
        r"of (\S+) GB, (\d) kept, and (\d) snapshots of (\S+) GB for post-hoc EMA", capsys.readouterr().out
    )
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in whole.glob("checkpoint-*")]
    snapshots = [file.stat().st_size for file in (whole / "ema").glob("*.safetensors")]
    assert (int(said[2]), int(said[3])) == (len(sizes), len(snapshots))
    # two digits; names and headers of so small a network are a part of its files
    assert 1e9 * float(said[1]) == pytest.approx(max(sizes), rel=0.5)
    assert 1e9 * float(said[4]) == pytest.approx(max(snapshots), rel=0.5)
    assert max(snapshots) < max(sizes) / 3
    room = SimpleNamespace(free=3 * max(sizes))  # for the checkpoints alone
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(UserError, match="smaller checkpoints_total_limit or posthoc_ema_snapshots"):
        trainer(tmp_path / "run", dry_run=True, posthoc_ema_snapshots=6).train()
    trainer(tmp_path / "run", dry_run=True, posthoc_ema=False).train()
    assert "2 kept, in " in capsys.readouterr().out


def test_a_dry_run_of_a_time_says_how_many_updates_fit(tmp_path, capsys):
    limits = {"max_train_minutes": 50, "max_train_steps": 10**7, "checkpoints_total_limit": 2}
    run = trainer(tmp_path / "run", dry_run=True, **limits)
    run.train()
    said = re.search(r"time: (\S+) s per update: at most ([\d,]+) in the 50 minutes", capsys.readouterr().out)
    seconds, updates = float(said[1]), int(said[2].replace(",", ""))
    assert updates * seconds == pytest.approx(50 * 60 - run.seconds(), rel=0.02)  # three digits of the seconds


def test_a_resume_and_a_new_run_after_it_are_as_without_it(tmp_path, whole, capsys):  # noqa: F811
    shutil.copytree(whole / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    before = content(tmp_path)
    trainer(tmp_path / "run", resume_from_checkpoint="latest", dry_run=True).train()
    assert content(tmp_path) == before
    said = capsys.readouterr().out
    assert "3 updates of 16 images (48 in all" in said
    assert "resumed after update 3 of 6" in said
    trainer(tmp_path / "run", resume_from_checkpoint="latest").train()
    same_files(whole, tmp_path / "run", 6)
    assert "dry_run" not in (tmp_path / "run" / "training_config.yaml").read_text()
    before = content(tmp_path)
    trainer(tmp_path / "run", resume_from_checkpoint="latest", dry_run=True).train()
    assert content(tmp_path) == before
    assert "no update is left" in capsys.readouterr().out


def test_what_will_not_work_is_a_sentence(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", dry_run=True)
    with torch.no_grad():
        next(run.unet.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss of update 1 is nan"):
        run.train()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"too little space for checkpoints of .* 2 kept.*checkpoints_total_limit"):
        trainer(tmp_path / "run", dry_run=True).train()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write to output_dir"):
        trainer(tmp_path / "file" / "run", dry_run=True).train()


def test_commands_that_train_have_it(tmp_path, whole, capsys):  # noqa: F811
    small = ["--dry_run", "--total_batch_size", "4", "--output_dir", str(tmp_path / "run")]
    assert cli.main(["distill", "--model", str(whole), "--steps", "2", "--teacher_steps", "4", *small]) == 0
    assert cli.main(["reproduce", "--preset", "digits", "--features", "pixels", "--num_samples", "10", *small]) == 0
    assert capsys.readouterr().out.count("nothing was written") == 2
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_is_given_once_of_updates_after_the_first_reading(monkeypatch):
    clock = iter([100.0, 104.0, 111.0, 130.0, 131.0, 142.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    pace = Pace()
    assert pace.estimate(1, 1000) is None  # what was before this reading, a compilation, does not count
    assert pace.estimate(41, 1000) is None  # too short
    pace.restart()  # a sample grid
    assert pace.estimate(101, 1000) is None
    said = pace.estimate(196, 1000)  # 95 updates in 19 s: 0.2 s each, 804 are left: 160.8 s
    assert said.startswith("0.2 s per update: about 3 min for 804 updates, until ")
    assert "measured over 95;" in said
    assert [pace.estimate(step, 1000) for step in (200, 300)] == [None, None]


def test_an_end_far_away_is_a_date_with_its_year():
    assert re.search(r"about 400 days for 400 updates, until \d\d \w+ \d{4}$", time_left(86_400, 400))
