"""What visitors of a Space can ask for, and what they are told where they cannot have it."""

import threading

import numpy as np
import pytest
import torch
from conftest import FIXTURES, make_small_unet
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.diffusion.likelihood import stratified_bits_per_dim
from ddpm_hf.hub.space_demo import Demo, Limits, checked_number, checked_seeds, describe_conversion
from ddpm_hf.utils.errors import NotFiniteError

MODEL = str(FIXTURES / "digits_model")
_WRONG = "seeds are whole numbers and ranges, such as 0-7"


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo([MODEL])


@pytest.fixture(scope="module")
def with_classes(tmp_path_factory) -> Demo:
    """Two models with three classes: one was trained with class dropout, the other was not."""
    folder = tmp_path_factory.mktemp("models")
    scheduler = DDPMScheduler(num_train_timesteps=20)
    DDPMPipeline(make_small_unet(num_class_embeds=3), scheduler).save_pretrained(folder / "plain")
    unet = make_small_unet(num_class_embeds=4)
    unet.register_to_config(_null_class=3, _class_names=["cat", "dog", "newt"])
    DDPMPipeline(unet, scheduler).save_pretrained(folder / "guided")
    return Demo(["plain", "guided"], Limits(images=4, steps=10), folder)


def last(steps):
    *_, final = steps
    return final


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), (" 8 , 1-2", [8, 1, 2]), ("9223372036854775807", [2**63 - 1]), (5, [5])],
)
def test_seeds(text, seeds):
    assert checked_seeds(text, 4) == seeds


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0-4", "5 seeds are too many here; at most 4 images at a time"),
        ("0-2,7-8", "5 seeds are too many"),
        ("0-9999999999999999999", "a seed is at most 9223372036854775807"),
        ("0-999999999999999999", "1000000000000000000 seeds are too many"),
        ("1,1", "the seeds '1,1' names a seed twice"),
        ("3-1", "the range '3-1' of the seeds is empty"),
        *(
            (text, "seeds are whole numbers and ranges")
            for text in ("", None, "a", "-1", "1.5", "1-", "1,,2", "\u0663")
        ),
        ("1," * 5000, "seeds are whole numbers and ranges"),
    ],
)
def test_other_seeds_are_refused(text, sentence):
    with pytest.raises(ValueError, match="^" + sentence.replace("[", r"\[")) as error:
        checked_seeds(text, 4)
    assert len(str(error.value)) < 150


@pytest.mark.parametrize("value", [0, 11, 2.5, None, "x", float("nan"), float("inf"), [], "9" * 5000])
def test_other_numbers_are_refused(value):
    with pytest.raises(ValueError, match=r"^steps must be a whole number from 1 to 10, got") as error:
        checked_number(value, "steps", 1, 10)
    assert len(str(error.value)) < 100


@pytest.mark.parametrize("limit", ["images", "steps", "waiting", "pixels", "megabytes"])
def test_a_limit_of_nothing_is_refused(limit):
    with pytest.raises(ValueError, match=f"the limit of {limit} must be at least 1, got 0"):
        Limits(**{limit: 0})


def test_a_model_that_is_not_listed_is_not_looked_up(demo, monkeypatch):
    monkeypatch.setattr(DDPMPipeline, "from_pretrained", lambda *args: pytest.fail("it was looked up"))
    for name in ("org/other", "..", None, ["x"]):
        with pytest.raises(ValueError, match=r"there is no model .* here, only"):
            next(demo.sample(name, "0"))


def test_a_model_that_draws_no_pictures_is_refused(tmp_path):
    unet = make_small_unet(in_channels=2, out_channels=2)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="'two' makes images of 2 channels, which are no pictures"):
        Demo(["two"], folder=tmp_path).load("two")


# ---------------------------------------------------------------- sampling


