"""Publishing: what goes into a push, and pushes and loads through the real client against a Hub on this machine."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS_MODEL, FIXTURES
from datasets import Dataset
from diffusers import DDPMPipeline as StockDDPMPipeline
from diffusers import UNet2DModel as StockUNet2DModel
from hub.server import Fault, HubServer
from huggingface_hub import ModelCard, constants
from PIL import Image
from programs import run_program
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPipeline, EvaluationReport, cli
from ddpm_hf.hub.files import check_opens, make_snapshot, published_files, take_report, write_card, write_pipeline
from ddpm_hf.hub.model_card import CardFacts
from ddpm_hf.hub.publish import Push
from ddpm_hf.utils.files import remove_leftovers
from ddpm_hf.utils.text import public_name

TOKEN = "hf_test_token"
MODEL = DIGITS_MODEL
DRIVERS = Path(__file__).parent


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """What a training run leaves: the model, its card and numbers, and much that is nobody else's business."""
    folder = tmp_path / "run"
    shutil.copytree(MODEL, folder)
    report = EvaluationReport("digits", "validation", 296)
    report.values["bits_per_dim"] = {"value": 4.4438, "standard_error": 0.0261}
    report.settings["bits_per_dim"] = {"estimator": "full sum"}
    report.save(folder / "evaluation.json")
    shutil.copy(FIXTURES.parent.parent / "docs" / "digits.png", folder / "samples.png")
    recipe = {"updates": "10 of 64 images", "hardware": "1 x cpu"}
    write_card(folder, CardFacts("run", "digits", recipe=recipe, sample="samples.png"))
    for private in ("checkpoint-10/optimizer.safetensors", "checkpoint-10/state.json", "logs/events", ".lock"):
        (folder / private).parent.mkdir(exist_ok=True)
        (folder / private).write_text("x")
    (folder / "training_config.yaml").write_text(f"train_data_dir: {tmp_path}\n")
    return folder


def environment(hub: HubServer, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    return {**os.environ, **hub.environment(home, token), "OMP_NUM_THREADS": "1"}


def push_all(hub: HubServer, home: Path, *jobs: dict, token: str | None = TOKEN, opening: bool = False) -> list[dict]:
    """Several pushes at once, in one process of their own."""
    command = [str(DRIVERS / "driver_push.py"), *["open"] * opening]
    env = environment(hub, home, token)
    if opening:
        done = run_program(*command, environment=env, input=json.dumps(jobs))
    else:
        command = [sys.executable, *command]
        done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout)


def load_all(hub: HubServer, home: Path, package: str, *jobs: dict, token: str | None = None) -> list[dict]:
    """Several loads, one after the other, in one process of their own."""
    command, env = [str(DRIVERS / "driver_load.py"), package], environment(hub, home, token)
    if package == "ddpm_hf":
        done = run_program(*command, environment=env, input=json.dumps(jobs))
    else:  # in a process that has never imported ours
        command = [sys.executable, *command]
        done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def load_between(hub: HubServer, home: Path, when: dict[Path, Callable[[], object]], *jobs: dict) -> list[dict]:
    """`load_all` with ddpm_hf; a job that waits for a file goes on after what `when` says was done."""
    env = environment(hub, home, None) | {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}
    load = partial(run_program, DRIVERS / "driver_load.py", "ddpm_hf", environment=env, input=json.dumps(jobs))
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        for file, action in when.items():
            while not loading.done() and not Path(f"{file}.reached").exists():
                time.sleep(0.02)
            action()
            file.touch()
        done = loading.result()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def weights_hash(folder: Path) -> str:
    """As in driver_load.py, from the file."""
    digest = hashlib.sha256()
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode() + file.get_tensor(name).numpy().tobytes())
    return digest.hexdigest()


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(hub: HubServer, repo: str, files: dict[str, bytes], **options) -> None:
    """A repository that somebody else made."""
    hub.create("models", repo, private=options.pop("private", False), **options)
    stored = {path: hub.store(data) | {"lfs": path.endswith(".safetensors")} for path, data in files.items()}
    hub._commit("models", repo, "upload", stored, ())


# ------------------------------------------------------------------------- what is published


def test_a_snapshot_holds_the_published_files_only_and_later_writes_do_not_reach_it(run_folder):
    with pytest.raises(OSError, match="there is no folder"):
        make_snapshot(run_folder / "nowhere")
    before = tree(run_folder)
    staging = make_snapshot(run_folder)
    weights = "unet/diffusion_pytorch_model.safetensors"
    names = {"README.md", "evaluation.json", "samples.png", "model_index.json", "unet/config.json", weights}
    assert set(tree(staging)) == names | {"scheduler/scheduler_config.json"} == set(published_files(run_folder))
    assert (staging / weights).samefile(run_folder / weights)  # not copied
    shutil.rmtree(run_folder / "unet")  # how a run replaces its model
    shutil.copytree(MODEL / "unet", run_folder / "unet")
    (run_folder / weights).write_bytes(b"the next model")
    (run_folder / "README.md").write_text("rewritten in place")
    assert {name: tree(staging)[name] for name in names} == {name: before[name] for name in names}


def test_paths_of_this_machine_do_not_get_out(run_folder, tmp_path):
    config = run_folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": str(tmp_path)}))
    report = EvaluationReport(str(tmp_path / "pictures"), "train", 3, model={"name": str(run_folder)})
    report.save(run_folder / "evaluation.json")
    staging = make_snapshot(run_folder)
    assert not [name for name, data in tree(staging).items() if str(tmp_path).encode() in data]
    published = json.loads((staging / "evaluation.json").read_text())
    assert (published["dataset"], published["model"]["name"]) == ("pictures", "run")
    assert "_name_or_path" not in json.loads((staging / "unet" / "config.json").read_text())


