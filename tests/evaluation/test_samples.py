"""Samples beside real images: the same whatever the batches, from the cache where there is one, labels by rule."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import DIGITS_MODEL, make_small_unet
from PIL import Image
from scipy.spatial.distance import cdist

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.data.datasets import ImageDataset, load_digits
from ddpm_hf.evaluation.features import Pixels
from ddpm_hf.evaluation.neighbours import add_neighbours, find_neighbours, save_neighbours
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.report import EvaluationReport
from ddpm_hf.evaluation.run import check_evaluation
from ddpm_hf.evaluation.samples import Samples, draw_samples, images_digest, real_images
from ddpm_hf.sampling.generation import with_sampler

PIXELS = Pixels((1, 8, 8))


def cached(folder, **options) -> EvaluationOptions:
    return EvaluationOptions(cache_dir=folder, **options)


class Counting:
    """The pixels, as if they took long, and how many images they were asked of."""

    name, fingerprint, takes_floats = "slow", "slow", True

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return PIXELS(images)


@pytest.fixture(scope="module")
def digits_pipeline():
    return with_sampler(DDPMPipeline.from_pretrained(DIGITS_MODEL), "ddim")


def test_samples_are_what_their_seeds_give(digits_pipeline, tmp_path):
    options = EvaluationOptions(num_samples=7, work_dir=tmp_path, seed=5, batch_size=3, num_inference_steps=4)
    samples = draw_samples(digits_pipeline, [PIXELS], options)
    (direct,) = digits_pipeline(seeds=range(5, 12), num_inference_steps=4, output_type="pt", return_dict=False)
    assert torch.allclose(samples.features["pixels", "float"], direct.flatten(1), atol=1e-5)
    # Whole pixel values; rounding may fall to the other side where batches differ in the last bit.
    levels = samples.features["pixels", "uint8"] * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert (levels / 255 - direct.flatten(1)).abs().max() < 0.51 / 255
    assert torch.equal(samples.first.flatten(1), levels.round().to(torch.uint8))
    assert samples.settings["seeds"] == "5-11"
    assert samples.settings["sampler"] == "DDIMScheduler"


def test_more_samples_draw_only_what_is_new_and_other_settings_draw_again(digits_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_hf.evaluation.samples.KEPT_SAMPLES", 4)
    drawn = []
    original = type(digits_pipeline).__call__

    def spy(self, *args, **kwargs):
        drawn.extend(kwargs["seeds"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(digits_pipeline), "__call__", spy)
    options = EvaluationOptions(work_dir=tmp_path, batch_size=3, num_inference_steps=5, num_samples=6)
    draw_samples(digits_pipeline, [PIXELS], options)
    assert drawn == [0, 1, 2, 3, 4, 5]
    samples = draw_samples(digits_pipeline, [PIXELS], dataclasses.replace(options, num_samples=9))
    assert drawn == [*range(6), 6, 7, 8]
    assert samples.features["pixels", "uint8"].shape == (9, 64)
    assert len(samples.first) == 4
    for other in ({"seed": 1}, {"num_inference_steps": 10}):
        drawn.clear()
        draw_samples(digits_pipeline, [PIXELS], dataclasses.replace(options, num_samples=2, **other))
        assert len(drawn) == 2


def test_real_images_are_seen_once(tmp_path):
    data, extractor = load_digits("validation"), Counting()
    first = real_images("validation", data, [extractor], cached(tmp_path, batch_size=100))
    assert extractor.seen == 296
    assert torch.equal(first.features["slow"], data.images.flatten(1) / 255)
    again = real_images("validation", data, [extractor], cached(tmp_path, batch_size=7))
    assert extractor.seen == 296
    assert torch.equal(again.features["slow"], first.features["slow"])
    changed = data.images.clone()
    changed[5, 0, 3, 3] += 1
    other = ImageDataset(changed, None, data.name)
    assert images_digest(other) != images_digest(data)
    real_images("validation", other, [extractor], cached(tmp_path))
    assert extractor.seen == 2 * 296  # one pixel value of one image is enough


def class_pipeline(**config):
    unet = make_small_unet(num_class_embeds=3, **config)
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10, variance_type="fixed_large"))


def labels_seen(pipe, tmp_path, train, count):
    seen = []
    original = pipe.unet.forward

    def spy(x, t, class_labels=None, **kwargs):
        seen.append(class_labels.tolist())
        return original(x, t, class_labels=class_labels, **kwargs)

    pipe.unet.forward = spy
    options = EvaluationOptions(num_samples=count, work_dir=tmp_path, batch_size=count, num_inference_steps=1)
    samples = draw_samples(pipe, [PIXELS], options, train)
    return seen[0], samples.settings["class_labels"]


def test_labels_of_samples(tmp_path):
    images = load_digits("validation").images[:200]
    labels = torch.tensor([0] * 150 + [1] * 50)
    train = ImageDataset(images, labels, "x", ["dogs", "owls"])
    named = class_pipeline(_class_names=["cats", "dogs", "owls"])
    seen, rule = labels_seen(named, tmp_path, train, 200)
    assert "frequencies" in rule
    counts = np.bincount(seen, minlength=3)
    assert counts[0] == 0  # by name: dogs are the network's class 1
    assert abs(counts[1] - 150) < 4 * np.sqrt(200 * 0.75 * 0.25)
    nameless = ImageDataset(images, None, "x")
    assert labels_seen(class_pipeline(), tmp_path, nameless, 5) == ([0, 1, 2, 0, 1], "in turn, 0..2")
    seen, rule = labels_seen(class_pipeline(_null_class=2), tmp_path, nameless, 4)
    assert seen == [2, 2, 2, 2]
    assert "no class" in rule
    with pytest.raises(ValueError, match="no class 'zebras'"):
        labels_seen(named, tmp_path, ImageDataset(images, labels, "x", ["dogs", "zebras"]), 2)


def samples_of(images):
    features = {("pixels", "uint8"): images.flatten(1) / 255}
    return Samples(len(images), images, features, {}, {})


def test_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_hf.evaluation.neighbours._CHUNK", 100)  # the training images in several parts
    train, held_out = load_digits("train"), load_digits("validation")
    real = [real_images(s, d, [PIXELS], cached(tmp_path)) for s, d in (("train", train), ("validation", held_out))]
    draw = torch.Generator().manual_seed(0)
    images = torch.cat([train.images[[700, 3]], torch.randint(0, 256, (8, 1, 8, 8), generator=draw).byte()])
    (found,) = find_neighbours(samples_of(images), *real, ["pixels"], k=3)
    distances = cdist(images.flatten(1).numpy() / 255, train.images.flatten(1).numpy() / 255)
    assert np.allclose(found.distances, np.sort(distances, axis=1)[:, :3], atol=1e-12)
    assert found.indices[:2, 0].tolist() == [700, 3]
    away = cdist(held_out.images.flatten(1).numpy() / 255, train.images.flatten(1).numpy() / 255).min(1)
    assert np.allclose(found.held_out, away)

    report = EvaluationReport("digits", "train", 1)
    add_neighbours(report, [found], real[0], "validation")
    assert report.values["memorisation_pixels"]["copies"] == 2
    assert any("2 of 10 samples equal a training image" in warning for warning in report.warnings)

    # Each row of the picture ends with the third neighbour, in a tile of 64 pixels and a border of 2.
    assert save_neighbours(samples_of(images), real[0], [found], tmp_path) == ["neighbours_pixels.png"]
    picture = np.asarray(Image.open(tmp_path / "neighbours_pixels.png"))
    for row, index in enumerate(found.indices[:8, 2].tolist()):
        bottom, right = picture.shape[0] - 2 - (7 - row) * 66, picture.shape[1] - 2
        assert np.array_equal(picture[bottom - 64 : bottom, right - 64 : right][::8, ::8], train.images[index, 0])


def test_a_model_that_repeats_its_training_images_is_found_out(tmp_path):
    train, held_out = load_digits("train"), load_digits("validation")
    real = [real_images(s, d, [PIXELS], cached(tmp_path)) for s, d in (("train", train), ("validation", held_out))]
    noise = torch.randint(-3, 4, (200, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    repeats = (train.images[:200] + noise).clamp(0, 255).byte()
    fresh = held_out.images[:200]
    verdicts = {}
    for name, images in (("repeats", repeats), ("fresh", fresh)):
        report = EvaluationReport("digits", "train", 1)
        add_neighbours(report, find_neighbours(samples_of(images), *real, []), real[0], "validation")
        verdicts[name] = report.values["memorisation_pixels"]["value"], report.warnings
    assert verdicts["repeats"][0] > 0.99
    assert "may repeat training images" in verdicts["repeats"][1][0]
    assert abs(verdicts["fresh"][0] - 0.5) < 0.1
    assert verdicts["fresh"][1] == []


def test_without_held_out_images_nothing_is_judged(tmp_path):
    real = real_images("train", load_digits("train"), [PIXELS], cached(tmp_path))
    found = find_neighbours(samples_of(load_digits("validation").images[:5]), real, None, [])
    report = EvaluationReport("digits", "train", 1)
    add_neighbours(report, found, real, None)
    assert list(report.values) == ["nearest_distance_pixels"]
    assert "no held-out images" in report.warnings[0]


def test_what_cannot_be_compared(digits_pipeline, tmp_path):
    some = {"train": load_digits("train")}
    with pytest.raises(ValueError, match="nn needs at least 1 samples, got num_samples=0"):
        check_evaluation(digits_pipeline, some, ["nn"], EvaluationOptions(num_samples=0, features="pixels"))
    with pytest.raises(ValueError, match="num_inference_steps"):
        draw_samples(digits_pipeline, [PIXELS], EvaluationOptions(num_samples=1, num_inference_steps=2000))
    one = ImageDataset(torch.zeros(1, 1, 8, 8).byte(), None, "none")
    with pytest.raises(ValueError, match=r"fid needs at least 2 real images, and 'none' \(test\) has 1"):
        check_evaluation(digits_pipeline, {"test": one}, ["fid"], EvaluationOptions(features=["pixels"]))
