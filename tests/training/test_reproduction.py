"""`ddpm-hf reproduce`: one command from images to the paper's table; nothing that is finished is made again."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal

import pytest
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPipeline, EvaluationReport, Trainer, cli
from ddpm_hf.evaluation import likelihoods
from ddpm_hf.presets import PRESETS
from ddpm_hf.training import reproduction
from ddpm_hf.training.configuration import TrainingConfig
from ddpm_hf.training.reproduction import PAPER_TABLE_4, compare_with_paper

TRAINING = "--preset digits --dataset digits --max_train_steps 6 --total_batch_size 16 --checkpointing_steps 2"
TRAINING += " --num_sample_images 4 --ddpm_num_inference_steps 50 --eval_num_images 4 --eval_num_evaluations 4"
MEASURING = "--num_samples 12 --num_images 2 --features pixels --batch_size 4"


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """A network that trains in an instant, and a short chain."""
    digits = PRESETS["digits"]
    unet = {**digits.unet, "block_out_channels": (8, 16), "norm_num_groups": 8}
    scheduler = {**digits.scheduler, "num_train_timesteps": 50, "beta_end": 0.3}
    short = dataclasses.replace(digits, unet=unet, scheduler=scheduler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_hf.presets.PRESETS", {**PRESETS, "digits": short})
        patch.setenv("DDPM_HF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """The folder of a whole reproduction, and what it printed."""
    folder, out = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert reproduce(folder) == 0
    return folder, out.getvalue()


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished reproduction."""
    return shutil.copytree(finished[0], tmp_path / "run")


def reproduce(folder, *more: str) -> int:
    return cli.main(["reproduce", *f"{TRAINING} {MEASURING}".split(), "--output_dir", str(folder), *more])


def refuse(monkeypatch, where, name: str) -> None:
    """Make this part of the work fail where it is called."""

    def fail(*_, **__):
        raise AssertionError("this was finished")

    monkeypatch.setattr(where, name, fail)


def numbers(folder) -> dict[str, float]:
    report = EvaluationReport.load(folder / "reproduction")
    return {name: entry["value"] for name, entry in report.values.items()}