def test_names_of_classes_are_no_paths(run_folder):
    names = ["/m/0cmf2", "/", "a\\b", "~"]  # the first is how OpenImages calls aeroplanes
    config = run_folder / "unet" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"_class_names": names, "_name_or_path": "/home/me"})
    )
    published = json.loads((make_snapshot(run_folder) / "unet" / "config.json").read_text())
    assert published["_class_names"] == names
    assert "_name_or_path" not in published


def test_a_run_that_starts_leaves_snapshots_of_pushes_alone(run_folder):
    staging = make_snapshot(run_folder)
    before = tree(staging)
    remove_leftovers(run_folder)
    assert tree(staging) == before
    a_day_ago = time.time() - 2 * 86_400
    os.utime(staging, (a_day_ago, a_day_ago))
    make_snapshot(run_folder)
    assert not staging.exists()  # by then nobody is pushing it


class Killed(BaseException):
    """Nobody catches it, as nobody catches a kill."""


def test_a_kill_while_a_model_is_replaced_leaves_a_whole_one(tmp_path, monkeypatch):
    run, weights = tmp_path / "run", "diffusion_pytorch_model.safetensors"
    shutil.copytree(MODEL, run)
    variant(tmp_path / "new", 1)
    remove = shutil.rmtree

    def killed(path, *arguments, **options):
        if (Path(path) / weights).exists():  # the old network: half of it is removed
            (Path(path) / "config.json").unlink()
            raise Killed
        remove(path, *arguments, **options)

    pipe = DDPMPipeline.from_pretrained(tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            write_pipeline(pipe, run)
    new = load_file(tmp_path / "new" / "unet" / weights)
    loaded = StockDDPMPipeline.from_pretrained(run).unet.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in new.items())
    remove_leftovers(run)
    assert set(tree(run)) == set(tree(MODEL))
    write_pipeline(DDPMPipeline.from_pretrained(MODEL), run)
    assert set(tree(run)) == set(tree(MODEL))
    assert weights_hash(run) == weights_hash(MODEL)


