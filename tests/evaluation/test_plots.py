"""Pictures show the numbers they are given, with names on their axes, and need no screen."""

import numpy as np
import torch
from PIL import Image

from ddpm_hf.evaluation.plots import curve_figure, rate_distortion_figure, save_figure


def test_rate_distortion_shows_the_three_panels_of_figure_5(tmp_path):
    rate, rmse = torch.tensor([1.5, 1.0, 0.25, 0.0]), torch.tensor([1.0, 10.0, 30.0, 60.0])
    figure = rate_distortion_figure(rate, rmse, "a title")
    assert figure.get_suptitle() == "a title"
    curves = [axis.lines[0].get_xydata() for axis in figure.axes]
    steps = [4, 3, 2, 1]  # x_0 costs T steps, x_(T-1) one
    for curve, x, y in zip(curves, (steps, steps, rate), (rmse, rate, rmse), strict=True):
        assert np.array_equal(curve, np.stack([x, y], axis=1))
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in figure.axes)
    save_figure(figure, tmp_path / "new" / "x.png")
    assert Image.open(tmp_path / "new" / "x.png").size == (1440, 432)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"]


def test_a_curve_shows_each_number_over_the_images_where_it_was_measured():
    first = {"update": 1, "images": 10, "seconds": 0.5, "bits_per_dim": 4.0, "sw": None}
    second = {"update": 3, "images": 30, "seconds": 1.5, "bits_per_dim": 3.5, "sw": 7.0}
    axes = curve_figure([first, second]).axes
    assert [axis.get_title() for axis in axes] == ["bits_per_dim", "sw"]
    assert [axis.lines[0].get_xydata().tolist() for axis in axes] == [[[10, 4.0], [30, 3.5]], [[30, 7.0]]]
    many = curve_figure([{"update": 1, "images": 10, "seconds": 1.0, **{f"n{i}": 1.0 for i in range(5)}}])
    assert [axis.axison for axis in many.axes] == [True] * 5 + [False] * 3
