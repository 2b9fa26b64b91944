"""Sentences name what the door that was used takes: flags on the command line, arguments in Python."""

import pytest
from conftest import DIGITS_MODEL

from ddpm_hf import DDPMScheduler, cli
from ddpm_hf.data import load_images
from ddpm_hf.utils.errors import UserError, showing_flags


@pytest.mark.parametrize(
    ("sentence", "in_python"),
    [
        ("choose one size with --resolution (they have 8x9)", "choose one size with resolution (they have 8x9)"),
        ("add --validation_split 0.05, or", "add validation_split=0.05, or"),
        ("say --value_range 0 1 or --value_range -1 1", "say value_range=(0, 1) or value_range=(-1, 1)"),
        ("leave them out with --on_bad_image skip, which", "leave them out with on_bad_image='skip', which"),
        ("take --variance_type learned_range", "take variance_type='learned_range'"),
        ("add --private false", "add private=False"),
        ("--model runs/a is distilled", "model runs/a is distilled"),
        ("got --num_samples 0", "got num_samples=0"),
        ("--image_column 'a b' is no column", "image_column='a b' is no column"),
        ("--loss learnedly", "loss learnedly"),
        ("give --from guided_diffusion, or --no_ema", "give from_format='guided_diffusion', or ema=False"),
        ("run ddpm-hf ema --sigma_rel 0.1, or --step 4", "run ddpm-hf ema --sigma_rel 0.1, or step=4"),
        ("no '/hub/models--org--name' (--model)", "no '/hub/models--org--name' (model)"),
        ("'a --private false/b' holds images", "'a --private false/b' holds images"),
        ('--model "it\'s --steps 4" is bad', 'model "it\'s --steps 4" is bad'),
        ("the model's --steps 4 and its runs' 'x' --steps 5", "the model's steps=4 and its runs' 'x' steps=5"),
        ("--eval_metrics fid,nll gives", "eval_metrics fid,nll gives"),
        ("--output 2024-01-01 is a file", "output 2024-01-01 is a file"),
        ("no flag at all - or -- one", "no flag at all - or -- one"),
    ],
)
def test_a_sentence_at_both_doors(sentence, in_python):
    assert str(UserError(sentence)) == in_python
    with showing_flags():
        assert str(UserError(sentence)) == sentence
    assert str(UserError(sentence)) == in_python


def test_one_refusal_at_both_doors(tmp_path, capsys):
    with pytest.raises(UserError, match="validation_split must be at least 0 and less than 1, got 2") as python:
        load_images(dataset="digits", validation_split=2)
    assert "--" not in str(python.value)
    out = ["--output_dir", str(tmp_path / "run")]
    assert cli.main(["train", "--preset", "digits", "--validation_split", "2", *out]) == 2
    assert "--validation_split must be at least 0 and less than 1, got" in capsys.readouterr().err
    command = ["evaluate", "--model", str(DIGITS_MODEL), "--dataset", "digits", "--validation_split", "2"]
    assert cli.main(command) == 2
    assert "--validation_split must be at least 0 and less than 1, got" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^num_inference_steps must be between 1 and the 1000 steps"):
        DDPMScheduler().set_timesteps(1001)