def test_a_kill_between_the_renames_of_a_part_gives_the_old_one_back(tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(MODEL, run)
    variant(tmp_path / "new", 1)
    replace = Path.replace

    def killed(path, target):
        if path.name == "unet":
            raise Killed
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            write_pipeline(DDPMPipeline.from_pretrained(tmp_path / "new"), run)
    assert not (run / "unet").exists()
    remove_leftovers(run)
    assert set(tree(run)) == set(tree(MODEL))
    assert weights_hash(run) == weights_hash(MODEL)


def test_cards_are_utf_8_wherever_they_are_written(run_folder):
    """In a locale whose own encoding is ASCII."""
    code = "import sys; from pathlib import Path; from ddpm_hf.hub.files import write_card; "
    code += "from ddpm_hf.hub.model_card import CardFacts; write_card(Path(sys.argv[1]), CardFacts('run', 'Zo\\xe9'))"
    card = run_folder / "README.md"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(run_folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "trained on **Zoé**" in card.read_text(encoding="utf-8")


def test_a_card_in_another_encoding_is_named(run_folder):
    (run_folder / "README.md").write_bytes("# Modèle".encode("latin-1"))
    with pytest.raises(ValueError, match=r"^README\.md is not a text in UTF-8; save it again in that encoding"):
        write_card(run_folder, CardFacts("run", "digits"))


def test_a_report_that_a_card_could_not_show_is_refused(run_folder, tmp_path):
    staging = make_snapshot(run_folder)
    report = tmp_path / "report.json"
    for values in ({"a": 1}, {"a": {"value": "3.1"}}, [1]):
        report.write_text(json.dumps({"dataset": "d", "split": "s", "num_images": 1, "values": values}))
        with pytest.raises(ValueError, match="is not a report of ddpm-hf evaluate"):
            take_report(report, staging, None)
    with pytest.raises(ValueError, match="there is no report"):
        take_report(tmp_path / "nowhere", staging, None)
    made = EvaluationReport(str(tmp_path / "pictures"), "test", 3)
    made.add("fid", 3.1, float("nan"), {})
    made.save(tmp_path / "evaluation" / "report.json")
    take_report(tmp_path / "evaluation", staging, None)
    published = json.loads((staging / "evaluation.json").read_text())
    assert published["dataset"] == "pictures"
    assert published["values"] == {"fid": {"value": 3.1, "standard_error": None}}


@pytest.mark.parametrize("secret", ["my-own-token", "hf_" + "a1B2" * 10])
def test_a_token_in_a_published_file_is_refused(run_folder, secret):
    (run_folder / "README.md").write_text(f"Load it with token={secret}\n")
    with pytest.raises(ValueError, match=r"README\.md holds an access token"):
        make_snapshot(run_folder, "my-own-token")
    assert not list(run_folder.glob(".push-*"))


def test_the_token_is_in_no_representation_and_no_command():
    push = Push("runs/my model", "org/m", token="hf_secret", license="mit", private=False)
    assert "hf_secret" not in repr(push) + push.command
    assert push.command == "ddpm-hf push 'runs/my model' --repo_id org/m --private false --license mit"


def test_mistakes_before_anything_is_sent(tmp_path, run_folder, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    run = str(run_folder)
    (tmp_path / "empty").mkdir()
    for arguments, words in [
        ([run], "repo_id"),
        ([run, "--repo_id", "a/b/c"], "'a/b/c' is no repository name"),
        ([run, "--repo_id", "org/m", "--license", "Apache 2"], "apache-2.0"),
        ([run, "--repo_id", "org/m", "--privat"], "did you mean '--private'?"),
        ([run, "--repo_id", "org/m", "--private", "maybe"], "true or false"),
        ([run, "--repo_id", "org/m"], "HF_HUB_OFFLINE"),
        (["nowhere", "--repo_id", "org/m"], "there is no folder 'nowhere'; name that of a run or model"),
    ]:
        assert cli.main(["push", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert words in err


# ------------------------------------------------------------------------- what opens


def broken(folder: Path, how: str) -> str:
    """Break a model's folder in one of the ways that copying and saving have; what is said of it."""
    unet = folder / "unet"
    weights, config = unet / "diffusion_pytorch_model.safetensors", unet / "config.json"
    pipe = StockDDPMPipeline.from_pretrained(folder)
    if how in ("variant", "sharded variant"):
        weights.unlink()
        pipe.save_pretrained(folder, variant="fp16", max_shard_size="1MB" if "sharded" in how else "1GB")
        return "from_pretrained does not open"
    if how == "pickle":
        weights.unlink()
        pipe.save_pretrained(folder, safe_serialization=False)
        return "no safetensors weights"
    if how == "missing shard":
        weights.unlink()
        pipe.save_pretrained(folder, max_shard_size="1MB")
        next(unet.glob("*-00002-of-*")).unlink()
        return "from_pretrained does not open"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return "from_pretrained does not open"
    if how == "not a number":
        tensors = load_file(weights)
        tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
        return "weights conv_in.weight hold NaN"
    if how == "weight missing":
        tensors = load_file(weights)
        del tensors["conv_in.bias"]
        save_file(tensors, weights, metadata={"format": "pt"})
        return "do not fit its config.json: they have no conv_in.bias"
    values = json.loads(config.read_text())
    if how == "another network":
        config.write_text(
            json.dumps(values | {"block_out_channels": [value * 2 for value in values["block_out_channels"]]})
        )
        return "from_pretrained does not open"
    assert how == "a part of the network"
    config.write_text(json.dumps(values | {"layers_per_block": values["layers_per_block"] - 1}))
    return "remove the files that belong to another model|do not fit"


WAYS_TO_BREAK = (
    "variant",
    "sharded variant",
    "pickle",
    "missing shard",
    "truncated",
    "not a number",
    "weight missing",
    "another network",
    "a part of the network",
)


@pytest.mark.parametrize("how", WAYS_TO_BREAK)
def test_what_does_not_open_is_not_published(tmp_path, capfd, monkeypatch, how):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    words = broken(folder, how)
    before = tree(folder)
    job = Push(str(folder), "org/m", token=TOKEN)  # offline, but this is looked at before anything is sent
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises((ValueError, OSError), match=words):
        job.run()
    assert cli.main(["space", str(folder), "--output", str(tmp_path / "space")]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert ".push-" not in error
    assert not (tmp_path / "space").exists()
    assert tree(folder) == before


@pytest.mark.parametrize("options", [{"max_shard_size": "1MB"}, {"variant": "fp16"}])
def test_shards_and_variants_beside_the_whole_open_as_they_were(tmp_path, options):
    folder, stock = tmp_path / "model", StockDDPMPipeline.from_pretrained(MODEL)
    if "variant" in options:
        shutil.copytree(MODEL, folder)
        options = options | {"max_shard_size": "1MB"}
    stock.save_pretrained(folder, **options)
    staging = make_snapshot(folder)
    check_opens(staging, folder)
    for package in (StockDDPMPipeline, DDPMPipeline):
        for variant in {None, options.get("variant")}:
            opened = package.from_pretrained(staging, variant=variant).unet.state_dict()
            assert all(torch.equal(opened[name], value) for name, value in stock.unet.state_dict().items())


# ------------------------------------------------------------------------- pushes


def test_a_push_is_one_private_commit_of_what_stock_would_write_and_the_extras(hub, run_folder, tmp_path):
    parts = StockDDPMPipeline.from_pretrained(MODEL).components  # a pipeline made of them has no path to leak
    StockDDPMPipeline(**parts).save_pretrained(tmp_path / "stock")
    job = {"folder": str(run_folder), "repo_id": "org/digits", "license": "apache-2.0"}
    (done,) = push_all(hub, tmp_path / "home", job)
    assert done["lines"] == [
        f"pushing 2.5 MB to {hub.url}/org/digits (private)",
        f"pushed to {hub.url}/org/digits (private)",
    ]
    assert hub.info("models", "org/digits")["private"]
    first, commit = hub.commits("models", "org/digits")
    assert done["url"].endswith(f"/org/digits/commit/{commit['oid']}")
    stock = set(tree(tmp_path / "stock"))
    assert set(commit["files"]) - set(first["files"]) == stock | {"README.md", "evaluation.json", "samples.png"}
    for name in ("model_index.json", "unet/diffusion_pytorch_model.safetensors"):
        assert hub.read("models", "org/digits", name) == tree(tmp_path / "stock")[name]
    card = ModelCard(hub.read("models", "org/digits", "README.md").decode())
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results[0].metric_value == 4.4438
    assert card.text.count('from_pretrained("org/digits")') == 2
    assert "updates: 10 of 64 images" in card.text
    assert hub.requests("validate-yaml")  # the client had the Hub look at it
    assert not [
        path for path in (tmp_path / "hub").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]
    uploads = len(hub.requests("^PUT"))
    (again,) = push_all(hub, tmp_path / "home", job)
    assert again["lines"][-1] == "org/digits already has all of it"
    assert len(hub.commits("models", "org/digits")) == 2
    assert len(hub.requests("^PUT")) == uploads
    assert {path.name for path in run_folder.iterdir() if path.name.startswith(".")} == {".lock", ".hub.json"}


def variant(path: Path, number: int) -> str:
    """The model with other weights, in a new folder; the SHA-256 of its weights' file."""
    shutil.copytree(MODEL, path)
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += number
    save_file(tensors, weights, metadata={"format": "pt"})
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def large_model(path: Path) -> str:
    """A pipeline with 17 MB of weights; the SHA-256 of its weights' file."""
    config = json.loads((MODEL / "unet" / "config.json").read_text()) | {"block_out_channels": [128, 128]}
    scheduler = StockDDPMPipeline.from_pretrained(MODEL).scheduler
    StockDDPMPipeline(StockUNet2DModel.from_config(config), scheduler).save_pretrained(path)
    return hashlib.sha256((path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def test_pushes_recover_from_every_fault_with_equal_weights(hub, tmp_path):
    faults = {
        "preupload": lambda oid: Fault("POST .*org/preupload/preupload", times=2, status=500),
        "batch": lambda oid: Fault("POST /org/batch.git/.*/batch", times=2, status=503),
        "upload": lambda oid: Fault(f"PUT /{oid}", times=2, status=500),
        "verify": lambda oid: Fault("POST /org/verify.git/.*/verify", status=504),
        "late": lambda oid: Fault("POST .*org/late/commit", times=2, status=500),
        "too-many": lambda oid: Fault("POST .*org/too-many/commit", status=429),
        "information": lambda oid: Fault("GET /api/models/org/information", times=2, status=502),
        "dropped-commit": lambda oid: Fault("POST .*org/dropped-commit/commit", drop_after=10),
        "dropped-answer": lambda oid: Fault("POST .*org/dropped-answer/commit", lose_answer=True),
        "slow": lambda oid: Fault(f"PUT /{oid}", delay=3.0),
        "slow-commit": lambda oid: Fault("POST .*org/slow-commit/commit", delay=3.0),
        "large": lambda oid: Fault(f"PUT /{oid}", drop_after=8_000_000),
    }
    hub.faults.append(Fault("POST /api/repos/create", times=2, status=500))
    jobs = []
    for number, (name, fault) in enumerate(faults.items()):
        folder = tmp_path / name
        hub.faults.append(fault(large_model(folder) if name == "large" else variant(folder, number)))
        jobs.append({"folder": str(folder), "repo_id": f"org/{name}", "timeout": 1.0 if "slow" in name else 10.0})
    results = push_all(hub, tmp_path / "home", *jobs, opening=True)
    assert [result for result in results if "error" in result] == []
    assert [fault for fault in hub.faults if fault.happened != fault.times] == []
    for name in faults:
        published = hub.read("models", f"org/{name}", "unet/diffusion_pytorch_model.safetensors")
        assert published == (tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        # one commit, even where the first was made and its answer lost
        assert len(hub.commits("models", f"org/{name}")) == 2, name
    assert hub.files("models", "org/large")["unet/diffusion_pytorch_model.safetensors"]["size"] > 16_000_000


def test_a_push_that_failed_is_finished_by_the_same_command(hub, run_folder, tmp_path):
    before = tree(run_folder)
    job = {"folder": str(run_folder), "repo_id": "org/digits", "attempts": 2}
    stubborn = Fault("POST .*/commit/main", times=2, status=500)
    hub.faults.append(stubborn)
    (failed,) = push_all(hub, tmp_path / "home", job)
    assert failed["kind"] == "PushError"
    assert "tried 2 times: the Hub answered 500" in failed["error"]
    assert tree(run_folder) == before
    (done,) = push_all(hub, tmp_path / "home", job)
    assert "url" in done
    uploaded = [request.path for request in hub.requests("^PUT")]
    assert len(uploaded) == len(set(uploaded)) == 2  # weights and samples: what had arrived was not sent again


def test_nothing_becomes_public_by_accident(hub, run_folder, tmp_path):
    for name in ("public", "careful", "new-too"):
        hub.create("models", f"org/{name}", private=False)
    hub.create("models", "org/closed", private=True)
    folder = str(run_folder)
    put(hub, "org/other", {"model_index.json": b'{"_class_name": "StableDiffusionPipeline"}'}, private=True)
    put(hub, "org/llm", {"model.safetensors": b"x"}, private=True)
    hub.create("models", "org/read-only", private=True)
    hub.change("models", "org/read-only", read_only=True)
    refused, public, closed, made, other, llm, read_only = push_all(
        hub,
        tmp_path / "home",
        {"folder": folder, "repo_id": "org/careful"},
        {"folder": folder, "repo_id": "org/public", "private": False},
        {"folder": folder, "repo_id": "org/closed", "private": False},
        {"folder": folder, "repo_id": "named-by-me", "private": False},
        {"folder": folder, "repo_id": "org/other"},
        {"folder": folder, "repo_id": "org/llm"},
        {"folder": folder, "repo_id": "org/read-only"},
    )
    assert "org/careful is public; add private=False" in refused["error"]
    assert f"{hub.url}/org/public (public)" in public["lines"][0]
    assert f"{hub.url}/org/closed (private)" in closed["lines"][0]
    assert hub.info("models", "org/closed")["private"]
    assert f"{hub.url}/tester/named-by-me (public)" in made["lines"][0]
    assert not hub.info("models", "tester/named-by-me")["private"]
    assert "holds another model (StableDiffusionPipeline)" in other["error"]
    assert "holds another model (model.safetensors)" in llm["error"]
    assert "the Hub answered 403 for 'org/read-only': Forbidden: you must use a write token" in read_only["error"]
    for name in ("careful", "other", "llm", "read-only"):
        assert "README.md" not in hub.files("models", f"org/{name}")
    (wrong,) = push_all(hub, tmp_path / "home", {"folder": folder, "repo_id": "org/m", "token": "hf_wrong"})
    assert "does not know this token" in wrong["error"]
    assert "hf_wrong" not in json.dumps(wrong)
    (none,) = push_all(hub, tmp_path / "home", {"folder": folder, "repo_id": "org/m"}, token=None)
    assert "needs a token" in none["error"]


def test_weights_of_an_earlier_model_go_and_other_peoples_files_stay(hub, run_folder, tmp_path):
    weights = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    old = {weights: b"old", "unet/diffusion_pytorch_model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    put(hub, "org/m", tree(MODEL) | old, private=True)
    (done,) = push_all(hub, tmp_path / "home", {"folder": str(run_folder), "repo_id": "org/m"})
    assert set(hub.files("models", "org/m")) == {".gitattributes", "notes.txt", *published_files(run_folder)}
    assert any(line.startswith("removing files of an earlier push: ") and weights in line for line in done["lines"])


def test_edits_of_the_card_survive_pushes(hub, run_folder, tmp_path):
    def push() -> list[str]:
        (done,) = push_all(hub, tmp_path / "home", {"folder": str(run_folder), "repo_id": "org/m"})
        return done["lines"]

    def card() -> str:
        return hub.read("models", "org/m", "README.md").decode()

    def numbers(value: float) -> None:
        report = EvaluationReport("digits", "validation", 296)
        report.values["bits_per_dim"] = {"value": value, "standard_error": 0.01}
        report.save(run_folder / "evaluation.json")

    local = run_folder / "README.md"
    local.write_text(local.read_text().replace("# run", "# run\n\nWritten here."))
    assert "README.md was edited, so it is published as it is: without new numbers, snippets or license" in push()
    assert card() == local.read_text()
    local.write_text(local.read_text().replace("Written here.", "Written here, twice."))
    push()  # what is on the Hub is what was pushed from here, so the new text is no conflict
    assert "Written here, twice." in card()
    # a person edits on the Hub: text, a generated section, and the front matter
    edited = card().replace("Written here, twice.", "Written on the Hub.").replace("research and teaching", "fun")
    edited = edited.replace("library_name: diffusers", "library_name: diffusers\nlicense: mit\nextra: 1")
    hub.commit("models", "org/m", "edit", {"README.md": edited.encode()})
    numbers(3.25)
    lines = push()
    assert card() == edited
    assert json.loads(hub.read("models", "org/m", "evaluation.json"))["values"]["bits_per_dim"]["value"] == 3.25
    assert "README.md was edited on the Hub and stays as it is there; yours stays here" in lines
    assert "Written here, twice." in local.read_text()
    numbers(3.0)
    push()
    assert card() == edited
    # without an edit anywhere the card is generated anew
    local.unlink()
    hub.commit("models", "org/m", "remove", {}, ("README.md",))
    for value, text in ((3.0, "**3.000**"), (2.5, "**2.500**")):
        numbers(value)
        push()
        assert text in card()


def test_a_card_of_nothing_but_a_license_is_filled(hub, run_folder, tmp_path):
    """As the Hub's page makes one with a new repository."""
    put(hub, "org/m", {"README.md": b"---\nlicense: mit\n---\n"}, private=True)
    put(hub, "org/mine", {"README.md": b"---\nlicense: mit\n---\n# Mine\n"}, private=True)
    jobs = [{"folder": str(run_folder), "repo_id": f"org/{name}"} for name in ("m", "mine")]
    push_all(hub, tmp_path / "home", *jobs)
    card = ModelCard(hub.read("models", "org/m", "README.md").decode())
    assert card.data.license == "mit"
    assert "updates: 10 of 64 images" in card.text
    assert hub.read("models", "org/mine", "README.md") == b"---\nlicense: mit\n---\n# Mine\n"


def test_an_edit_on_the_hub_during_a_push_is_not_lost(hub, run_folder, tmp_path):
    job = {"folder": str(run_folder), "repo_id": "org/m"}
    push_all(hub, tmp_path / "home", job)
    (run_folder / "evaluation.json").unlink()
    (run_folder / "samples.png").write_bytes(b"another picture")
    text = hub.read("models", "org/m", "README.md").decode().replace("# m\n", "# Renamed\n")
    hub.before["POST .*/commit/main"] = lambda: hub.commit("models", "org/m", "edit", {"README.md": text.encode()})
    (done,) = push_all(hub, tmp_path / "home", job)
    assert "url" in done
    assert [commit["summary"] for commit in hub.commits("models", "org/m")][-2:] == ["edit", "Upload a DDPM"]
    assert "# Renamed" in hub.read("models", "org/m", "README.md").decode()
    assert hub.read("models", "org/m", "samples.png") == b"another picture"


def push_objects(hub: HubServer, home: Path, *jobs: dict) -> list[dict]:
    """Pushes of pipelines and their parts from Python, in one process of their own."""
    jobs = [{"model": str(MODEL), **job} for job in jobs]
    env = environment(hub, home)
    done = run_program(DRIVERS / "driver_objects.py", environment=env, input=json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_python_pushes_is_private_unless_asked_and_has_our_card(hub, tmp_path):
    for name in ("public", "public-unet", "public-scheduler", "careful", "careful-unet", "careful-scheduler"):
        hub.create("models", f"org/{name}", private=False)
    hub.create("models", "org/proposed", private=True)
    folder = str(tmp_path / "saved")
    saving = {"method": "save_pretrained", "arguments": [folder], "push_to_hub": True}
    config = {"what": "unet", "method": "save_config", "arguments": [folder], "push_to_hub": True}
    results = push_objects(
        hub,
        tmp_path / "home",
        {"arguments": ["org/pipe"], "commit_message": "Mine", "token": TOKEN},
        {"arguments": ["org/open"], "private": False},
        {"arguments": ["org/public"], "private": False},
        {"arguments": ["org/proposed"], "create_pr": True},
        {**saving, "repo_id": "org/saved"},
        saving,
        {"what": "unet", "arguments": ["org/unet"]},
        {"what": "scheduler", "arguments": ["org/scheduler"]},
        {"what": "unet", **saving, "repo_id": "org/saved-unet"},
        {"what": "scheduler", **saving, "repo_id": "org/saved-scheduler"},
        {**config, "repo_id": "org/config"},
        {"what": "unet", "arguments": ["org/public-unet"], "private": False},
        {"arguments": ["org/careful"]},
        {**saving, "repo_id": "org/careful"},
        {"what": "unet", "arguments": ["org/careful-unet"]},
        {"what": "unet", **saving, "repo_id": "org/careful-unet"},
        {"what": "scheduler", "arguments": ["org/careful-scheduler"]},
        {"arguments": ["org/pickle"], "safe_serialization": False},
        {"what": "unet", "arguments": ["org/pickle"], "safe_serialization": False},
        {"arguments": ["org/variant"], "variant": "fp16"},
    )
    errors = [result["error"] for result in results if "error" in result]
    assert [result for result in results[:12] if "error" in result] == []
    assert [" is public; " in error for error in errors] == [True] * 5 + [False] * 3
    assert all("private=False" in error for error in errors[:5])
    assert ["pickle" in error for error in errors[5:]] == [True, True, False]
    assert "does not open with from_pretrained" in errors[-1]
    private = ("pipe", "saved", "unet", "scheduler", "saved-unet", "saved-scheduler", "config")
    assert all(hub.info("models", f"org/{name}")["private"] for name in private)
    assert hub.info("models", "tester/saved")["private"]
    assert not hub.info("models", "org/open")["private"]
    for name in ("careful", "careful-unet", "careful-scheduler", "proposed"):
        assert set(hub.files("models", f"org/{name}")) == {".gitattributes"}
    assert not any((hub.root / "models" / "org" / name).exists() for name in ("pickle", "variant"))
    assert results[3]["url"] == f"{hub.url}/org/proposed/discussions/1"
    assert hub.commits("models", "org/pipe")[-1]["summary"] == "Mine"
    for name in ("org/pipe", "org/saved", "org/open", "tester/saved"):
        card = hub.read("models", name, "README.md").decode()
        assert card.count(f'from_pretrained("{name}")') == 2
    jobs = [{"name": name, "token": TOKEN} for name in ("org/pipe", "org/saved", "org/public")]
    for package in ("ddpm_hf", "diffusers"):
        loaded = load_all(hub, tmp_path / package, package, *jobs)
        assert [result.get("weights") for result in loaded] == [weights_hash(MODEL)] * 3


def test_a_relative_path_of_images_is_no_name_on_the_hub_wherever_it_is_pushed_from(hub, tmp_path, monkeypatch):
    """Recorded where the images are; published from elsewhere."""
    pictures = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    work = tmp_path / "work"
    (work / "data" / "org").mkdir(parents=True)
    Dataset.from_dict({"image": [Image.fromarray(picture) for picture in pictures]}).to_parquet(
        work / "data" / "org" / "train.parquet"
    )
    shutil.copytree(MODEL, work / "runs" / "mine")
    evaluate = "evaluate --model runs/mine --dataset_name data/org --num_images 2 --num_evaluations 2 --split train"
    recipe = "train --preset digits --dataset_name data/org --max_train_steps 1 --total_batch_size 4 --output_dir made"
    recipe += " --num_sample_images 1 --ddpm_num_inference_steps 1 --validation_split 0.25 --eval_num_images 2"
    monkeypatch.chdir(work)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert cli.main([*evaluate.split(), "--output", "runs/mine/evaluation.json"]) == 0
    assert cli.main([*recipe.split(), "--eval_num_evaluations", "2", "--cache_dir", str(tmp_path / "cache")]) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub-name" / "pets").mkdir(parents=True)  # what exists here says nothing of what was meant there
    for name in ("runs/mine", "made"):
        staging = make_snapshot(work / name)
        push_all(hub, tmp_path / "home", {"folder": str(work / name), "repo_id": f"org/{Path(name).name}"})
        published = tree(staging) | {"README.md": hub.read("models", f"org/{Path(name).name}", "README.md")}
        assert not [file for file, data in published.items() if b"data/org" in data or b"runs/mine" in data], name
        report = json.loads(published["evaluation.json"])
        assert report["dataset"] == "org"
        assert ModelCard(published["README.md"].decode()).data.datasets is None
    assert public_name("hub-name/pets") == "hub-name/pets"


# ------------------------------------------------------------------------- loads


def test_a_pushed_repository_loads_in_stock_diffusers_without_this_package(hub, run_folder, tmp_path):
    push_all(hub, tmp_path / "home", {"folder": str(run_folder), "repo_id": "org/digits"})
    oid = hub.files("models", "org/digits")["unet/diffusion_pytorch_model.safetensors"]["sha256"]
    hub.faults.append(Fault(f"GET /{oid}", drop_after=1_000_000))
    name = {"name": "org/digits"}
    hidden, loaded = load_all(
        hub, tmp_path / "other", "diffusers", name | {"token": False}, name | {"token": TOKEN, "draw": True}
    )
    assert "error" in hidden  # it is private
    assert loaded["class"] == "diffusers.pipelines.ddpm.pipeline_ddpm.DDPMPipeline"
    assert loaded["weights"] == weights_hash(MODEL)
    stock = StockDDPMPipeline.from_pretrained(MODEL)
    stock.set_progress_bar_config(disable=True)
    draws = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 10, "output_type": "np"}
    assert np.abs(np.array(loaded["images"]) - stock(batch_size=2, **draws).images).max() < 1e-3
    assert hub.faults[0].happened == 1


def test_loading_by_name(hub, tmp_path):
    files = tree(MODEL)
    weights = "unet/diffusion_pytorch_model.safetensors"
    first, second = (tmp_path / "first", tmp_path / "second")
    variant(first, 1), variant(second, 2)
    put(hub, "org/m", tree(first))
    old = hub.commits("models", "org/m")[-1]["oid"]
    newer = {weights: hub.store(tree(second)[weights]) | {"lfs": True}}
    hub._commit("models", "org/m", "better weights", newer, ())
    put(hub, "org/gated", files, gated=True)
    put(hub, "org/private", files, private=True)
    put(hub, "org/no-weights", {name: data for name, data in files.items() if name != weights})
    diffusion = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    put(
        hub, "org/text", {"model_index.json": json.dumps(diffusion | {"vae": ["diffusers", "AutoencoderKL"]}).encode()}
    )
    put(hub, "org/no-pipeline", {"config.json": b"{}"})
    for name, number in (("dropped", 3), ("failing", 4), ("slow", 5)):
        oid = variant(tmp_path / name, number)
        put(hub, f"org/{name}", tree(tmp_path / name))
        kind = (
            {"drop_after": 500_000} if name == "dropped" else {"status": 500} if name == "failing" else {"delay": 3.0}
        )
        hub.faults.append(Fault(f"GET /{oid}", **kind))
    hub.faults.append(Fault("HEAD /org/failing/resolve/.*/model_index.json", status=503))
    home, cache = tmp_path / "home", str(tmp_path / "cache")

    def break_the_cache() -> None:
        (link,) = (home / "hub" / "models--org--dropped").rglob("diffusion_pytorch_model.safetensors")
        link.resolve().unlink()
        link.unlink()

    when = {tmp_path / "break": break_the_cache, tmp_path / "stop": lambda: hub.__exit__()}
    results = load_between(
        hub,
        home,
        when,
        {"name": "org/m"},
        {"name": "org/m", "revision": old, "cache_dir": cache},
        {"name": "org/m", "revision": "v9"},
        {"name": "org/nowhere"},
        {"name": "org/private"},
        {"name": "org/private", "token": TOKEN},
        {"name": "org/gated"},
        {"name": "org/text"},
        {"name": "org/no-pipeline"},
        {"name": "org/no-weights"},
        {"name": "a/b/c"},
        {"name": "org/dropped"},
        {"name": "org/failing"},
        {"name": "org/slow"},
        {"name": "org/slow", "local_files_only": True},
        {"name": "org/private", "local_files_only": True, "cache_dir": cache},
        {"name": "org/dropped", "local_files_only": True, "wait_for": str(tmp_path / "break")},
        {"name": "org/m", "wait_for": str(tmp_path / "stop")},
        {"name": "org/m", "revision": old, "cache_dir": cache},
        {"name": "org/unseen"},
    )
    expected = [
        weights_hash(second),
        weights_hash(first),
        "the Hub answered 404 for 'org/m': Invalid rev id: v9",
        "no repository of that name on the Hub",
        "no repository of that name on the Hub",
        weights_hash(MODEL),
        "the Hub answered 403 for 'org/gated': Access to model org/gated is restricted",
        "'org/text' holds a StableDiffusionPipeline (unet: UNet2DConditionModel, vae: AutoencoderKL), not a DDPM",
        "'org/no-pipeline' holds no diffusers pipeline: there is no model_index.json",
        "'org/no-weights' has no safetensors weights",
        "there is no folder 'a/b/c' here, and no repository of that name on the Hub",
        weights_hash(tmp_path / "dropped"),
        weights_hash(tmp_path / "failing"),
        weights_hash(tmp_path / "slow"),
        weights_hash(tmp_path / "slow"),
        "nor is it in the cache, and the network is switched off (local_files_only=True)",
        "the copy of 'org/dropped' in the cache is incomplete",
        weights_hash(second),  # from the cache, although nobody answers
        weights_hash(first),
        "no answer from the Hub",
    ]
    for number, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        found = result.get("weights") or result["error"]
        assert wanted in found, (number, result)
        if "error" in result:
            assert "\n" not in result["error"]
        else:
            assert result["class"] == "ddpm_hf.pipelines.pipeline_ddpm.DDPMPipeline"
    assert [fault for fault in hub.faults if fault.happened != fault.times] == []


# ------------------------------------------------------------------------- training


def put_pictures(hub: HubServer, repo: str, path: Path) -> None:
    """A dataset of 64 grey pictures as one parquet file, private."""
    pictures = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
    column = Dataset.from_dict({"image": [Image.fromarray(picture) for picture in pictures]})
    column.to_parquet(path)
    hub.create("datasets", repo, private=True)
    stored = hub.store(path.read_bytes()) | {"lfs": True}
    hub._commit("datasets", repo, "upload", {"data/train-00000-of-00001.parquet": stored}, ())


def train_all(hub: HubServer, home: Path, runs: dict[str, list[str]]) -> dict[str, str]:
    """Short runs, one after the other in one process of their own, into folders of their names; what they wrote."""
    recipe = "--preset digits --max_train_steps 6 --checkpointing_steps 2 --total_batch_size 8 --num_sample_images 4"
    recipe += " --ddpm_num_inference_steps 5 --eval_num_images 8 --eval_num_evaluations 2 --push_to_hub"
    jobs = [[*recipe.split(), "--output_dir", str(home.parent / name), *flags] for name, flags in runs.items()]
    env = environment(hub, home)
    done = run_program(DRIVERS / "driver_train.py", environment=env, input=json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    results = json.loads(done.stdout)
    return {name: f"{result['code']} {result['written']}" for name, result in zip(runs, results, strict=True)}


def test_training_from_the_hub_and_to_the_hub(hub, tmp_path):
    put_pictures(hub, "org/pictures", tmp_path / "pictures.parquet")
    hub.create("models", "tester/refused", private=False)
    hub.faults.append(Fault("POST .*/org/trained/commit", status=500))
    hub.faults.append(Fault("POST .*/tester/failing/commit", status=403, times=99))
    pictures = ["--dataset_name", "org/pictures", "--validation_split", "0.2"]
    runs = {
        "trained": [*pictures, "--hub_model_id", "org/trained", "--license", "mit"],
        "failing": ["--hub_token", TOKEN],
        "refused": [],
    }
    output = train_all(hub, tmp_path / "home", runs)
    assert {name: int(text.split()[0]) for name, text in output.items()} == {"trained": 0, "failing": 0, "refused": 2}

    trained = output["trained"]
    assert f"will push to {hub.url}/org/trained (private)" in trained
    assert f"pushed to {hub.url}/org/trained (private)" in trained
    assert "trying again in 1 s" in trained
    commits = hub.commits("models", "org/trained")
    assert commits[-1]["summary"] == "After update 6, the last"
    assert all(commit["summary"].startswith("After update") for commit in commits[1:])
    published = set(commits[-1]["files"]) - {".gitattributes"}
    assert published == {*tree(MODEL), "README.md", "evaluation.json", "samples.png"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert hub.read("models", "org/trained", weights) == (tmp_path / "trained" / weights).read_bytes()
    card = ModelCard(hub.read("models", "org/trained", "README.md").decode())
    assert (card.data.license, card.data.datasets) == ("mit", ["org/pictures"])
    assert card.data.eval_results[0].metric_type == "bits_per_dim"
    assert 'from_pretrained("org/trained")' in card.text
    assert "updates: 6 of 8 images" in card.text

    command = f"ddpm-hf push {tmp_path / 'failing'} --repo_id tester/failing"
    assert "the Hub answered 403 for 'tester/failing'" in output["failing"]
    assert f"nothing is lost, and this finishes it: {command}" in output["failing"]
    assert TOKEN not in (tmp_path / "failing" / "training_config.yaml").read_text()
    assert not list((tmp_path / "failing").glob(".push-*"))
    hub.faults.clear()
    (finished,) = push_all(hub, tmp_path / "home", {"folder": str(tmp_path / "failing"), "repo_id": "tester/failing"})
    assert "url" in finished
    assert hub.read("models", "tester/failing", weights) == (tmp_path / "failing" / weights).read_bytes()

    assert "tester/refused is public; add --private false (in training --hub_private_repo false)" in output["refused"]
    assert set(hub.files("models", "tester/refused")) == {".gitattributes"}
    assert not list((tmp_path / "refused").glob("checkpoint-*"))


def test_a_dry_run_asks_the_hub_and_changes_nothing(hub, tmp_path):
    hub.orgs = {"org": "contributor", "readers": "read"}
    hub.tokens["hf_reading"], hub.roles["hf_reading"] = "reader", "read"
    put(hub, "org/ddpm", tree(MODEL), private=True)
    put(hub, "org/read-only", tree(MODEL), private=True)
    hub.change("models", "org/read-only", read_only=True)
    put(hub, "org/public", tree(MODEL))
    put(hub, "org/other", {"model.safetensors": b"x"}, private=True)
    ids = {"mine": None, "made": "org/made", "there": "org/ddpm", "readers": "readers/made", "foreign": "others/made"}
    ids |= {"read_only": "org/read-only", "public": "org/public", "other": "org/other", "token": None, "unknown": None}
    runs = {name: ["--dry_run", *(["--hub_model_id", repo] if repo else [])] for name, repo in ids.items()}
    runs["token"] += ["--hub_token", "hf_reading"]
    runs["unknown"] += ["--hub_token", "hf_unknown"]
    output = train_all(hub, tmp_path / "home", runs)
    for name, what in {
        "mine": "tester/mine (private), which will be made",
        "made": "org/made (private), which",
    }.items():
        assert output[name].startswith("0 ")
        assert f"Hub: {hub.url}/{what}" in output[name]
    assert f"Hub: {hub.url}/org/ddpm (private)\n" in output["there"]
    refusals = {
        "readers": "this token, of tester, can make repositories in tester, org, not in readers",
        "foreign": "can make repositories in tester, org, not in others",
        "read_only": "the Hub answered 403 for 'org/read-only': Forbidden: you must use a write token",
        "public": "org/public is public; add --private false (in training --hub_private_repo false)",
        "other": "org/other holds another model (model.safetensors)",
        "token": "the token may only read; reader/token needs one with write access",
        "unknown": "the Hub does not know this token",
    }
    for name, words in refusals.items():
        assert output[name].startswith("2 "), name
        assert words in output[name]
    assert hub.requests("^(POST|PUT)") == []
    assert not [name for name in runs if (tmp_path / name).exists()]
