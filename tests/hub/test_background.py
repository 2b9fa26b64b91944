"""Pushing beside a run: never in its way, never two models in one commit, and a failure is one line."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import DIGITS_MODEL
from hub.server import Fault, HubServer
from huggingface_hub import HfApi
from programs import run_program
from test_publish import DRIVERS, TOKEN, environment, push_all, tree, variant

from ddpm_hf.hub.background import BackgroundPush
from ddpm_hf.hub.publish import Push

MODEL = DIGITS_MODEL
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        yield server


def background(hub: HubServer, run: Path, *versions: Path, **variables: str) -> dict:
    env = environment(hub, run.parent / "home", None) | variables
    done = run_program(DRIVERS / "driver_background.py", run, *versions, environment=env)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout)


def test_the_newest_model_is_pushed_and_none_is_mixed(hub, tmp_path):
    versions = [tmp_path / f"version-{number}" for number in range(3)]
    for number, version in enumerate(versions):
        variant(version, number)
        config = json.loads((version / "unet" / "config.json").read_text()) | {"_version": number}
        (version / "unet" / "config.json").write_text(json.dumps(config))
    hub.faults.append(Fault("POST .*/preupload/main", delay=1.0))  # the first push is still at it when the others come
    answer = background(hub, tmp_path / "run", *versions)
    assert answer["pushed"]
    assert answer["left"] == []
    _, first, last = hub.commits("models", "org/run")
    assert (first["summary"], last["summary"]) == ("version 0", "version 2")  # version 1 was overtaken
    for version, commit in ((versions[0], first), (versions[2], last)):
        for name in ("unet/config.json", WEIGHTS):
            stored = (hub.root / "objects" / commit["files"][name]["sha256"]).read_bytes()
            assert stored == (version / name).read_bytes()


def test_a_failure_is_one_line_with_the_command_that_finishes_it(hub, tmp_path):
    run = tmp_path / "run"
    hub.faults.append(Fault("/api/", times=99, status=500))
    answer = background(hub, run, MODEL)
    assert not answer["pushed"]
    assert answer["left"] == []
    last = answer["lines"][-1]
    assert last.startswith("not pushed (could not push to org/run, tried 2 times: the Hub answered 500")
    assert last.endswith(f"; nothing is lost, and this finishes it: ddpm-hf push {run} --repo_id org/run")
    assert tree(run) == tree(MODEL)
    hub.faults.clear()
    (finished,) = push_all(hub, tmp_path / "home", {"folder": str(run), "repo_id": "org/run"})
    assert "url" in finished
    assert hub.read("models", "org/run", WEIGHTS) == (MODEL / WEIGHTS).read_bytes()


def last_line_of(folder, monkeypatch, model_info) -> str:
    """What is logged last where the Hub's client does this; the push has failed, and its snapshot is gone."""
    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr("ddpm_hf.hub.background.quiet_client", lambda: None)  # for the whole process
    run, lines = folder / "run", []
    shutil.copytree(MODEL, run)
    pushes = BackgroundPush(Push(str(run), "org/run", token=TOKEN), lines.append)
    pushes.offer("version 0")
    assert not pushes.finish()
    assert not list(run.glob(".push-*"))
    return lines[-1]


def test_a_push_that_crashes_is_told_too(tmp_path, monkeypatch):
    def crash(*arguments, **options):
        raise SystemError("the client crashed")

    last = last_line_of(tmp_path, monkeypatch, crash)
    assert "not pushed (SystemError: the client crashed); nothing is lost" in last


def test_a_push_that_hangs_does_not_hold_up_the_end(hub, tmp_path):
    """With more than one file in it, which the Hub's client would upload in threads that Python waits for."""
    version, reached = tmp_path / "version", tmp_path / "reached"
    variant(version, 1)
    (version / "samples.png").write_bytes(b"a picture")
    hub.faults.append(Fault("^PUT", times=2, delay=60))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(background, hub, tmp_path / "run", version, ABANDON_AFTER=str(reached))
        while not hub.faults[0].happened and not answer.done():
            time.sleep(0.02)
        reached.touch()
        started = time.monotonic()
        answer = answer.result()
    assert time.monotonic() - started < 30
    assert "not pushed (the run ended first); nothing is lost, and this finishes it" in answer["lines"][-1]
    assert answer["left"] == []


def test_the_end_of_a_run_waits_for_a_hanging_push_for_a_while_only(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_hf.hub.background.MOST_WAIT", 0.05)
    hanging = threading.Event()
    last = last_line_of(tmp_path, monkeypatch, lambda *arguments, **options: hanging.wait())
    assert "not pushed (the run ended first); nothing is lost, and this finishes it" in last
    hanging.set()
