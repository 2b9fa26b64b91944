"""Grids, their titles, animations: every pixel where it belongs, every file whole."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.utils.visualize import image_grid, labelled_grid, save_animation, save_picture


def test_small_images_are_enlarged_with_a_gap_between():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 8, 8) * 10
    grid = np.asarray(image_grid(images, columns=3, tile=24))
    assert grid.shape == (2 * 26 + 2, 3 * 26 + 2)
    assert (grid[2:26, 2:26] == 0).all()
    assert (grid[2:26, 28:52] == 10).all()
    assert (grid[28:52, 28:52] == 40).all()
    assert (grid[:2] == 255).all()
    assert (grid[2:26, 26:28] == 255).all()
    assert (grid[28:52, 54:78] == 255).all()  # the empty place


def test_pixels_are_repeated_not_blurred():
    checkerboard = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 255).byte().expand(1, 3, 8, 8)
    grid = np.asarray(image_grid(checkerboard))
    assert grid.shape == (68, 68, 3)
    assert set(np.unique(grid)) == {0, 255}


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 2, 8, 8)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match="grid"):
        image_grid(torch.zeros(shape, dtype=torch.uint8))


def test_a_picture_is_written_whole_into_a_new_folder(tmp_path):
    save_picture(Image.new("L", (4, 4), 7), tmp_path / "new" / "x.png")
    assert np.asarray(Image.open(tmp_path / "new" / "x.png")).tolist() == [[7] * 4] * 4
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.png"]


# ---------------------------------------------------------------------- labelled grids


def test_tiles_stay_whole_beside_their_titles():
    images = torch.tensor([[10, 20, 30], [40, 50, 60]], dtype=torch.uint8).view(2, 3, 1, 1, 1).expand(2, 3, 1, 8, 8)
    grid = np.asarray(labelled_grid(images, ["upper", "lower"], ["a", "b", "c"], "Six grey tiles", tile=64))
    plain = np.asarray(image_grid(images.flatten(0, 1), columns=3, tile=64))
    top, left = grid.shape[0] - plain.shape[0], grid.shape[1] - plain.shape[1]
    assert np.array_equal(grid[top:, left:], plain)

    def ink(part: np.ndarray) -> tuple[float, float]:
        """The centre of what is dark, (y, x)."""
        assert part.min() < 100
        return tuple(float(axis.mean()) for axis in np.nonzero(part < 128))

    # Row titles stand at the height of their row, column titles above the middle of their column.
    for r in range(2):
        y, x = ink(grid[top + r * 66 : top + (r + 1) * 66, :left])
        assert abs(y - 33) < 8
        assert x < left
    for c in range(3):
        start = left + c * 66
        y, x = ink(grid[top - 20 : top, start : start + 66])
        assert abs(x - 33) < 4
    assert (grid[:top, :4] > 200).all()


def test_columns_grow_to_the_width_of_their_titles():
    images = torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8)
    narrow = labelled_grid(images, columns=["a", "b"])
    wide = labelled_grid(images, columns=["a", "a title of many, many words"])
    assert wide.mode == "RGB"
    assert narrow.width == 2 * 66 + 2
    assert (wide.width - 2) / 2 - 2 >= 150
    assert np.asarray(wide)[:16, [0, -1]].min() == 255  # and nothing is cut off at the sides


def test_a_long_title_takes_more_lines():
    images = torch.zeros(1, 2, 1, 8, 8, dtype=torch.uint8)
    one, three = (
        labelled_grid(images, title="one line"),
        labelled_grid(images, title="a title that is too long for it"),
    )
    assert one.width == three.width == 2 * 66 + 2
    assert three.height > one.height
    word = labelled_grid(images, title="an-endless-word-that-cannot-be-broken")
    assert word.width > one.width
    assert (np.asarray(word)[:, -2:] == 255).all()


def test_titles_grow_with_the_images():
    small, large = (torch.full((1, 1, 1, size, size), 128, dtype=torch.uint8) for size in (64, 256))
    assert labelled_grid(large, title="x").height - 260 >= 1.5 * (labelled_grid(small, title="x").height - 68)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 4, 8, 8), "1 or 3 channels"),
        ((0, 2, 1, 8, 8), "at least one image"),
    ],
)
def test_bad_labelled_grids(shape, message):
    with pytest.raises(ValueError, match=message):
        labelled_grid(torch.zeros(shape, dtype=torch.uint8))


# ---------------------------------------------------------------------- animations and files

LEVELS = (0, 100, 200)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.apng", "x.webp", "X.GIF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_animations_come_back_frame_by_frame(tmp_path, name, mode):
    frames = [
        Image.new(mode, (6 + i % 2, 5), level if mode == "L" else (level,) * 3) for i, level in enumerate(LEVELS)
    ]
    save_animation(frames, tmp_path / "new" / name, duration=70, hold=500)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    with Image.open(tmp_path / "new" / name) as animation:
        assert animation.n_frames == len(LEVELS)
        assert animation.info["loop"] == 0
        durations = []
        for index, level in enumerate(LEVELS):
            animation.seek(index)
            pixels = np.asarray(animation.convert("RGB"))
            assert pixels.shape == (5, 7, 3)
            assert (pixels[:, :6] == level).all()
            assert index % 2 or (pixels[:, 6] == 255).all()  # smaller frames have a white border
            durations.append(animation.info["duration"])
        assert durations == [70, 70, 500]


def test_bad_animations(tmp_path):
    with pytest.raises(ValueError, match=r"FILE\.gif.*x\.mp4"):
        save_animation([Image.new("L", (2, 2))], tmp_path / "x.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_picture(Image.new("L", (4, 4), 7), tmp_path / "x.png")

    def disk_full(self, file, format=None, **options):
        file.write_bytes(b"half a pict")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_picture(Image.new("L", (4, 4), 9), tmp_path / "x.png")
    with pytest.raises(OSError, match="No space"):
        save_animation([Image.new("L", (4, 4), 9)] * 2, tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert np.asarray(Image.open(tmp_path / "x.png")).tolist() == [[7] * 4] * 4