def test_one_command_makes_the_table_and_the_second_call_repeats_nothing(finished, run, tmp_path, monkeypatch):
    out = finished[1]
    content = json.loads((run / "reproduction.json").read_text())
    rows = {row["number"]: row for row in content["rows"]}
    frechet = {f"fd_pixels_{split}_{kind}" for split in ("train", "validation") for kind in ("float", "uint8")}
    likelihood = {"bits_per_dim", "rate_bpd", "distortion_bpd", "prior_bpd", "rmse"}
    assert set(rows) == frechet | likelihood
    assert {name: row["ours"]["value"] for name, row in rows.items()} == numbers(run)
    assert all(row["paper"] is None for row in rows.values())
    assert rows["bits_per_dim"]["note"] == "2 of 296 validation images, 6 of 2,500 updates"
    assert rows["fd_pixels_train_float"]["note"] == "12 of 50,000 samples, 6 of 2,500 updates"
    assert {"max_train_steps 6 instead of 2500", "total_batch_size 16 instead of 64"} == set(content["differences"])
    assert any("12 samples are biased" in warning for warning in content["warnings"])
    page = (run / "reproduction.md").read_text()
    for line in [line for line in page.splitlines() if line.startswith("|")]:
        assert line in out
    assert DDPMPipeline.from_pretrained(run).image_shape == (1, 8, 8)

    drawn, original = [], DDPMPipeline.__call__

    def spy(self, *args, **kwargs):
        drawn.extend(kwargs["seeds"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DDPMPipeline, "__call__", spy)
    refuse(monkeypatch, reproduction, "Trainer")
    refuse(monkeypatch, likelihoods, "bits_per_dim")
    assert reproduce(run) == 0
    assert (run / "reproduction.md").read_text() == page
    # A batch size changes no number, another folder neither.
    run.rename(tmp_path / "moved")
    assert reproduce(tmp_path / "moved", "--batch_size", "5") == 0
    assert drawn == []


def test_more_samples_need_no_more_training_and_only_more_samples(run, monkeypatch):
    before, drawn = numbers(run), []
    original = DDPMPipeline.__call__

    def spy(self, *args, **kwargs):
        drawn.extend(kwargs["seeds"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DDPMPipeline, "__call__", spy)
    refuse(monkeypatch, reproduction, "Trainer")
    assert reproduce(run, "--num_samples", "16") == 0
    assert drawn == [12, 13, 14, 15]
    after = numbers(run)
    assert after["bits_per_dim"] == before["bits_per_dim"]
    assert after["fd_pixels_train_float"] != before["fd_pixels_train_float"]


def test_interrupted_anywhere_the_same_command_resumes(finished, tmp_path, monkeypatch, capsys):
    run = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        update = Trainer._update

        def stop(self, step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(self, step)

        patch.setattr(Trainer, "_update", stop)
        assert reproduce(run) == 130
    assert "the same command resumes" in capsys.readouterr().out
    assert not (run / "reproduction").exists()
    updates, drawn = [], []
    with monkeypatch.context() as patch:
        sample = DDPMPipeline.__call__

        def count(self, step):
            updates.append(step)
            return update(self, step)

        def interrupt(self, *args, **kwargs):
            if updates and kwargs.get("seeds") == [4, 5, 6, 7]:
                raise KeyboardInterrupt
            return sample(self, *args, **kwargs)

        patch.setattr(Trainer, "_update", count)
        patch.setattr(DDPMPipeline, "__call__", interrupt)
        assert reproduce(run) == 130
    assert updates == [4, 5]
    assert "the same command resumes" in capsys.readouterr().err
    assert not (run / "reproduction.md").exists()

    def spy(self, *args, **kwargs):
        drawn.extend(kwargs["seeds"])
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(DDPMPipeline, "__call__", spy)
    refuse(monkeypatch, reproduction, "Trainer")
    assert reproduce(run) == 0
    assert drawn == list(range(4, 12))
    assert numbers(run) == pytest.approx(numbers(finished[0]), rel=1e-9)


def test_other_weights_in_the_folder_are_not_taken_for_the_trained_ones(run):
    before = numbers(run)
    file = run / "unet" / "diffusion_pytorch_model.safetensors"
    trained = load_file(file)
    save_file({name: value + 0.1 for name, value in trained.items()}, file, {"format": "pt"})
    assert reproduce(run) == 0  # published again from the last checkpoint
    assert all((value == trained[name]).all() for name, value in load_file(file).items())
    assert numbers(run) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--features", "inception"], "--inception_weights FILE"),
        (["--features", "pixel"], "unknown --features 'pixel'"),
        (["--num_samples", "0"], "--num_samples must be positive, got 0"),
        (["--num_samples", "1"], "fid needs at least 2 samples"),
        (["--num_inference_steps", "51"], "50 steps of the chain, got 51"),
        (["--resume_from_checkpoint", "checkpoint-2"], "leave out --resume_from_checkpoint"),
        (["--sampels", "3"], "unknown flag --sampels"),
        (["--preset", "cifar"], "did you mean 'cifar10'"),
    ],
)
def test_mistakes_get_one_sentence_before_anything_is_written(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert reproduce(tmp_path / "run", *flags) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert words in err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- beside the paper


def report_of(num_samples=50_000, num_images=10_000, steps=1000) -> EvaluationReport:
    made = EvaluationReport("uoft-cs/cifar10", "test", num_images)
    likelihood = {"split": "test", "num_images": num_images}
    samples = {"num_samples": num_samples}
    made.add("bits_per_dim", 3.7512, 0.011, likelihood)
    made.add("rmse", 0.9614, 0.002, likelihood)
    made.add("is_inception_float", 9.41, 0.03, samples, standard_deviation=0.12)
    made.add("fid_inception_train_float", 3.21, 0.02, samples)
    made.add("fid_inception_test_float", 5.27, 0.02, samples)
    scheduler = {"num_train_timesteps": 1000}
    made.settings["sampling"] = {"sampler": "DDPMScheduler", "num_inference_steps": steps, "scheduler": scheduler}
    row = {"reverse steps": 1000, "rate (bits/dim)": 1.8, "distortion (RMSE)": 0.96}
    made.tables["Progressive lossy code, test (Table 4)"] = [row]
    return made


def compared(report: EvaluationReport, **settings) -> reproduction.Reproduction:
    settings = {"preset": "cifar10", "dataset_name": "uoft-cs/cifar10", **settings}
    return compare_with_paper(TrainingConfig(**settings), report, {"test": 10_000})


def test_a_whole_reproduction_stands_beside_table_1():
    found = compared(report_of())
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:5]] for line in found.table().split("\n")
    }
    # The paper's row by hand: IS 9.46 +- 0.11, FID 3.17 (5.24 against the test set), NLL <= 3.75 (3.72)
    assert cells["is_inception_float"] == ["9.46 ± 0.11", "9.41 ± 0.12", ""]
    assert cells["fid_inception_train_float"] == ["3.17", "3.210 ± 0.020", ""]
    assert cells["fid_inception_test_float"] == ["5.24", "5.270 ± 0.020", ""]
    assert cells["bits_per_dim"] == ["3.75", "3.751 ± 0.011", ""]
    assert cells["bits_per_dim_train"] == ["3.72", "-", "not measured here"]
    assert cells["rmse"][0] == "0.95"
    assert found.differences == []
    assert "1000 |" in found.as_markdown()
    first, *rest = json.loads(found.as_json())["table_4"]
    assert first == {
        "reverse steps": 1000,
        "rate (bits/dim), paper": 1.77581,
        "rate (bits/dim), ours": 1.8,
        "RMSE, paper": 0.95136,
        "RMSE, ours": 0.96,
    }
    assert [row["rate (bits/dim), ours"] for row in rest] == [None] * 9
    assert "| 1000 | 1.77581 | 1.80000 | 0.95136 | 0.96000 |" in " ".join(found.as_markdown().split())
    # Rates fall and errors rise with fewer steps, as in Figure 5; the last rate and RMSE are those of Section 4.3.
    rates, errors = zip(*PAPER_TABLE_4.values(), strict=True)
    assert sorted(rates, reverse=True) == list(rates)
    assert sorted(errors) == list(errors)
    assert (round(rates[0], 2), round(errors[0], 2)) == (1.78, 0.95)


