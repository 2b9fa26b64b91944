"""Pictures show the numbers they are given, with names on their axes, and need no screen."""

import numpy as np
import torch
from PIL import Image

from ddpm_hf.evaluation.plots import distances_figure, neighbours_figure, rate_distortion_figure, save_figure


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


def test_neighbours_are_beside_their_samples_with_their_distances():
    for channels in (1, 3):
        samples = torch.randint(0, 256, (2, channels, 4, 4)).byte()
        neighbours = torch.randint(0, 256, (2, 3, channels, 4, 4)).byte()
        figure = neighbours_figure(samples, neighbours, torch.tensor([[0.0, 1.25, 2.0], [3.0, 4.0, 5.0]]), "t")
        assert len(figure.axes) == 8
        shown = [np.asarray(axis.images[0].get_array()).reshape(4, 4, channels) for axis in figure.axes]
        expected = [samples[0], *neighbours[0], samples[1], *neighbours[1]]
        for picture, image in zip(shown, expected, strict=True):
            assert np.array_equal(picture, image.permute(1, 2, 0))
        assert [axis.get_xlabel() for axis in figure.axes] == ["", "0", "1.25", "2", "", "3", "4", "5"]


def test_distances_are_percent_of_each_group():
    figure = distances_figure(torch.tensor([0.5, 1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0]), "held out", "t")
    (axis,) = figure.axes
    heights = [sum(bar.get_height() for bar in group) for group in axis.containers]
    assert heights == [100, 100]
    assert {text.get_text() for text in axis.get_legend().get_texts()} == {
        "samples (4)",
        "held out (2)",
        "median of held out",
    }
    assert distances_figure(torch.zeros(2), torch.zeros(2), "same", "t").axes  # copies only
