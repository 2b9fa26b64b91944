"""Checkpoints: complete or absent, checked when read, the last good one always there; models read from them."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL_NETWORK, make_small_unet
from diffusers import DDPMPipeline as StockDDPMPipeline
from diffusers import DDPMScheduler as StockDDPMScheduler
from diffusers import UNet2DModel as StockUNet2DModel
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPipeline
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


# ---------------------------------------------------------------------- models

SCHEDULER = {"num_train_timesteps": 20, "variance_type": "fixed_large"}


def save_run(folder: Path, *steps: int, scheduler=SCHEDULER, **network) -> Path:
    """A run's folder with checkpoints of random weights: seed N for the EMA weights after update N, -N for the raw."""
    (folder / "logs").mkdir(parents=True)
    (folder / "training_config.yaml").write_text("preset: digits\n")
    for step in steps:
        ema, raw = (dict(make_small_unet(seed, **network).state_dict()) for seed in (step, -step))
        state = {"network": {**SMALL_NETWORK, **network}, "scheduler": scheduler, "recipe": {"dropout": 0.25}}
        save_checkpoint(folder, step, {"model": raw, "ema": ema}, state)
    return folder


def same_weights(unet: torch.nn.Module, seed: int, **network) -> bool:
    own, expected = unet.state_dict(), make_small_unet(seed, **network).state_dict()
    return own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)


def test_a_run_and_its_checkpoints_are_models(tmp_path, capsys):
    run = save_run(tmp_path / "run", 3, 20)
    shutil.copytree(run / "checkpoint-3", tmp_path / "somewhere else")
    for folder, weights, seed in [
        (run, "ema", 20),
        (run, "raw", -20),
        (run / "checkpoint-3", "ema", 3),
        (str(run / "checkpoint-3"), "raw", -3),
        (tmp_path / "somewhere else", "ema", 3),
    ]:
        pipe = DDPMPipeline.from_pretrained(folder, weights=weights)
        assert same_weights(pipe.unet, seed)
        assert not pipe.unet.training
        path = run / "checkpoint-20" if folder == run else folder
        kind = "EMA" if weights == "ema" else "raw"
        assert capsys.readouterr().out == f"{kind} weights of {path}, after {abs(seed)} updates\n"


def test_images_are_those_of_stock_around_the_same_tensors(tmp_path):
    run = save_run(tmp_path / "run", 3)
    unet = StockUNet2DModel(**SMALL_NETWORK)
    unet.load_state_dict(load_file(run / "checkpoint-3" / "ema.safetensors"))
    stock = StockDDPMPipeline(unet.eval(), StockDDPMScheduler(**SCHEDULER))
    images = []
    for pipe in (stock, DDPMPipeline.from_pretrained(run)):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        images.append(pipe(batch_size=2, generator=generator, num_inference_steps=20, output_type="np").images)
    assert abs(images[0] - images[1]).max() < 1 / 255


def test_what_the_configuration_says_comes_with_the_weights(tmp_path):
    learned = {"num_train_timesteps": 20, "variance_type": "learned_range"}
    classes = {"num_class_embeds": 3, "_class_names": ["cat", "dog"], "_null_class": 2, "out_channels": 2}
    run = save_run(tmp_path / "run", 3, scheduler=learned, **classes)
    before = torch.get_rng_state()
    pipe = DDPMPipeline.from_pretrained(run, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)  # nobody's own draws change
    assert pipe.unet.dtype == torch.bfloat16
    assert (pipe.unet.config.dropout, pipe.scheduler.config.variance_type) == (0.25, "learned_range")
    pipe.set_progress_bar_config(disable=True)
    named, numbered = (
        pipe(seeds=[0], class_labels=label, guidance_scale=2.0, num_inference_steps=2, output_type="np").images
        for label in ("dog", 1)
    )
    assert (named == numbered).all()


def test_saved_again_it_opens_in_stock(tmp_path):
    DDPMPipeline.from_pretrained(save_run(tmp_path / "run", 3)).save_pretrained(tmp_path / "model")
    assert same_weights(StockDDPMPipeline.from_pretrained(tmp_path / "model").unet, 3)