def test_a_note_beside_the_number_says_what_was_less_than_in_the_paper():
    found = compared(
        report_of(num_samples=100, num_images=64, steps=50), max_train_steps=1000, dropout=0.2, dataset_name="mine"
    )
    notes = {row["number"]: row["note"] for row in found.rows}
    assert notes["fid_inception_train_float"] == "100 of 50,000 samples, 50 of 1000 steps, 1,000 of 800,000 updates"
    assert notes["bits_per_dim"] == "64 of 10,000 test images, 1,000 of 800,000 updates"
    assert {"max_train_steps 1000 instead of 800000", "dropout 0.2 instead of 0.1"} <= set(found.differences)
    other = dataclasses.replace(report_of(), dataset="/home/somebody/flowers")
    found = compared(other)
    assert found.differences == ["images of flowers instead of cifar10"]
    assert "/home" not in found.as_markdown() + found.as_json()


@pytest.mark.parametrize(
    ("dataset", "differences"),
    [
        ("cifar10", []),
        ("uoft-cs/cifar10", []),
        ("/data/CIFAR10", []),
        ("uoft-cs/cifar100", ["images of uoft-cs/cifar100 instead of cifar10"]),
        ("somebody/cifar10-blurred", ["images of somebody/cifar10-blurred instead of cifar10"]),
    ],
)
def test_other_images_are_not_taken_for_the_paper_s(dataset, differences):
    assert compared(dataclasses.replace(report_of(), dataset=dataset)).differences == differences


def test_presets_that_name_no_dataset_take_any():
    bedrooms = dataclasses.replace(report_of(), dataset="lsun_bedroom")
    found = compared(bedrooms, preset="lsun_bedroom256", dataset_name=None, train_data_dir="data/lsun_bedroom")
    assert found.differences == []