def test_sampling_can_be_watched(demo):
    seen = list(demo.sample(MODEL, "0,1", 100, "ddpm"))
    assert len(seen) > 15  # a slow machine shows more
    steps = [int(made.text.split()[1]) for made in seen[:-1]]
    assert steps == sorted(set(steps))
    assert steps[0] == 1
    assert all(made.images == [] for made in seen[:-1])
    assert len(seen[-1].images) == 2
    # The last picture of x_t is that of the images themselves, in tiles of 48 pixels with a gap of 2.
    tiles = np.asarray(seen[-1].x_t)[2:50, 2:50], np.asarray(seen[-1].x_t)[2:50, 52:100]
    for tile, image in zip(tiles, seen[-1].images, strict=True):
        np.testing.assert_array_equal(tile, np.asarray(image).repeat(6, 0).repeat(6, 1))


def test_a_sampler_that_keeps_x_0_to_itself_shows_x_t(demo):
    seen = list(demo.sample(MODEL, "0", 5, "unipc"))
    assert {made.pred_original_sample for made in seen} == {None}
    assert len(seen[-1].images) == 1


def test_stopping_ends_it_after_the_step_at_hand(demo):
    stop, calls = threading.Event(), []
    hook = demo.load(MODEL).unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        steps = demo.sample(MODEL, "0", 500, "ddpm", stop=stop)
        next(steps)
        stop.set()
        assert last(steps).text.startswith("stopped at step 2 of 500")
    finally:
        hook.remove()
    assert len(calls) == 2
    assert demo.load(MODEL).scheduler.config == DDPMPipeline.from_pretrained(MODEL).scheduler.config


def test_requests_do_not_share_a_sampler(demo):
    """Two chains of other lengths, step by step in turn, are what each is alone."""
    alone = [last(demo.sample(MODEL, "1", steps, "ddpm")).images[0].tobytes() for steps in (6, 9)]
    short, long = demo.sample(MODEL, "1", 6, "ddpm"), demo.sample(MODEL, "1", 9, "ddpm")
    for _ in range(5):
        next(short), next(long)
    assert [last(short).images[0].tobytes(), last(long).images[0].tobytes()] == alone


# ---------------------------------------------------------------- classes


def test_classes(with_classes):
    assert with_classes.classes("plain") == ["0", "1", "2"]
    assert with_classes.classes("guided") == ["any", "cat", "dog", "newt"]
    assert Demo([MODEL]).classes(MODEL) == []