def test_components_of_ones_own_and_arguments_that_have_no_meaning(tmp_path):
    run, scheduler = save_run(tmp_path / "run", 3), StockDDPMScheduler(num_train_timesteps=7)
    assert DDPMPipeline.from_pretrained(run, scheduler=scheduler).scheduler.config.num_train_timesteps == 7
    DDPMPipeline.from_pretrained(run, revision="main", token="x", local_files_only=True, variant=None)
    with pytest.raises(
        ValueError, match="a checkpoint takes no variant; make a pipeline of it first: ddpm-hf publish"
    ):
        DDPMPipeline.from_pretrained(run, variant="fp16")
    with pytest.raises(ValueError, match=r"dtype of a checkpoint must be one such as torch\.float16, got {'unet'"):
        DDPMPipeline.from_pretrained(run, dtype={"unet": torch.float16})
    with pytest.raises(ValueError, match="weights must be 'ema' or 'raw', got 'EMA'"):
        DDPMPipeline.from_pretrained(run, weights="EMA")


@pytest.mark.parametrize("name", ["ema.safetensors", "model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink()])
def test_a_half_copied_checkpoint_is_named_and_passed_over_in_a_run(tmp_path, capsys, name, damage):
    run = save_run(tmp_path / "run", 3, 20)
    damage(run / "checkpoint-20" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-20.*{name}"):
        DDPMPipeline.from_pretrained(run / "checkpoint-20")
    assert same_weights(DDPMPipeline.from_pretrained(run).unet, 3)
    said = capsys.readouterr().out
    assert "checkpoint-20" in said
    assert "trying the one before it" in said


def test_weights_of_another_network_are_named(tmp_path):
    path = save_run(tmp_path / "run", 3) / "checkpoint-3"
    tensors = load_file(path / "ema.safetensors")
    for change, words in [
        (
            {"conv_in.weight": torch.zeros(16, 3, 3, 3)},
            r"conv_in.weight have the shape \[16, 3, 3, 3\], and the network",
        ),
        ({"extra": torch.zeros(1)}, r"extra have the shape \[1\], and the network needs none"),
    ]:
        save_file({**tensors, **change}, path / "ema.safetensors")
        entry = {"sha256": hashlib.sha256((path / "ema.safetensors").read_bytes()).hexdigest()}
        entry["size"] = (path / "ema.safetensors").stat().st_size
        manifest = json.loads((path / "manifest.json").read_text()) | {"ema.safetensors": entry}
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=f"does not fit its own state.json: the weights {words}"):
            DDPMPipeline.from_pretrained(path)


def test_folders_without_a_model(tmp_path, small_pipeline):
    (tmp_path / "empty").mkdir()
    small_pipeline.save_pretrained(tmp_path / "published")
    save(tmp_path / "no ema", 1)
    for folder, weights, words in [
        ("empty", "ema", "holds no pipeline .there is no model_index.json in it. and no checkpoint of a training run"),
        (save_run(tmp_path / "new run").name, "ema", "has no checkpoint yet, so no model"),
        ("published", "raw", "holds a published model and no checkpoint: raw weights are in checkpoints only"),
        ("no ema", "ema", "checkpoint-1' has no ema weights: no ema.safetensors"),
    ]:
        with pytest.raises(OSError if folder == "empty" else CheckpointError, match=words):
            DDPMPipeline.from_pretrained(tmp_path / folder, weights=weights)
    with pytest.raises(ValueError, match="'org/x' is no folder here, and raw weights are in the checkpoints of a run"):
        DDPMPipeline.from_pretrained("org/x", weights="raw")


def test_a_published_model_stays_the_one_that_stock_opens(tmp_path, capsys, small_pipeline):
    run = save_run(tmp_path / "run", 3)
    small_pipeline.save_pretrained(run)
    os.utime(run / "checkpoint-3" / "manifest.json", (0, 0))
    assert same_weights(DDPMPipeline.from_pretrained(run).unet, 0)
    assert capsys.readouterr().out == ""
    assert same_weights(DDPMPipeline.from_pretrained(run, weights="raw").unet, -3)
    capsys.readouterr()
    os.utime(run / "model_index.json", (0, 0))
    os.utime(run / "checkpoint-3" / "manifest.json")
    assert same_weights(DDPMPipeline.from_pretrained(run).unet, 0)
    assert f"which is older than {run}/checkpoint-3; to replace it: ddpm-hf publish {run}" in capsys.readouterr().out
