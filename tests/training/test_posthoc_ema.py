"""Post-hoc EMA: its mathematics against quadrature, its averages against directly tracked ones, what is on disk."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import advance, small_preset, trainer  # noqa: F401  (the fixture, which is used by itself)

from ddpm_hf import TrainingConfig
from ddpm_hf.training.posthoc_ema import (
    LONGEST,
    TRACKED,
    Snapshots,
    coefficients,
    gamma_of,
    inner_product,
    is_due,
    list_snapshots,
)
from ddpm_hf.utils.errors import UserError

NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


def integral(function, end: float) -> float:
    """From 0 to `end`, by Gauss's quadrature."""
    return float((WEIGHTS * function((NODES + 1) * end / 2)).sum() * end / 2)


@pytest.mark.parametrize("sigma_rel", [0.005, 0.02, 0.05, 0.1, 0.15, 0.25, LONGEST])
def test_the_exponent_gives_the_profile_its_width(sigma_rel):
    gamma, t = gamma_of(sigma_rel), 3.0
    profile = lambda tau: (gamma + 1) * tau**gamma / t ** (gamma + 1)  # noqa: E731
    mean = integral(lambda tau: tau * profile(tau), t)
    assert integral(profile, t) == pytest.approx(1, rel=1e-9)
    width = math.sqrt(integral(lambda tau: (tau - mean) ** 2 * profile(tau), t))
    assert width == pytest.approx(sigma_rel * t, rel=1e-7)


