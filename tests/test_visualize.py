"""Grids: every pixel where it belongs."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.visualize import image_grid, save_picture


def test_small_images_are_enlarged_with_a_gap_between():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 8, 8) * 10
    grid = np.asarray(image_grid(images, columns=3, tile=24, gap=2))
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
