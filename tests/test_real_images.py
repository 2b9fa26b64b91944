"""`benchmarks/real_images.py`: damage of a known size, and the table over a few images made up here."""

import json
import sys

import numpy as np
import pytest


@pytest.fixture
def benchmark(repository_root, monkeypatch):
    monkeypatch.syspath_prepend(str(repository_root / "benchmarks"))
    import real_images

    yield real_images
    sys.modules.pop("real_images")


@pytest.fixture
def folder(tmp_path):
    """Smooth images of 8 x 8 pixels in two classes, light and dark."""
    draw = np.random.RandomState(0)
    for split, count in (("train", 200), ("test", 40)):
        labels = np.arange(count) % 2
        ramps = np.arange(8)[None, :, None, None] * draw.uniform(2, 10, (count, 1, 8, 3))
        images = ramps + 60 + 60 * labels[:, None, None, None] + draw.uniform(0, 20, (count, 1, 1, 3))
        np.savez(tmp_path / f"{split}.npz", images=images.astype(np.uint8))
        if split == "train":
            np.savez(tmp_path / "labels.npz", train=labels)
    return tmp_path


def test_the_ladder_is_what_its_rows_say(benchmark, folder):
    images, labels = np.load(folder / "train.npz")["images"], np.load(folder / "labels.npz")["train"]
    choice = benchmark.Choice(labels, 40, 40, 0)
    assert not set(choice.reference) & set(choice.other)
    assert all(len(set(places)) == 40 for _, places in choice.rows.values())
    assert len(set(choice.rows["10% copies"][1]) & set(choice.reference)) == 4
    _, places = choice.rows["one class missing"]
    assert set(labels[places]) == {0}
    other = images[choice.other].astype(float)
    rows = benchmark.damaged(images[choice.other])
    assert all(found.shape == (40, 8, 8, 3) and found.dtype == np.uint8 for found in rows.values())
    for levels in (2, 5, 10):
        assert (rows[f"noise of {levels} levels"] - other).std() == pytest.approx(levels, rel=0.1)
    assert np.ptp(rows["grey"], axis=3).max() == 0
    assert 0 < np.abs(rows["JPEG, quality 75"] - other).mean() < 10
    assert (
        np.abs(np.diff(rows["blur of half a pixel"].astype(float), axis=2)).mean()
        < np.abs(np.diff(other, axis=2)).mean()
    )


def test_the_table_has_independent_numbers_beside_ours(benchmark, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))
    flags = [str(folder), "--count", "40", "--features", "pixels", "--seeds", "2", "--output", str(tmp_path / "out")]
    assert benchmark.main(flags) == 0
    found = json.loads((tmp_path / "out" / "numbers.json").read_text())["pixels"]
    theirs, ours = found["test images, independent code"], found["test images"]
    assert set(theirs) == {"fd_pixels", "kd_pixels", "precision_pixels", "recall_pixels"}
    for name, value in theirs.items():
        # of 40 images with a singular covariance numpy's eigenvalues lose half of their digits
        assert ours[name][0] == pytest.approx(value[0], rel=1e-3, abs=1e-6), name
    assert {name: len(row["fd_pixels"]) for name, row in found.items()} == {
        **dict.fromkeys(("test images", "other training images", "1% copies", "10% copies", "one class missing"), 2),
        **{name: 1 for name in found if "noise" in name or "JPEG" in name or "code" in name},
        "blur of half a pixel": 1,
        "grey": 1,
    }
    others, copies = found["other training images"], found["10% copies"]
    assert found["grey"]["fd_pixels"][0] > others["fd_pixels"][0]
    assert np.mean(copies["authentic_pixels"]) < np.mean(others["authentic_pixels"])
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| 10% copies" in page
    mean, spread = np.mean(copies["authentic_pixels"]), np.std(copies["authentic_pixels"], ddof=1)
    assert f"{mean:.4g} ± {spread:.2g}" in page
    assert (tmp_path / "out" / "ladder.png").exists()
    assert (tmp_path / "out" / "seen_pixels.png").exists()
    assert benchmark.main([str(folder), "--count", "150", "--output", str(tmp_path / "out")]) == 2
    assert "--count 150 needs 300 training images" in capsys.readouterr().err
    assert benchmark.main([str(folder), "--count", "40", "--metrics", "fdi"]) == 2
    assert "--metrics knows fid, kid, " in capsys.readouterr().err
    for wrong in (["--count", "19"], ["--seeds", "0"], ["--batch_size", "0"]):
        assert benchmark.main([str(folder), "--count", "40", *wrong]) == 2
        assert "--count must be at least 20, --seeds and --batch_size at least 1" in capsys.readouterr().err
    assert benchmark.main([*flags, "--output", "/proc/x"]) == 2
    assert "cannot write to --output /proc/x" in capsys.readouterr().err
    np.savez(folder / "labels.npz", train=np.zeros(3))
    assert benchmark.main([str(folder), "--count", "40"]) == 2
    assert "holds no labels.npz" in capsys.readouterr().err
    (folder / "labels.npz").unlink()
    assert benchmark.main([str(folder), "--count", "40"]) == 2
    assert "holds no labels.npz" in capsys.readouterr().err
