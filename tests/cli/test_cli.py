"""The command line: every mistake gets one sentence on stderr and exit code 2, and loses nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image

from ddpm_hf import PRESETS, DDPMPipeline, cli
from ddpm_hf.data.datasets import load_digits
from ddpm_hf.sampling.generation import with_sampler
from ddpm_hf.utils.errors import UserError


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


def test_values_of_a_file_are_those_of_flags(tmp_path):
    """YAML's own booleans, infinity, dates and exponents, as texts and as numbers; of two files the last one wins."""
    text = "mixed_precision: no\ncenter_crop: no\nmax_grad_norm: .inf\noutput_dir: 2026-12-01\n"
    text += "value_range: [-1e-05, 1.0]\nresolution: [64, 96]\nlearning_rate: 1e-3\ndropout: null\nseed: 3\n"
    path = config_file(tmp_path, text)
    (tmp_path / "second.yaml").write_text("seed: 4\nresolution: 32\n")
    config = cli.parse_training_config(["--config", path])
    assert (config.mixed_precision, config.center_crop, config.max_grad_norm) == ("no", False, float("inf"))
    assert (config.output_dir, config.value_range, config.resolution) == ("2026-12-01", [-1e-5, 1.0], [64, 96])
    assert (config.learning_rate, config.dropout, config.seed) == (1e-3, None, 3)
    config.save(tmp_path / "saved.yaml")
    assert cli.parse_training_config(["--config", str(tmp_path / "saved.yaml")]) == config
    config = cli.parse_training_config(["--seed", "5", "--config", path, "--config", str(tmp_path / "second.yaml")])
    assert (config.seed, config.resolution, config.center_crop) == (5, 32, False)
    assert cli.parse_training_config(["--resolution", "64"]).resolution == 64
    assert cli.parse_training_config(["--resolution", "64", "96", "--seed", "1"]).resolution == [64, 96]


def test_null_takes_back_what_a_file_says(tmp_path):
    path = config_file(tmp_path, "checkpoints_total_limit: 2\nrandom_flip: true\nresolution: [64, 96]\n")
    (tmp_path / "second.yaml").write_text("random_flip: null\nresolution: ~\n")
    config = cli.parse_training_config(["--config", path, "--checkpoints_total_limit", "null"])
    assert (config.checkpoints_total_limit, config.random_flip) == (None, True)
    config = cli.parse_training_config(["--config", path, "--config", str(tmp_path / "second.yaml")])
    assert (config.checkpoints_total_limit, config.random_flip, config.resolution) == (2, None, None)


def test_boolean_flags_stand_alone_or_take_a_value():
    assert cli.parse_training_config([]).random_flip is None
    assert cli.parse_training_config(["--random_flip"]).random_flip is True
    assert cli.parse_training_config(["--random_flip", "false"]).random_flip is False


def test_every_preset_has_a_configuration_that_changes_nothing_of_it(repository_root):
    """The ablations share a file: one preset in it is in force, the others stand beside it as comments."""
    found = []
    for path in sorted((repository_root / "examples" / "configs").glob("*.yaml")):
        named = re.findall(r"^(?:# )?preset: (\w+)", path.read_text(), re.MULTILINE)
        for name in named:
            config = cli.parse_training_config(["--config", str(path), "--preset", name])
            assert config.resolved_preset() == PRESETS[name]
            assert config.images_given()
        assert cli.parse_training_config(["--config", str(path)]).preset == named[0]
        assert named == [path.stem] or all(name.startswith(path.stem) for name in named)
        found += named
    assert sorted(found) == sorted(PRESETS)


# All flags of diffusers' examples/unconditional_image_generation/train_unconditional.py in August 2026.
OF_DIFFUSERS_EXAMPLE = """
dataset_name dataset_config_name model_config_name_or_path train_data_dir output_dir overwrite_output_dir
cache_dir resolution center_crop random_flip train_batch_size eval_batch_size dataloader_num_workers num_epochs
save_images_epochs save_model_epochs gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps
adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_ema ema_inv_gamma ema_power ema_max_decay push_to_hub
hub_token hub_model_id hub_private_repo logger logging_dir local_rank mixed_precision prediction_type
ddpm_num_steps ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps checkpoints_total_limit
resume_from_checkpoint enable_xformers_memory_efficient_attention preserve_input_precision
"""


