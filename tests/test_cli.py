"""The command line: every mistake gets one sentence on stderr and exit code 2, and loses nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image

from ddpm_hf import cli


def config_file(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def fails_with_one_sentence(capsys, arguments) -> str:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_yaml_gives_values_and_the_command_line_wins(tmp_path):
    path = config_file(tmp_path, "preset: digits\nlearning_rate: 1e-4\nmax_train_steps: 7\nrandom_flip: true\n")
    config = cli.parse_training_config(["--config", path, "--max_train_steps", "9"])
    assert (config.learning_rate, config.max_train_steps, config.random_flip) == (1e-4, 9, True)
    config = cli.parse_training_config(["--max_train_steps=9", f"--config={path}"])
    assert config.preset == "digits"


def test_boolean_flags_stand_alone_or_take_a_value():
    assert cli.parse_training_config([]).random_flip is None
    assert cli.parse_training_config(["--random_flip"]).random_flip is True
    assert cli.parse_training_config(["--random_flip", "false"]).random_flip is False


def test_all_example_configs_are_valid(repository_root):
    files = sorted((repository_root / "examples" / "configs").glob("*.yaml"))
    assert files
    for path in files:
        assert cli.parse_training_config(["--config", str(path)]).preset == path.stem


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lerning_rate", "1"], ["--lerning_rate", "did you mean --learning_rate?"]),
        (["--learning_rat", "1"], ["--learning_rat", "did you mean --learning_rate?"]),
        (["--learning_rate", "-1"], ["--learning_rate", "-1"]),
        (["--learning_rate", "fast"], ["--learning_rate", "a number", "'fast'"]),
        (["--max_train_steps", "1.5"], ["--max_train_steps", "a whole number", "1.5"]),
        (["--seed", "x"], ["--seed", "a whole number", "'x'"]),
        (["--seed"], ["--seed"]),
        (["stray"], ["'stray'"]),
        (["--preset", "cifar11"], ["'cifar11'", "did you mean 'cifar10'?"]),
        (["--preset", "digits", "--train_data_dir", "{tmp}/nowhere"], ["nowhere", "does not exist"]),
        (["--preset", "digits", "--train_data_dir", "{tmp}"], ["no images"]),
        (["--preset", "digits", "--dataset_name", "{tmp}/nowhere"], ["nowhere", "cannot load"]),
        (["--preset", "digits", "--dataset", "digits", "--train_data_dir", "x"], ["exactly one"]),
        (["--preset", "digits", "--resolution", "9"], ["9x9", "8", "10"]),
        (["--preset", "digits", "--mixed_precision", "fp16"], ["fp16", "GPU", "bf16"]),
        (["--preset", "digits", "--mixed_precision", "half"], ["'half'"]),
        (["--preset", "digits", "--train_batch_size", "48"], ["48", "not a multiple"]),
        (["--config", "{tmp}/nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["--config", "{tmp}/unknown.yaml"], ["'learning_rat'", "did you mean 'learning_rate'?"]),
        (["--config", "{tmp}/list.yaml"], ["keys and values"]),
        (["--config", "{tmp}/broken.yaml"], ["not valid YAML"]),
        (["--preset", "digits", "--output_dir", "{tmp}/list.yaml"], ["is a file"]),
        (["--preset", "digits", "--resume_from_checkpoint", "checkpoint-7"], ["checkpoint-7"]),
        (["--preset", "digits", "--resolution", "8", "x"], ["--resolution", "'x'"]),
        (["--preset", "digits", "--class_dropout", "0.1"], ["--class_conditional"]),
        (["--preset", "digits", "--report_to", "nothing"], ["'nothing'", "tensorboard"]),
        (["--preset", "digits", "--value_range", "1", "0"], ["--value_range"]),
    ],
)
def test_training_mistakes(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "unknown.yaml").write_text("preset: digits\nlearning_rat: 1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    before = sorted(tmp_path.iterdir())
    arguments = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    if "--output_dir" not in arguments:
        arguments += ["--output_dir", str(tmp_path / "run")]
    sentence = fails_with_one_sentence(capsys, ["train", *arguments])
    assert all(word in sentence for word in words), sentence
    assert sorted(tmp_path.iterdir()) == before  # nothing was written


def test_an_output_folder_that_cannot_be_written(capsys):
    # /proc takes no files, whoever asks; a folder without write permission would stop everyone but root
    arguments = ["train", "--preset", "digits", "--output_dir", "/proc/run", "--max_train_steps", "1"]
    assert cli.main(arguments) == 2
    assert "error: cannot write to --output_dir /proc/run" in capsys.readouterr().err.splitlines()[-1]


def test_other_mistakes(tmp_path, capsys, small_pipeline):
    small_pipeline.save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model")]
    out = ["--output", str(tmp_path / "out")]
    for arguments, word in [
        (["smaple"], "did you mean sample?"),
        (["sample", *model], "output"),
        (["sample", "--model", str(tmp_path / "nowhere"), *out], "nowhere"),
        (["sample", "--model", str(tmp_path), *out], "model_index.json"),
        (["sample", *model, *out, "--seeds", "3-1"], "1-3"),
        (["sample", *model, *out, "--seeds", "1,1"], "twice"),
        (["sample", *model, *out, "--seeds", "a"], "'a'"),
        (["sample", *model, *out, "--sampler", "eulr"], "'eulr'"),
        (["sample", *model, *out, "--batch_size", "0"], "batch_size"),
        (["sample", *model, *out, "--num_inference_steps", "1001"], "1001"),
        (["sample", *model, "--output", str(tmp_path / "x.gif")], "x.gif"),
        (["evaluate", *model, "--metrics", "fid2", "--dataset", "digits"], "'fid2'"),
        (["evaluate", *model], "exactly one"),
        (["evaluate", *model, "--dataset", "digits", "--num_images", "-1"], "num_images"),
        (["convert", "--to", "official_tf", "--checkpoint", str(tmp_path / "no"), *out], "no folder"),
        (["sample", *model, *out, "--class_labels", "cats"], "not class-conditional"),
        (["evaluate", *model, "--dataset", "digits", "--split", "test"], "validation"),
        (["evaluate", *model, "--dataset", "digits", "--num_evaluations", "3"], "even"),
    ]:
        assert word in fails_with_one_sentence(capsys, arguments), arguments
    assert not (tmp_path / "out").exists()


def test_accelerate_configurations_are_readable(repository_root):
    files = sorted((repository_root / "examples" / "accelerate").glob("*.yaml"))
    assert len(files) == 5
    for path in files:
        assert load_config_from_file(str(path)).num_processes >= 1


def test_exit_code_of_the_script(repository_root, tmp_path):
    command = [sys.executable, "examples/train.py", "--output_dir", str(tmp_path / "run"), "--sed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository_root)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown flag --sed (did you mean --seed?)"


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    assert "evaluate" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("0.")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--help"])
    assert exit_.value.code == 0
    assert "--learning_rate" in capsys.readouterr().out


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def bug(arguments, prog):
        raise RuntimeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "sample", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["sample"])


def test_sample_and_evaluate_from_the_command_line(tmp_path, capsys, small_pipeline):
    small_pipeline.save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model")]
    short = ["--seeds", "0-4", "--num_inference_steps", "5", "--batch_size", "2"]
    assert cli.main(["sample", *model, *short, "--output", str(tmp_path / "grid.png")]) == 0
    assert cli.main(["sample", *model, *short, "--output", str(tmp_path / "a.npz"), "--sampler", "ddim"]) == 0
    assert Image.open(tmp_path / "grid.png").size[0] > 100
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (5, 8, 8, 1)
    report = tmp_path / "report.json"
    few = ["--num_images", "4", "--num_evaluations", "4"]
    assert cli.main(["evaluate", *model, "--dataset", "digits", *few, "--output", str(report)]) == 0
    assert "bits/dim on 4 images" in capsys.readouterr().out
    assert json.loads(report.read_text())["num_images"] == 4
