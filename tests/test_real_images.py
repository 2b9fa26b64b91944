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
    reference, rows = benchmark.ladder(folder, 40, 0)
    other = rows["other training images"].astype(float)
    assert all(images.shape == (40, 8, 8, 3) and images.dtype == np.uint8 for images in rows.values())
    for levels in (2, 5, 10):
        assert (rows[f"noise of {levels} levels"] - other).std() == pytest.approx(levels, rel=0.1)
    equal = [(rows["10% copies"][i] == reference[i]).all() for i in range(40)]
    assert equal == [True] * 4 + [False] * 36
    assert np.ptp(rows["grey"], axis=3).max() == 0
    assert rows["one class missing"].mean(axis=(1, 2, 3)).max() < 130 < other.mean(axis=(1, 2, 3)).max()
    assert 0 < np.abs(rows["JPEG, quality 75"] - other).mean() < 10
    assert (
        np.abs(np.diff(rows["blur of half a pixel"].astype(float), axis=2)).mean()
        < np.abs(np.diff(other, axis=2)).mean()
    )


def test_the_table_has_independent_numbers_beside_ours(benchmark, folder, tmp_path, capsys):
    flags = [str(folder), "--count", "40", "--features", "pixels", "--output", str(tmp_path / "out")]
    assert benchmark.main(flags) == 0
    found = json.loads((tmp_path / "out" / "numbers.json").read_text())["pixels"]
    theirs, ours = found["test images, independent code"], found["test images"]
    assert set(theirs) == {"fd_pixels", "kd_pixels", "precision_pixels", "recall_pixels"}
    for name, value in theirs.items():
        # 40 images have no full covariance, whose root scipy knows to about a thousandth
        assert ours[name] == pytest.approx(value, rel=5e-3, abs=1e-6), name
    assert found["grey"]["fd_pixels"] > found["other training images"]["fd_pixels"]
    assert found["10% copies"]["authentic_pixels"] < found["other training images"]["authentic_pixels"]
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| 10% copies" in page
    assert (tmp_path / "out" / "ladder.png").exists()
    assert benchmark.main([str(folder), "--count", "150", "--output", str(tmp_path / "out")]) == 2
    assert "--count 150 needs 300 training images" in capsys.readouterr().err
