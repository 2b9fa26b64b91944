"""Checkpoints: complete or absent, checked when read, the last good one always there; models read from them."""

import hashlib
import json

import pytest
import torch

from ddpm_hf.pipelines.checkpoints import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from ddpm_hf.utils.files import remove_leftovers, write_directory


def save(folder, step, value=0.0, keep=None):
    return save_checkpoint(folder, step, {"model": {"w": torch.full((100,), value)}}, {"seed": 1}, keep=keep)


def test_what_is_saved_comes_back(tmp_path):
    tensors = {"model": {"w": torch.randn(3, 4), "b": torch.randn(2).to(torch.bfloat16)}, "ema": {"w": torch.ones(1)}}
    path = save_checkpoint(tmp_path, 7, tensors, {"note": {"a": [1, 2.5, None]}})
    loaded, state = load_checkpoint(path)
    assert state == {"step": 7, "note": {"a": [1, 2.5, None]}}
    assert loaded.keys() == tensors.keys()
    assert torch.equal(loaded["model"]["b"], tensors["model"]["b"])
    assert torch.equal(loaded["model"]["w"], tensors["model"]["w"])


def test_no_pickle_in_it(tmp_path):
    names = {p.name for p in save(tmp_path, 1).iterdir()}
    assert names == {"model.safetensors", "state.json", "manifest.json"}


def test_latest_is_the_highest_step_not_the_last_by_name(tmp_path):
    for step in (900, 1000, 20):
        save(tmp_path, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-900", "checkpoint-1000"]
    assert find_checkpoint(tmp_path, "latest")[0].name == "checkpoint-1000"


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    save(tmp_path, 1)

    def fail_halfway(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_directory(tmp_path / "checkpoint-1", fail_halfway)
    assert load_checkpoint(tmp_path / "checkpoint-1")[1]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage", [flip_a_bit, truncate, lambda path: path.unlink(), lambda path: path.write_text("")]
)
def test_damage_is_found_and_the_one_before_is_taken(tmp_path, capsys, name, damage):
    save(tmp_path, 1, 1.0)
    damage(save(tmp_path, 2, 2.0) / name)
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        find_checkpoint(tmp_path, "checkpoint-2")
    path, tensors, _ = find_checkpoint(tmp_path, "latest")
    assert path.name == "checkpoint-1"
    assert (tensors["model"]["w"] == 1.0).all()
    assert "checkpoint-2" in capsys.readouterr().out


def test_a_state_that_was_never_json_is_named(tmp_path):
    path = save(tmp_path, 1)
    (path / "state.json").write_text("{")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = {"sha256": hashlib.sha256(b"{").hexdigest(), "size": 1}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"damaged: state\.json is not readable"):
        load_checkpoint(path)


def test_all_damaged_is_an_error(tmp_path):
    (save(tmp_path, 1) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        find_checkpoint(tmp_path, "latest")


def test_nothing_there(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path / "no-such-run", "latest") is None
    with pytest.raises(CheckpointError, match="checkpoint-5"):
        find_checkpoint(tmp_path, "checkpoint-5")


def test_leftovers_of_a_killed_write_are_not_checkpoints(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".checkpoint-2.partial").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "checkpoint-x"]


def test_the_checkpoint_just_written_is_never_removed(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    save(tmp_path, 5, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-5"]


def test_what_a_killed_exchange_took_away_comes_back(tmp_path):
    """Killed between the two renames: the one before is the only whole one."""
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "weights").write_text("before")
    (tmp_path / ".best.partial").mkdir()
    (tmp_path / ".unet.old").mkdir()
    (tmp_path / "unet").mkdir()  # here the exchange was done
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "unet"]
    assert (tmp_path / "best" / "weights").read_text() == "before"