@pytest.mark.parametrize(
    ("model", "label", "guidance", "options"),
    [
        ("plain", "2", 1, {"class_labels": 2}),
        ("plain", "", 1, {"class_labels": 0}),
        ("plain", "1", 5, {"class_labels": 1}),  # it knows no guidance, and the page shows none
        ("guided", "newt", 1, {"class_labels": 2}),
        ("guided", "1", 3, {"class_labels": 1, "guidance_scale": 3}),
        ("guided", "any", 1, {}),
        ("guided", None, 1, {}),
    ],
)
def test_a_class_is_drawn(with_classes, model, label, guidance, options):
    pipe = DDPMPipeline.from_pretrained(with_classes.folder / model)
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(seeds=[4], num_inference_steps=10, **options).images[0]
    made = last(with_classes.sample(model, "4", 10, "ddpm", label, guidance)).images[0]
    np.testing.assert_array_equal(np.asarray(made), np.asarray(wanted))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (("plain", "0", 10, "ddim", "cat"), "class 'cat' is no class of this network; it has 0..2"),
        (("guided", "0", 10, "ddim", "cow"), "class 'cow' is no class of this network; it has cat, dog, newt"),
        (("guided", "0", 10, "ddim", "cat", 21), "guidance must be a number from 0 to 20, got 21"),
        (("guided", "0", 11), "the number of steps must be a whole number from 1 to 10, got 11"),
        (("guided", "0-4", 10), "5 seeds are too many here; at most 4"),
        (("guided", "0", 10, "dim"), "unknown sampler 'dim' .did you mean 'ddim'"),
    ],
)
def test_what_cannot_be_had_is_told(with_classes, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        next(with_classes.sample(*values))


def test_interpolation_has_its_stages(with_classes):
    stages = list(with_classes.interpolate("guided", 3, 4, 0.5, 10, "ddim", "dog"))
    assert [picture is None for picture, _ in stages] == [True, True, False]
    assert stages[-1][1].startswith("11 images between two, mixed at t = ")
    for wrong in ((-1, 0, 0.5), (0, None, 0.5), (0, 1, 1.5)):
        with pytest.raises(ValueError, match="must be a"):
            next(with_classes.interpolate("guided", *wrong, 10))


def test_bits_per_dim_of_a_class(with_classes, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    pipe = DDPMPipeline.from_pretrained(with_classes.folder / "guided")
    x_0 = torch.from_numpy(pixels / np.float32(127.5) - 1)[None, None]
    for label, index in (("dog", 1), ("any", 3)):
        wanted = stratified_bits_per_dim(
            pipe.unet, pipe.scheduler, x_0, num_evaluations=40, class_labels=torch.tensor([index])
        )
        _, text = with_classes.bits_per_dim("guided", str(tmp_path / "image.png"), label)
        assert text.startswith(f"**{wanted.mean:.2f} ± {wanted.sampling_standard_error:.2f} bits/dim**")
        assert "40 network evaluations" in text  # there are no more than two for each of 20 steps


# ---------------------------------------------------------------- how an image is converted


@pytest.mark.parametrize(
    ("mode", "size", "shape", "words"),
    [
        ("L", (8, 8), (1, 8, 8), ""),
        ("RGB", (16, 16), (1, 8, 8), "made grey, resized to 8 x 8"),
        ("L", (30, 20), (3, 20, 20), "made RGB, the middle 20 x 20 of it"),
        ("LA", (8, 8), (1, 8, 8), "white under transparent pixels, made grey"),
    ],
)
def test_how_an_image_is_converted(mode, size, shape, words, tmp_path):
    Image.new(mode, size).save(tmp_path / "image.png")
    first = f"PNG of {size[0]} x {size[1]} pixels (mode {mode})"
    assert describe_conversion(tmp_path / "image.png", shape, 10_000) == ", ".join(filter(None, (first, words)))


def test_a_turned_photograph_and_an_animation_are_told(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "photo.jpg", exif=turned)
    words = describe_conversion(tmp_path / "photo.jpg", (3, 8, 4), 10_000)
    assert words == "JPEG of 40 x 20 pixels (mode RGB), turned upright, resized to 4 x 8"
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 255)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert "its first frame" in describe_conversion(tmp_path / "film.gif", (1, 8, 8), 10_000)


def test_too_many_pixels_are_not_decoded(tmp_path, monkeypatch):
    Image.new("1", (200, 200)).save(tmp_path / "wide.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"has 200 x 200 pixels; at most 0\.01 million"):
        describe_conversion(tmp_path / "wide.png", (1, 8, 8), 10_000)


def test_what_is_not_finite_is_shown_to_nobody(tmp_path):
    pipe = DDPMPipeline(make_small_unet(), DDPMScheduler(num_train_timesteps=20))
    pipe.save_pretrained(tmp_path / "good")
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    pipe.save_pretrained(tmp_path / "bad")
    demo = Demo(["good", "bad"], folder=tmp_path)
    with pytest.raises(NotFiniteError, match=r"conv_in\.weight hold NaN"):
        next(demo.sample("bad", "0", 5))
    with torch.no_grad():  # as if the network failed on the way
        demo.load("good").unet.conv_out.bias[0] = float("inf")
    with pytest.raises(NotFiniteError):
        next(demo.sample("good", "0", 5))
    with pytest.raises(NotFiniteError):
        demo.bits_per_dim("good", str(FIXTURES.parent.parent / "docs" / "digits.png"))
