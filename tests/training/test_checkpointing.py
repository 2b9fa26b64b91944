"""Training state through a checkpoint; which folder is whose.

Which checkpoints a run may resume from is in `test_trainer.py`.
"""

from pathlib import Path

import pytest
import torch

from ddpm_hf.pipelines.checkpoints import CONFIG, load_checkpoint, save_checkpoint
from ddpm_hf.training.checkpointing import check_output_is_ours, restore_training_state, training_state
from ddpm_hf.training.configuration import TrainingConfig


def test_weights_and_optimizer_through_a_checkpoint(tmp_path):
    def make():
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.Adam(layer.parameters(), lr=0.1)

    def learn(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = make()
    learn(layer, optimizer)
    weights, tensors, values = training_state(layer, optimizer)
    assert set(tensors) == {f"{p}.{e}" for p in ("weight", "bias") for e in ("step", "exp_avg", "exp_avg_sq")}
    saved = save_checkpoint(tmp_path, 1, {"model": weights, "optimizer": tensors}, {"values": values})
    loaded, state = load_checkpoint(saved)
    other, other_optimizer = make()
    restore_training_state(other, other_optimizer, loaded["model"], loaded["optimizer"], state["values"])
    assert torch.equal(layer.weight, other.weight)
    learn(layer, optimizer)
    learn(other, other_optimizer)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)


# ---------------------------------------------------------------------- which folders a run may write into


def folder_with(path: Path, *names: str) -> Path:
    """A folder with files of these names, and folders where the names say so."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")
    return path


def check(folder: Path, which: str | None = None) -> None:
    check_output_is_ours(TrainingConfig(preset="digits", output_dir=str(folder), resume_from_checkpoint=which))


@pytest.mark.parametrize("which", [None, "latest"])
def test_a_finished_model_without_checkpoints_is_not_replaced(tmp_path, which):
    """Somebody keeps the model and the best one, and has removed the checkpoints to save space."""
    finished = folder_with(
        tmp_path, CONFIG, "model_index.json", "unet/config.json", "samples.png", "best/unet/config.json"
    )
    with pytest.raises(
        ValueError, match="holds a finished model and no checkpoint to resume from; name another folder"
    ):
        check(finished, which)
    folder_with(finished, "checkpoint-3/manifest.json")
    check(finished, "latest")


def test_a_run_may_begin_anew_where_nothing_is_lost(tmp_path):
    check(tmp_path / "new")
    check(folder_with(tmp_path / "stopped early", CONFIG, "logs/events"))
    # A checkpoint that is kept elsewhere is somebody's own choice.
    finished = folder_with(tmp_path / "finished", CONFIG, "model_index.json")
    check(finished, str(folder_with(tmp_path / "checkpoint-3", "manifest.json")))


@pytest.mark.parametrize("name", ["README.md", "unet/config.json", "best/model_index.json", "curve.json", "curve.png"])
def test_what_others_wrote_is_not_overwritten(tmp_path, name):
    folder_with(tmp_path, name)
    with pytest.raises(ValueError, match=f"holds {name.split('/')[0]}, which a run would overwrite"):
        check(tmp_path)


def test_a_file_and_a_run_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        check(tmp_path / "file")
    with pytest.raises(ValueError, match="already holds a run; resume it with resume_from_checkpoint='latest'"):
        check(folder_with(tmp_path / "run", CONFIG, "checkpoint-3/manifest.json"))
