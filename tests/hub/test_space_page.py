"""The page of a Space, as a program that visits it sees it; `space_browser.py` looks at it in a browser."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from conftest import DIGITS_MODEL, stock_draws
from diffusers import DDIMScheduler
from diffusers import DDPMPipeline as StockDDPMPipeline
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from space_server import GUARD, environment

from ddpm_hf import DDPMPipeline
from ddpm_hf.diffusion.likelihood import prior_bpd, vb_terms_bpd
from ddpm_hf.hub.space import write_space
from ddpm_hf.hub.space_app import serve
from ddpm_hf.utils.randomness import SeededNoise

MODEL = DIGITS_MODEL


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spaces") / "demo"
    write_space(MODEL, folder)
    return folder


def test_images_are_the_pipelines_own(client):
    job = client.submit("model", "0-2", 20, "ddpm", None, 1, api_name="/sample")
    x_t, x_0, images, text = job.result()
    assert re.fullmatch(r"3 drawn in \S+ s: 20 steps of ddpm, 20 network evaluations each", text)
    on_the_way = job.outputs()[:-1]
    assert len(on_the_way) > 3, "there was nothing to watch"
    assert all(seen[2] == [] and re.match(r"step \d+ of 20, t = \d+: ", seen[3]) for seen in on_the_way)
    first, last = (np.asarray(Image.open(seen[0]), float) for seen in (on_the_way[0], on_the_way[-1]))
    assert np.abs(first - last).mean() > 10, "the pictures on the way do not change"
    assert Image.open(x_t).size == Image.open(x_0).size

    pipe = DDPMPipeline.from_pretrained(MODEL)
    stock = StockDDPMPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    stock.set_progress_bar_config(disable=True)
    own = pipe(seeds=range(3), num_inference_steps=20).images
    with stock_draws(SeededNoise(range(3))):  # 20 steps, as stock spaces them in the same way where they divide T
        others = stock(batch_size=3, num_inference_steps=20).images
    for entry, ours, theirs in zip(images, own, others, strict=True):
        got = np.asarray(Image.open(entry["image"]))
        np.testing.assert_array_equal(got, np.asarray(ours))
        assert np.abs(got.astype(int) - np.asarray(theirs)).max() <= 1


def test_two_visitors_at_once_do_not_disturb_each_other(client):
    alone = [client.predict("model", seeds, 8, "unipc", None, 1, api_name="/sample")[2] for seeds in ("5", "6,7")]
    jobs = [client.submit("model", seeds, 8, "unipc", None, 1, api_name="/sample") for seeds in ("5", "6,7")]
    for job, images in zip(jobs, alone, strict=True):
        assert len(job.result()[2]) == len(images)
        for together, entry in zip(job.result()[2], images, strict=True):
            assert Path(together["image"]).read_bytes() == Path(entry["image"]).read_bytes()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (("model", "0-99", 5, "ddim", None, 1), "Seeds are too many; at most 16 images at a time"),
        (("model", "0-9999999999", 5, "ddim", None, 1), "Seeds are too many; at most 16 images at a time"),
        (("model", "one", 5, "ddim", None, 1), "Seeds takes whole numbers and rising ranges"),
        (("model", "", 5, "ddim", None, 1), "Seeds takes whole numbers and rising ranges"),
        (("model", "0", 5000, "ddim", None, 1), "greater than maximum value 1000"),
        (("model", "0", 0, "ddim", None, 1), "less than minimum value 1"),
        (("model", "0", 2.5, "ddim", None, 1), "num_inference_steps must be a whole number, got 2.5"),
        (("model", "0", 5, "euler", None, 1), "euler is not in the list of choices"),
        (
            ("model", "0", 5, "ddim", "cats", 1),
            "class_labels and guidance_scale are for class-conditional networks; this one is not",
        ),
        (("org/other", "0", 5, "ddim", None, 1), "org/other is not in the list of choices"),
        (("model", "0", 5, "ddim", None, 21), "greater than maximum value 20"),
        (("../run", "0", 5, "ddim", None, 1), "../run is not in the list of choices"),
    ],
)
def test_limits_hold_for_programs_too(client, values, sentence):
    with pytest.raises(AppError, match=re.escape(sentence)):
        client.predict(*values, api_name="/sample")


def test_a_request_can_be_taken_back(client):
    """The next one is served, and the one that was taken back yields no images."""
    job = client.submit("model", "0-15", 1000, "ddpm", None, 1, api_name="/sample")
    iterator = iter(job)
    next(iterator)
    job.cancel()
    assert len(client.predict("model", "0", 5, "ddim", None, 1, api_name="/sample")[2]) == 1
    assert all(images == [] for _, _, images, _ in job.outputs())


def test_interpolation_of_two_seeds(client):
    picture, text = client.predict("model", 0, 1, 0.5, 20, "ddim", None, 1, api_name="/interpolate")
    assert re.fullmatch(r"11 images between two, mixed at t = 501, in \S+ s", text)
    pixels = np.asarray(Image.open(picture).convert("L"))
    # The first and the last tile are the images of the two seeds, every pixel enlarged to 8 x 8.
    pipe = DDPMPipeline.from_pretrained(MODEL)
    pipe = DDPMPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    ends = pipe(seeds=[0, 1], num_inference_steps=20).images
    first, last = (np.asarray(image).repeat(8, 0).repeat(8, 1) for image in ends)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (64, 64))
    places = [np.argwhere((windows == tile).all((2, 3))) for tile in (first, last)]
    assert all(len(place) for place in places)
    assert places[0][0][1] < places[1][0][1]
    with pytest.raises(AppError, match="Value -1 is less than minimum value 0"):
        client.predict("model", -1, 1, 0.5, 20, "ddim", None, 1, api_name="/interpolate")


def test_bits_per_dim_of_an_upload(client, tmp_path):
    pipe = DDPMPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    digit = pipe(seeds=[0], num_inference_steps=50).images[0]
    digit.save(tmp_path / "digit.png")
    Image.new("RGBA", (40, 30), (200, 30, 30, 128)).save(tmp_path / "rose.png")
    values = {}
    for name in ("digit", "rose"):
        picture, text = client.predict("model", handle_file(tmp_path / f"{name}.png"), None, api_name="/bits_per_dim")
        found = re.match(r"\*\*([\d.]+) ± ([\d.]+) bits/dim\*\*", text)
        values[name] = (float(found[1]), float(found[2]), text, np.asarray(Image.open(picture).convert("L")))
    # The whole bound, all T terms of it, is where the estimate says (the sum itself is of one draw of noise per term).
    x_0 = torch.from_numpy(np.asarray(digit).copy()).float().expand(1000, 1, 8, 8) / 127.5 - 1
    t, noise = torch.arange(1000), torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    x_t = pipe.scheduler.add_noise(x_0, noise, t)
    with torch.no_grad():
        terms = vb_terms_bpd(pipe.scheduler, pipe.unet(x_t, t).sample, x_0, x_t, t)
    full = (terms.sum() + prior_bpd(pipe.scheduler, x_0[:1])).item()
    assert abs(values["digit"][0] - full) < 4 * values["digit"][1] + 0.3
    assert values["digit"][0] + 5 < values["rose"][0], "an even grey square is no digit"
    enlarged = values["digit"][3][2:-2, 2:-2]
    np.testing.assert_array_equal(enlarged, np.asarray(digit).repeat(32, 0).repeat(32, 1))
    grey = (np.array([200, 30, 30]) * 128 + 255 * 127) / 255 @ np.array([0.299, 0.587, 0.114])
    assert np.abs(values["rose"][3][2:-2, 2:-2] - grey).max() <= 1


def damaged_files(folder: Path) -> dict[str, Path]:
    whole = folder / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(whole)
    wide = folder / "wide.png"
    Image.new("1", (6000, 5000)).save(wide)
    contents = {"empty.png": b"", "text.png": b"hello", "cut.png": whole.read_bytes()[:900], "page.html": b"<script>"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in (*contents, "wide.png")}


def test_a_bad_upload_is_one_sentence(client, tmp_path):
    sentences = {
        "empty.png": "the file is empty (0 bytes)",
        "text.png": "not an image of a known format; it begins with b'hello'",
        "cut.png": "truncated",
        "page.html": "not an image of a known format",
        "wide.png": "30000000 pixels) exceeds limit of 25000000 pixels",
    }
    for name, path in damaged_files(tmp_path).items():
        with pytest.raises(AppError, match=re.escape(sentences[name])):
            client.predict("model", handle_file(path), None, api_name="/bits_per_dim")
    with pytest.raises(AppError, match="choose an image file first"):
        client.predict("model", None, None, api_name="/bits_per_dim")
    (tmp_path / "large.png").write_bytes(bytes(11_000_000))
    with pytest.raises(Exception, match=r"413|too large|exceeds"):
        client.predict("model", handle_file(tmp_path / "large.png"), None, api_name="/bits_per_dim")
    assert len(client.predict("model", "0", 5, "ddim", None, 1, api_name="/sample")[2]) == 1  # it is still there


def test_the_page_loads_nothing_from_elsewhere(app):
    page = urlopen(app.url).read().decode()
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"([^\"]+)\"", page)
    assert loaded, "there is no page"
    assert [url for url in loaded if re.match(r"(https?:)?//", url) and not url.startswith(app.url)] == []


def test_the_space_runs_its_own_copy(space, tmp_path):
    """Beside an installed package, the copy in the Space is the one that runs."""
    shutil.copytree(space, tmp_path / "demo")
    (tmp_path / "demo" / "ddpm_hf" / "__init__.py").write_text("raise ValueError('the copy')\n")
    command = [sys.executable, str(tmp_path / "demo" / "app.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: the copy")


def test_the_guard_refuses_and_tells(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import socket\n"
        "for call in (lambda: socket.create_connection(('192.0.2.1', 80), 1),\n"
        "             lambda: socket.getaddrinfo('example.org', 80)):\n"
        "    try:\n        call()\n    except ConnectionRefusedError as error:\n        print('refused', error)\n"
    )
    command = [sys.executable, str(GUARD), str(tmp_path / "left.txt"), str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("refused") == 2
    left = (tmp_path / "left.txt").read_text()
    assert "192.0.2.1" in left
    assert "example.org" in left


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        ("no/model", "there is no folder 'no/model' here, nor is it in the cache"),
        ("empty", "holds no pipeline"),
        (" , ", "name at least one model, such as runs/digits,org/name"),
    ],
)
def test_a_wrong_model_is_told_at_the_start(models, sentence, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        serve(str(tmp_path / "app.py"), models, 16, 1000, 20)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
