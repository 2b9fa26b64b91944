"""Which folders a run may write into; which checkpoints it may resume from is in `test_trainer.py`."""

from pathlib import Path

import pytest

from ddpm_hf.training.configuration import TrainingConfig
from ddpm_hf.training.run_identity import CONFIG, check_output_is_ours


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


@pytest.mark.parametrize("name", ["README.md", "unet/config.json", "best/model_index.json", "evaluations.json"])
def test_what_others_wrote_is_not_overwritten(tmp_path, name):
    folder_with(tmp_path, name)
    with pytest.raises(ValueError, match=f"holds {name.split('/')[0]}, which a run would overwrite"):
        check(tmp_path)


def test_a_file_and_a_run_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        check(tmp_path / "file")
    with pytest.raises(ValueError, match="already holds a run; resume it with --resume_from_checkpoint latest"):
        check(folder_with(tmp_path / "run", CONFIG, "checkpoint-3/manifest.json"))