def test_a_flag_of_diffusers_example_is_taken_or_says_what_to_write_instead(capsys):
    parser = cli.training_parser()
    flags = {f"--{name}" for name in OF_DIFFUSERS_EXAMPLE.split()}
    taken = flags & {*parser._option_string_actions}
    assert flags - taken == {*parser.elsewhere}
    assert len(taken) > 25
    # The command of its README, whose values are typed with an equals sign.
    command = "--resolution=64 --center_crop --random_flip --output_dir=x --train_batch_size=16 --num_epochs=100 "
    command += "--gradient_accumulation_steps=1 --use_ema --learning_rate=1e-4 --lr_warmup_steps=500"
    assert cli.main(["train", "--dataset_name=huggan/pokemon", *command.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: not a flag here: --num_epochs (give --max_train_steps; ")
    assert "; --use_ema (leave it out; " in said
    for text in parser.elsewhere.values():  # flags that it names exist
        assert set(re.findall(r"--\w+", text)) <= {*parser._option_string_actions, "--ema_inv_gamma"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lerning_rate", "1"], ["unknown flag --lerning_rate", "did you mean '--learning_rate'?"]),
        (["--learning_rat=1"], ["unknown flag --learning_rat ", "did you mean '--learning_rate'?"]),
        (["--learning_rate", "-1"], ["--learning_rate", "-1"]),
        (["--learning_rate", "fast"], ["--learning_rate", "a number", "'fast'"]),
        (["--max_train_steps", "1.5"], ["--max_train_steps", "a whole number", "1.5"]),
        (["--seed", "x"], ["--seed", "a whole number", "'x'"]),
        (["--seed"], ["--seed: expected one argument"]),
        (["--random_flip", "maybe"], ["--random_flip", "true or false", "'maybe'"]),
        (["stray"], ["unrecognized arguments: stray"]),
        (["--preset", "cifar11"], ["'cifar11'", "did you mean 'cifar10'?"]),
        (["--preset", "digits", "--train_data_dir", "{tmp}/nowhere"], ["nowhere", "does not exist"]),
        (["--preset", "digits", "--train_data_dir", "{tmp}"], ["neither a folder that holds images"]),
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
        (["--config", "{tmp}/type.yaml"], ["--max_train_steps", "a whole number", "'1.5'"]),
        (["--config", "{tmp}/several.yaml"], ["dataset_name takes one value, got ['a']"]),
        (["--config", "{tmp}/null.yaml"], ["seed takes one value, got None"]),
        (["--config", "{tmp}/number.yaml"], ["output_dir takes text, got 83", "quotes"]),
        (["--config", "{tmp}/yes.yaml"], ["report_to takes text, got True", "quotes"]),
        (["--config", "{tmp}/true.yaml"], ["--max_train_steps", "a whole number", "'True'"]),
        (["--config", "{tmp}/date.yaml"], ["not valid YAML", "month"]),
        (["--preset", "digits", "--num_cpu_threads", "99999999999"], ["--num_cpu_threads", "4096"]),
        (["--preset", "digits", "--output_dir", "{tmp}/list.yaml"], ["is a file"]),
        (["--preset", "digits", "--resume_from_checkpoint", "checkpoint-7"], ["checkpoint-7"]),
        (["--preset", "digits", "--resolution", "8", "x"], ["--resolution", "'x'"]),
        (["--preset", "digits", "--class_dropout", "0.1"], ["--class_conditional"]),
        (["--preset", "digits", "--report_to", "nothing"], ["'nothing'", "tensorboard"]),
        (["--preset", "digits", "--report_to", "tensorboard,nothing"], ["'nothing'", "tensorboard"]),
        (["--preset", "digits", "--eval_batch_size", "0"], ["--eval_batch_size", "positive"]),
        (["--preset", "digits", "--logging_steps", "0"], ["--logging_steps", "positive"]),
        (["--preset", "digits", "--value_range", "1", "0"], ["--value_range"]),
    ],
)
def test_training_mistakes(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "unknown.yaml").write_text("preset: digits\nlearning_rat: 1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "type.yaml").write_text("preset: digits\nmax_train_steps: 1.5\n")
    (tmp_path / "several.yaml").write_text("dataset_name: [a]\n")
    (tmp_path / "null.yaml").write_text("dropout: null\nseed: null\n")
    (tmp_path / "number.yaml").write_text("output_dir: 0123\n")
    (tmp_path / "yes.yaml").write_text("mixed_precision: no\nreport_to: yes\n")
    (tmp_path / "true.yaml").write_text("compile: off\ntf32: True\nmax_train_steps: true\n")
    (tmp_path / "date.yaml").write_text("output_dir: 2026-13-01\n")
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
    pixels = ["--features", "pixels"]
    for arguments, word in [
        (["smaple"], "did you mean 'sample'?"),
        (["sample", *model], "output"),
        (["sample", "--model", str(tmp_path / "nowhere"), *out], "nowhere"),
        (["sample", "--model", str(tmp_path), *out], "model_index.json"),
        (["sample", *model, *out, "--seeds", "3-1"], "rising ranges"),
        (["sample", *model, *out, "--seeds", "1,1"], "twice"),
        (["sample", *model, *out, "--seeds", "a"], "'a'"),
        (["sample", *model, *out, "--sampler", "eulr"], "'eulr'"),
        (["sample", *model, *out, "--batch_size", "0"], "batch_size"),
        (["sample", *model, *out, "--sampler", "ddim", "--timestep_spacing", "x"], "leading, linspace, trailing"),
        (["sample", *model, *out, "--num_inference_steps", "1001"], "1001"),
        (["sample", *model, "--output", str(tmp_path / "x.gif")], "x.gif"),
        (["evaluate", *model, "--metrics", "fid2", "--dataset", "digits"], "'fid2'"),
        (["evaluate", *model], "exactly one"),
        (
            ["evaluate", *model, "--dataset", "digits", "--num_images", "-1"],
            "--num_images: must be positive, got '-1'",
        ),
        (["evaluate", *model, "--num_samples", "x"], "--num_samples: takes a whole number, got 'x'"),
        (["evaluate", *model, "--dataset", "digits", "--metrics", "fid", *pixels, "--eta", "0.5"], "ddim"),
        (
            ["evaluate", *model, "--dataset", "digits", "--metrics", "fid", *pixels, "--guidance_scale", "2"],
            "needs --guide, a worse model",
        ),
        (["evaluate", *model, "--dataset", "digits", "--dtype", "half"], "'half'"),
        (
            ["sample", *model, *out, "--optimize", "fast"],
            "--optimize: must be one of auto, yes, no, compile, got 'fast'",
        ),
        (["push"], "required: --repo_id"),
        (["push", "--repo_id", "a/b"], "give the folder of the run or model: RUN, or --model RUN"),
        (
            ["sample", *model, *out, "--weights", "raw"],
            "holds a published model and no checkpoint: raw weights are in",
        ),
        (["convert", "--from", "diffusers", "--checkpoint", str(tmp_path / "no"), *out], "no folder"),
        (["sample", *model, *out, "--class_labels", "cats"], "not class-conditional"),
        (["sample", *model, *out, "--class_labels", "null"], "class 'null'"),
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


def test_too_little_memory_on_the_device_is_one_sentence(capsys, monkeypatch):
    def too_large(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def of_the_cpu(*_):
        torch.empty(2**60)

    assert cli.run(too_large, [], "ddpm-hf sample") == 2
    assert capsys.readouterr().err == "error: too little memory on the device; give a smaller --batch_size\n"
    for prog, flag in {"ddpm-hf distill": "train", "train.py": "train", "ddpm-hf publish": "eval"}.items():
        assert cli.run(too_large, [], prog) == 2
        assert f"; give a smaller --{flag}_batch_size\n" in capsys.readouterr().err
    assert cli.run(of_the_cpu, [], "ddpm-hf sample") == 2
    assert "error: too little memory on the device; give a smaller --batch_size" in capsys.readouterr().err
    monkeypatch.setenv("DDPM_HF_TRACEBACK", "1")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        cli.run(too_large, [], "ddpm-hf sample")


def test_exit_code_of_the_script(repository_root, tmp_path):
    command = [sys.executable, "examples/train.py", "--output_dir", str(tmp_path / "run"), "--sed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository_root)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown flag --sed (did you mean '--seed'?)"


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert list(cli.PARSERS) == list(cli.COMMANDS)
    assert sorted(re.findall(r"^  (\w+)  ", help_text, re.MULTILINE)) == sorted(cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("0.")


@pytest.mark.parametrize("command", cli.PARSERS)
def test_every_flag_has_a_text_a_group_and_its_default(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    shown = unwrapped(capsys.readouterr().out)
    parser = cli.PARSERS[command](f"ddpm-hf {command}")
    assert unwrapped(parser.format_help()) == shown  # the parser that the command itself uses
    flags = [action for action in parser._actions if action.dest != "help"]
    titles = {action.dest: group.title for group in parser._action_groups for action in group._group_actions}
    assert len(flags) > 5
    for action in flags:
        assert action.help, action.dest
        assert titles[action.dest] not in (None, "options", "positional arguments"), action.dest
        assert unwrapped(f"{titles[action.dest]}:") in shown
        notes = ["required"] if action.required else []
        if action.default is not None and action.nargs != 0 and not action.required:
            notes = [f"default: {str(action.default).lower() if action.default in (True, False) else action.default}"]
        if not action.option_strings:
            notes = []  # a word that always has to be there
        text = action.help + "".join(f" ({note})" for note in notes)
        assert unwrapped(text) in shown


def unwrapped(text: str) -> str:
    """Without spaces and line ends, which are where the terminal's width has them."""
    return "".join(text.split())


@pytest.mark.parametrize(
    ("flag", "value"),
    [  # Section 4 and Appendix B; the output variance and the warm-up are the official code's
        ("learning_rate", "0.0002 (cifar10); 2e-05 (256x256)"),
        ("total_batch_size", "128 (cifar10); 64 (256x256)"),
        ("ema_max_decay", "0.9999"),
        ("dropout", "0.1 (cifar10); 0 (256x256)"),
        ("lr_warmup_steps", "5000"),
        ("max_grad_norm", "1"),
        ("loss", "simple"),
        ("prediction_type", "epsilon"),
        ("variance_type", "fixed_large (cifar10); fixed_small (256x256)"),
        ("ddpm_num_inference_steps", "1000"),
        (
            "max_train_steps",
            "800000 (cifar10); 500000 (celebahq256); 2400000 (lsun_bedroom256); 1150000 (lsun_bedroom256_large); "
            "1200000 (lsun_church256); 1800000 (lsun_cat256)",
        ),
        (
            "random_flip",
            "true (cifar10, celebahq256, lsun_church256, lsun_cat256); false (lsun_bedroom256, lsun_bedroom256_large)",
        ),
    ],
)
def test_help_has_the_papers_values(flag, value):
    helps = {action.dest: action.help for action in cli.training_parser("x")._actions}
    assert helps[flag].endswith(f"; the paper: {value}")


def library_fault(arguments, prog):
    [3].index(5)  # ValueError: 5 is not in list


def own_mistake(arguments, prog):
    raise UserError("give another number than 5")


@pytest.mark.parametrize("arguments", [["sample", "--token", "hf_secret"], ["sample"]])
def test_a_librarys_value_error_is_a_fault_whose_traceback_is_in_a_file(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.setitem(cli.COMMANDS, "sample", library_fault)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "not your mistake" in err
    assert "ValueError: 5 is not in list" in err
    file = Path(re.search(r"its traceback is in (\S+), and --debug shows it", err)[1])
    assert file.is_relative_to(tmp_path)
    written = file.read_text()
    assert "[3].index(5)" in written
    assert "hf_secret" not in written


def test_where_no_file_can_be_written_a_fault_is_still_told(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "sample", library_fault)
    monkeypatch.setattr("tempfile.tempdir", "/proc/nothing")
    assert cli.main(["sample"]) == 1
    assert "not your mistake" in (error := capsys.readouterr().err)
    assert "index(5)" not in error


@pytest.mark.parametrize("command", [library_fault, own_mistake])
@pytest.mark.parametrize("arguments", [["--debug", "sample"], ["sample", "--debug"], ["sample"]])
def test_debug_shows_where_an_error_came_from(monkeypatch, command, arguments):
    monkeypatch.setitem(cli.COMMANDS, "sample", command)
    if "--debug" not in arguments:
        monkeypatch.setenv("DDPM_HF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="5"):
        cli.main(arguments)


def test_debug_goes_with_every_command(monkeypatch):
    for name in cli.COMMANDS:
        monkeypatch.setitem(cli.COMMANDS, name, lambda arguments, prog: len(arguments))
        assert cli.main(["--debug", name]) == cli.main([name, "--debug"]) == 0  # the command itself does not see it
        assert cli.main([name, "--debug", "--seed", "1"]) == 2


def raised_by(library: str, error: str) -> Exception:
    """An error as it comes out of a module of that library."""
    try:
        exec(f"raise {error}", {"__name__": library})
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("library", "error", "code"),
    [
        ("ddpm_hf.hub.publish", "OSError('no connection to the Hub')", 2),
        ("huggingface_hub.file_download", "OSError('not in the cache')", 2),
        ("diffusers.models.modeling_utils", "EnvironmentError('no file named diffusion.safetensors')", 2),
        ("anything", "OSError(28, 'No space left on device')", 2),
        ("anything", "PermissionError(13, 'Permission denied')", 2),
        ("inspect", "OSError('could not get source code')", 1),
        ("numpy", "ValueError('operands could not be broadcast together')", 1),
        ("anything", "KeyError('x')", 1),
    ],
)
def test_which_errors_are_sentences(monkeypatch, capsys, library, error, code):
    def command(arguments, prog):
        raise raised_by(library, error)

    monkeypatch.setitem(cli.COMMANDS, "sample", command)
    assert cli.main(["sample"]) == code
    assert ("not your mistake" in capsys.readouterr().err) == (code == 1)


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


# ---------------------------------------------------------------------- from given images


@pytest.fixture
def given(tmp_path, small_pipeline):
    """A model, four images, a mask of the right half, and the start of a command."""
    small_pipeline.save_pretrained(tmp_path / "model")
    for i in range(4):
        Image.fromarray(load_digits("train").images[i, 0].numpy()).save(tmp_path / f"{i}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "right.png")
    Image.fromarray(255 - mask).save(tmp_path / "left.png")
    return tmp_path


def sample(given, text: str) -> int:
    start = f"sample --model {given}/model --sampler ddim --num_inference_steps 10 "
    return cli.main((start + text.replace("{}", str(given))).split())


def opened(given, *names: str) -> list[Image.Image]:
    return [Image.open(given / f"{name}.png") for name in names]


def by_hand(given, **options) -> np.ndarray:
    pipe = with_sampler(DDPMPipeline.from_pretrained(given / "model"), "ddim")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(num_inference_steps=10, **options).images
    return np.stack([np.asarray(image) for image in images])[..., None]


def test_image_to_image_is_the_pipelines(given):
    assert sample(given, "--image {}/0.png --strength 0.5 --seeds 3,7,8 --batch_size 2 --output {}/a.npz") == 0
    expected = by_hand(given, image=opened(given, "0"), strength=0.5, seeds=[3, 7, 8])
    assert np.array_equal(np.load(given / "a.npz")["arr_0"], expected)
    assert sample(given, "--image {}/0.png --strength 0 --seeds 3 --output {}/same.npz") == 0
    assert np.array_equal(np.load(given / "same.npz")["arr_0"][0, ..., 0], np.asarray(*opened(given, "0")))


def test_several_images_are_repeated_for_all_seeds(given):
    assert sample(given, "--image {}/0.png {}/1.png --strength 0.6 --seeds 0-4 --batch_size 3 --output {}/a.npz") == 0
    images = opened(given, "0", "1", "0", "1", "0")
    batches = (slice(0, 3), slice(3, 5))  # the same ones, which convolutions round in the same way
    expected = [by_hand(given, image=images[part], strength=0.6, seeds=range(5)[part]) for part in batches]
    assert np.array_equal(np.load(given / "a.npz")["arr_0"], np.concatenate(expected))
    assert sample(given, "--image {}/0.png {}/1.png {}/2.png --strength 0.6 --output {}/b.npz") == 0
    images = opened(given, "0", "1", "2")
    assert np.array_equal(
        np.load(given / "b.npz")["arr_0"], by_hand(given, image=images, strength=0.6, seeds=range(3))
    )


def test_inpainting_is_the_pipelines_and_keeps_what_is_known(given):
    flags = "--mask_image {}/right.png {}/left.png --resample_length 3 --resample_times 2 --batch_size 1"
    assert sample(given, f"--image {{}}/0.png {{}}/1.png {flags} --output {{}}/a.npz") == 0
    found = np.load(given / "a.npz")["arr_0"]
    images, masks = opened(given, "0", "1"), opened(given, "right", "left")
    expected = by_hand(given, image=images, mask_image=masks, seeds=[0, 1], resample_length=3, resample_times=2)
    assert np.array_equal(found, expected)
    for row, image, mask in zip(found[..., 0], images, masks, strict=True):
        known = np.asarray(mask) == 0
        assert np.array_equal(row[known], np.asarray(image)[known])
        assert not np.array_equal(row[~known], np.asarray(image)[~known])


def test_a_mask_is_scaled_and_cropped_as_its_image_is(given):
    """Both with margins that the crop removes."""
    for name, margin in (("0", 99), ("right", 0)):
        wide = np.pad(np.asarray(*opened(given, name)), ((0, 0), (8, 8)), constant_values=margin)
        Image.fromarray(wide).save(given / f"wide_{name}.png")
    for name in ("", "wide_"):
        files = f"--image {{}}/{name}0.png --mask_image {{}}/{name}right.png --output {{}}/{name}a.npz"
        assert sample(given, f"{files} --resample_times 1 --seeds 0,1") == 0
    assert np.array_equal(np.load(given / "wide_a.npz")["arr_0"], np.load(given / "a.npz")["arr_0"])
    image, mask = opened(given, "wide_0", "wide_right")
    expected = by_hand(given, image=image, mask_image=mask, resample_times=1, seeds=[0, 1])
    assert np.array_equal(np.load(given / "a.npz")["arr_0"], expected)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ("--image {}/0.png {}/2.png --strength 0.5", "image"),
        ("--image {}/1.png {}/0.png --strength 0.5", "image"),
        ("--image {}/0.png {}/1.png --strength 0.6", "strength"),
        ("--image {}/0.png {}/1.png --strength 0.5 --mask_image {}/left.png", "mask_image"),
        ("--seeds 0-1", "image"),
    ],
)
def test_images_from_other_images_are_not_mixed(given, capsys, other, what):
    command = "--image {}/0.png {}/1.png --strength 0.5 --output {}/out"
    assert sample(given, command) == 0
    assert sample(given, f"{command} --seeds 0-3") == 0  # more of the same
    assert "wrote 2 images" in capsys.readouterr().out.splitlines()[-1]
    before = {path: path.read_bytes() for path in (given / "out").rglob("*.*")}
    assert sample(given, f"{other} --output {{}}/out") == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert "images that were made with other" in sentence
    assert what in sentence
    assert {path: path.read_bytes() for path in (given / "out").rglob("*.*")} == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--image {}/0.png", "needs --strength"),
        ("--strength 0.5", "--strength goes with --image"),
        ("--mask_image {}/left.png", "--mask_image goes with --image"),
        ("--image {}/0.png --strength 0.5 --resample_times 3", "--resample_times goes with --mask_image"),
        (
            "--image {}/0.png --mask_image {}/left.png --resample_length 0",
            "--resample_length: must be positive, got '0'",
        ),
        ("--image {}/0.png --strength 1.5", "between 0 and 1, got 1.5"),
        ("--image {}/0.png --strength half", "a number, got 'half'"),
        ("--image {}/9.png --strength 0.5", "cannot read --image"),
        ("--image {}/0.png --mask_image {}/model/model_index.json", "cannot read --mask_image"),
        ("--image {}/0.png {}/1.png --strength 0.5 --seeds 0", "2 images, and there are 1 --seeds"),
        ("--image {}/0.png --mask_image {}/left.png {}/right.png", "2 files for 1 of --image"),
        ("--image {}/0.png --strength 0.5 --figure progressive", "--image does not go with --figure"),
    ],
)
def test_given_images_that_cannot_be_used_are_refused_before_anything_is_written(given, capsys, text, words):
    before = sorted(given.iterdir())
    assert sample(given, f"{text} --output {{}}/out.png") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert words in err
    assert sorted(given.iterdir()) == before


def test_advice_about_a_given_image_names_no_flag_of_data_sets(given, capsys):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(given / "float.tiff")
    assert sample(given, "--image {}/float.tiff --strength 0.5 --output {}/out.png") == 2
    why = "32-bit float pixels have no range of their own; save it as 8-bit PNG"
    assert capsys.readouterr().err == f"error: cannot read --image {given}/float.tiff: {why}\n"


def test_a_network_computed_in_another_way_makes_the_same_images(tmp_path, capsys, small_pipeline):
    small_pipeline.save_pretrained(tmp_path / "model")
    made = {}
    for word in ("no", "auto", "yes"):
        arguments = ["sample", "--model", str(tmp_path / "model"), "--output", str(tmp_path / f"{word}.npz")]
        assert cli.main([*arguments, "--seeds", "0-3", "--num_inference_steps", "10", "--optimize", word]) == 0
        assert ("network: fp32" in capsys.readouterr().out) == (word == "yes")
        made[word] = np.load(tmp_path / f"{word}.npz")["arr_0"].astype(int)
    assert np.array_equal(made["auto"], made["no"])  # too short a run to time anything
    assert np.abs(made["yes"] - made["no"]).max() <= 1