def test_the_paper_s_exponents():
    """Section 3.1 of Karras et al. (2024) names them."""
    assert [round(gamma_of(length), 2) for length in TRACKED] == [16.97, 6.94]


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 1e-200, 0.29, math.nan])
def test_widths_that_no_profile_has(sigma_rel):
    with pytest.raises(UserError, match=r"at most 0\.2887"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("a", [(0.05, 700.0), (0.2, 1000.0)])
@pytest.mark.parametrize("b", [(0.05, 700.0), (0.1, 1000.0), (0.12, 300.0)])
def test_inner_products_are_integrals(a, b):
    remaining = [lambda tau, s=s, t=t: 1 - (tau / t) ** (gamma_of(s) + 1) for s, t in (a, b)]
    expected = integral(lambda tau: remaining[0](tau) * remaining[1](tau), min(a[1], b[1]))
    assert inner_product(a, b) == pytest.approx(expected, rel=1e-9)
    assert inner_product(b, a) == pytest.approx(expected, rel=1e-9)


def test_the_predicted_error_is_that_of_random_walks():
    """Many one-dimensional weights, whose averages are sums over their steps."""
    random, updates = np.random.default_rng(0), 400
    weights = random.normal(size=(updates, 4000)).cumsum(axis=0)
    known, wanted = [(length, t) for t in (250, 400) for length in TRACKED], (0.15, 400)

    def average(sigma_rel, t):
        grown = np.minimum(np.arange(updates + 1) / t, 1) ** (gamma_of(sigma_rel) + 1)
        return np.diff(grown) @ weights

    x, predicted = coefficients(known, wanted)
    assert x.sum() == pytest.approx(1)
    exact = average(*wanted)
    error = np.linalg.norm(sum(c * average(*one) for c, one in zip(x, known, strict=True)) - exact)
    assert predicted == pytest.approx(error / np.linalg.norm(exact - weights[-1]), rel=0.1)
    for i in range(len(known)):  # no other combination is better
        other = x + 0.02 * (np.eye(len(known))[i] - x)
        moved = np.linalg.norm(sum(c * average(*one) for c, one in zip(other, known, strict=True)) - exact)
        assert moved > 0.99 * error


def test_what_is_known_is_reconstructed_as_it_is():
    known = [(length, t) for t in (100, 160, 200) for length in TRACKED]
    for i, one in enumerate(known):
        x, error = coefficients(known, one)
        assert x == pytest.approx(np.eye(len(known))[i], abs=1e-3)
        assert error < 3e-4


# ------------------------------------------------------------------ a run

LENGTHS = (0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.125, 0.15)
UPDATES = 300


@pytest.fixture(scope="module")
def tracked(small_preset, tmp_path_factory) -> tuple[Path, dict]:  # noqa: F811
    """A run with more snapshots than by default, and averages that were tracked beside it in float64."""
    options = {"max_train_steps": UPDATES, "total_batch_size": 4, "posthoc_ema_snapshots": 8, "dropout": 0.0}
    run = trainer(tmp_path_factory.mktemp("tracked") / "run", checkpointing_steps=1000, eval_num_images=0, **options)
    averages = dict.fromkeys(LENGTHS, 0.0)
    update = run._update

    def also_track(step):
        result, t = update(step), step + 1
        weights = torch.cat([w.detach().double().flatten() for w in run.unet.parameters()])
        for length, before in averages.items():  # beta(t) = (1 - 1/t)^(gamma + 1)
            beta = (1 - 1 / t) ** (gamma_of(length) + 1)
            averages[length] = beta * before + (1 - beta) * weights
        return result

    run._update = also_track
    run.train()
    return run.output_dir, averages


def relative_error(snapshots: Snapshots, length: float, expected: torch.Tensor) -> float:
    weights = snapshots.pipeline(length, UPDATES).unet.parameters()
    found = torch.cat([w.detach().double().flatten() for w in weights])
    return float((found - expected).norm() / expected.norm())


def test_reconstructions_are_the_averages_tracked_directly(tracked):
    """Measured with 8 snapshots: 5e-4 for 0.03, else at most 3e-4, where float16 alone makes 2e-4."""
    folder, averages = tracked
    snapshots = Snapshots(folder)
    assert list(snapshots.files) == [64, 81, 102, 128, 161, 203, 256, 300]
    for length, expected in averages.items():
        assert relative_error(snapshots, length, expected) < (1e-3 if length < 0.04 else 5e-4), length


def test_reconstructions_from_as_many_snapshots_as_a_run_keeps_by_default(tracked, tmp_path):
    """Measured: 5e-4 for 0.03, 1.1e-3 for 0.15, at most 3e-4 in between."""
    (tmp_path / "ema").mkdir()
    for path in list(list_snapshots(tracked[0]).values())[-TrainingConfig().posthoc_ema_snapshots :]:
        shutil.copy(path, tmp_path / "ema")
    snapshots = Snapshots(tmp_path)
    assert list(snapshots.files) == [203, 256, 300]
    for length, expected in tracked[1].items():
        assert relative_error(snapshots, length, expected) < (2e-3 if length > 0.125 else 1e-3), length
    for length in (0.01, 0.25):
        with pytest.raises(
            UserError, match=r"cannot be had after update 300 from .* 203, 256, 300: .*: 0\.03 to 0\.205$"
        ):
            snapshots.check(length, UPDATES)


def test_averages_end_after_earlier_updates_too(tracked):
    """At a snapshot's update the lengths that are tracked are known exactly, but for float16."""
    snapshots = Snapshots(tracked[0])
    stored = load_file(snapshots.files[256])
    for name, weight in snapshots.pipeline(0.1, 256).unet.named_parameters():
        assert torch.allclose(weight, stored[f"0.1/{name}"].float(), rtol=1e-3, atol=1e-6)
    assert snapshots.check(0.15, 250)[1] < 0.1
    for update in (0, 301):
        with pytest.raises(UserError, match=f"step={update} .* up to 300"):
            snapshots.check(0.1, update)


def test_snapshots_are_as_large_as_the_weights(tracked):
    folder, _ = tracked
    weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    for path in list_snapshots(folder).values():
        assert path.stat().st_size < 1.2 * weights  # the names take their part of so small a network


def test_damaged_and_missing_snapshots_are_sentences(tracked, tmp_path):
    with pytest.raises(UserError, match="has no snapshots for post-hoc EMA"):
        Snapshots(tmp_path)
    shutil.copytree(tracked[0] / "ema", tmp_path / "ema")
    broken = tmp_path / "ema" / "update-256.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"update-256\.safetensors' is damaged"):
        Snapshots(tmp_path).pipeline(0.1, UPDATES)
    save_file({}, broken)
    with pytest.raises(UserError, match=r"update-256\.safetensors' is damaged"):
        Snapshots(tmp_path).pipeline(0.1, UPDATES)


def test_which_updates_are_due():
    found = [update for update in range(1, 2000) if is_due(update)]
    assert found[:6] == [1, 2, 3, 4, 5, 6]
    assert found[6:] == [
        8,
        10,
        13,
        16,
        20,
        25,
        32,
        40,
        51,
        64,
        81,
        102,
        128,
        161,
        203,
        256,
        323,
        406,
        512,
        645,
        813,
        *(1024, 1290, 1625),
    ]


# ------------------------------------------------------------------ stopped, resumed, made longer


def snapshot_bytes(folder: Path) -> dict[int, bytes]:
    return {update: path.read_bytes() for update, path in list_snapshots(folder).items()}


def test_a_run_that_was_stopped_and_made_longer_has_the_same_snapshots(tmp_path):
    options = {"lr_scheduler": "constant", "checkpointing_steps": 100, "eval_num_images": 0}
    whole, part = (trainer(tmp_path / "whole", **options, max_train_steps=22), tmp_path / "part")
    whole.train()
    for last, snapshots in ((7, [5, 6, 7]), (12, [8, 10, 12]), (22, [16, 20, 22])):  # due after none of these
        trainer(part, **options, max_train_steps=last, resume_from_checkpoint="latest").train()
        assert list(list_snapshots(part)) == snapshots
    assert list(list_snapshots(whole.output_dir)) == [16, 20, 22]
    assert snapshot_bytes(whole.output_dir) == snapshot_bytes(part)
    one, two = (load_file(run / "checkpoint-22/posthoc_ema.safetensors") for run in (whole.output_dir, part))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_resumed_run_discards_what_came_after_its_checkpoint(tmp_path, capsys):
    run = trainer(tmp_path / "run")
    run.train()
    assert list(list_snapshots(run.output_dir)) == [4, 5, 6]
    before = snapshot_bytes(run.output_dir)
    shutil.rmtree(run.output_dir / "checkpoint-6")
    (run.output_dir / "ema" / ".update-6.safetensors.0a.partial").touch()  # of a killed write
    resumed = trainer(run.output_dir, resume_from_checkpoint="latest", max_train_steps=4)
    resumed.train()
    names = sorted(path.name for path in (run.output_dir / "ema").iterdir())
    assert names == ["update-3.safetensors", "update-4.safetensors"]  # the checkpoint's is made up for
    assert snapshot_bytes(run.output_dir)[4] != before[4]  # another learning rate: the schedule is shorter


def test_a_snapshot_that_a_kill_left_out_is_made_up_for(tmp_path):
    run = trainer(tmp_path / "run")
    run.train()
    before = snapshot_bytes(run.output_dir)
    newest = run.output_dir / "ema" / "update-6.safetensors"
    newest.rename(newest.with_name(f".{newest.name}.{'0' * 32}.partial"))  # checkpoint-6 is there already
    trainer(run.output_dir, resume_from_checkpoint="latest").train()
    assert snapshot_bytes(run.output_dir) == before
    assert len(list(newest.parent.iterdir())) == len(before)


def test_without_averages_in_the_checkpoint_none_are_kept(tmp_path, capsys):
    advance(trainer(tmp_path / "run", posthoc_ema=False), 3)
    assert not (tmp_path / "run" / "ema").exists()
    assert not (tmp_path / "run" / "checkpoint-3" / "posthoc_ema.safetensors").exists()
    assert "post-hoc" not in capsys.readouterr().out
    resumed = trainer(tmp_path / "run", resume_from_checkpoint="latest")
    assert "checkpoint-3 holds no averages for post-hoc EMA, so none are kept" in capsys.readouterr().out
    advance(resumed, 6)
    assert not (tmp_path / "run" / "ema").exists()


def test_the_run_s_own_ema_is_the_same_with_and_without(tmp_path):
    on, off = (trainer(tmp_path / str(keep), posthoc_ema=keep) for keep in (True, False))
    for run in (on, off):
        advance(run, 3)
    for name in ("model", "ema", "optimizer"):
        one, two = (load_file(run.output_dir / "checkpoint-3" / f"{name}.safetensors") for run in (on, off))
        assert all(torch.equal(one[key], two[key]) for key in one)
