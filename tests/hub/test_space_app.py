"""What visitors of a Space can ask for, and what they are told where they cannot have it."""

import importlib
import importlib.machinery
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS_MODEL, FIXTURES, make_small_unet
from diffusers import DDIMScheduler
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.diffusion.likelihood import stratified_bits_per_dim
from ddpm_hf.hub import space_app
from ddpm_hf.hub.space_app import Demo, make_page
from ddpm_hf.sampling.generation import parse_seeds, with_sampler
from ddpm_hf.utils.errors import NotFiniteError, UserError

MODEL = str(DIGITS_MODEL)


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo(MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models with three classes: one was trained with class dropout, the other was not."""
    folder = tmp_path_factory.mktemp("models")
    scheduler = DDPMScheduler(num_train_timesteps=20)
    DDPMPipeline(make_small_unet(num_class_embeds=3), scheduler).save_pretrained(folder / "plain")
    unet = make_small_unet(num_class_embeds=4)
    unet.register_to_config(_null_class=3, _class_names=["cat", "dog", "newt"])
    DDPMPipeline(unet, scheduler).save_pretrained(folder / "guided")
    return folder


@pytest.fixture(scope="module")
def with_classes(folder) -> Demo:
    return Demo("plain,guided", folder, max_images=4)


def last(steps):
    *_, final = steps
    return final


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), (" 8 , 1-2", [8, 1, 2]), ("9223372036854775807", [2**63 - 1])],
)
def test_seeds(text, seeds):
    assert parse_seeds(text, "Seeds", 4) == seeds


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        *((text, "at most 4 images at a time") for text in ("0-4", "0-2,7-8", "0-99999999999999999999", "1," * 5000)),
        ("9223372036854775808", r"below 2\^63.*got '9223372036854775808'"),
        ("1,1", "names a seed twice"),
        ("3-1", "rising ranges.*'3-1'"),
        *((text, "^Seeds takes whole numbers and rising ranges") for text in ("", "a", "-1", "1.5", "1-", "1,,2")),
    ],
)
def test_other_seeds_are_refused(text, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        parse_seeds(text, "Seeds", 4)
    assert len(str(error.value)) < 150


def test_a_model_without_images_to_look_at_is_refused(tmp_path):
    unet = make_small_unet(in_channels=2, out_channels=2)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="1 or 3 channels"):
        next(Demo("two", tmp_path).sample("two", "0", 5, "ddpm", None, 1))


# ---------------------------------------------------------------- sampling


def test_sampling_can_be_watched(demo):
    seen = list(demo.sample(MODEL, "0,1", 100, "ddpm", None, 1))
    assert len(seen) > 15  # a slow machine shows more
    steps = [int(text.split()[1]) for *_, text in seen[:-1]]
    assert steps == sorted(set(steps))
    assert steps[0] == 1
    assert all(images == [] for _, _, images, _ in seen[:-1])
    x_t, _, images, _ = seen[-1]
    assert len(images) == 2
    # The last picture of x_t is that of the images themselves, in tiles of 48 pixels with a gap of 2.
    tiles = np.asarray(x_t)[2:50, 2:50], np.asarray(x_t)[2:50, 52:100]
    for tile, image in zip(tiles, images, strict=True):
        np.testing.assert_array_equal(tile, np.asarray(image).repeat(6, 0).repeat(6, 1))


def test_a_sampler_that_does_not_return_x_0_shows_x_t(demo):
    seen = list(demo.sample(MODEL, "0", 5, "unipc", None, 1))
    assert {x_0 for _, x_0, _, _ in seen} == {None}
    assert len(seen[-1][2]) == 1


def test_requests_do_not_share_a_sampler(demo):
    """Two interleaved chains of different lengths are what each is alone."""
    alone = [last(demo.sample(MODEL, "1", steps, "ddpm", None, 1))[2][0].tobytes() for steps in (6, 9)]
    short, long = (
        demo.sample(MODEL, "1", 6, "ddpm", None, 1),
        demo.sample(MODEL, "1", 9, "ddpm", None, 1),
    )
    for _ in range(5):
        next(short), next(long)
    assert [last(short)[2][0].tobytes(), last(long)[2][0].tobytes()] == alone


def test_heun_draws_all_of_its_chain(demo):
    """K steps are 2K - 1 evaluations; what is shown is what the pipeline draws."""
    pipe = with_sampler(DDPMPipeline.from_pretrained(MODEL), "heun")
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(seeds=[3], num_inference_steps=6).images[0]
    seen = list(demo.sample(MODEL, "3", 6, "heun", None, 1))
    assert re.fullmatch(r"1 drawn in \S+ s: 6 steps of heun, 11 network evaluations each", seen[-1][3])
    np.testing.assert_array_equal(np.asarray(seen[-1][2][0]), np.asarray(wanted))


# ---------------------------------------------------------------- a distilled model


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("students") / "student"
    process = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
    DDPMPipeline(make_small_unet(_distilled_steps=4), DDIMScheduler(**process)).save_pretrained(folder)
    return str(folder)


def test_a_distilled_model_has_its_own_steps_and_sampler(student):
    page = make_page(Demo(student))
    fields = {getattr(block, "label", None): block for block in page.blocks.values()}
    assert (fields["Steps"].value, fields["Steps"].interactive) == (4, False)
    hidden = ("Sampler", "Guidance (1: as learned)", "Bits/dim")
    assert not any(fields[name].visible for name in hidden)
    pipe = DDPMPipeline.from_pretrained(student)
    pipe.set_progress_bar_config(disable=True)
    seen = list(Demo(student).sample(student, "5", 4, "unipc", None, 1))
    np.testing.assert_array_equal(np.asarray(seen[-1][2][0]), np.asarray(pipe(seeds=[5]).images[0]))
    assert re.fullmatch(r"1 drawn in \S+ s: 4 steps, 4 network evaluations each", seen[-1][3])


def test_what_a_distilled_model_cannot_do_is_told(student):
    demo = Demo(f"{student},{MODEL}")
    assert "distilled for num_inference_steps=4, and can do no other" in demo.expected(
        student, "0", 20, "ddim", None, 1
    )
    for values, sentence in (
        (("0", 20, "ddim", None, 1), "distilled for num_inference_steps=4, and can do no other number, got 20"),
        (("0", 4, "ddim", None, 2), "a distilled model takes no eta, guidance_scale"),
    ):
        with pytest.raises(UserError, match=sentence):
            next(demo.sample(student, *values))
    with pytest.raises(UserError, match="a distilled model has no likelihood"):
        demo.bits_per_dim(student, str(FIXTURES.parent.parent / "docs" / "digits.png"))
    assert demo.interpolate(student, 0, 1, 0.5, 4, "ddim", None, 1)[1].startswith("11 images between two")
    fields = {getattr(block, "label", None): block for block in make_page(demo).blocks.values()}
    assert (fields["Steps"].value, fields["Steps"].interactive) == (20, True)  # one of the two has a choice
    assert fields["Sampler"].value == "dpmsolver++"


# ---------------------------------------------------------------- time


def test_the_expected_time_is_of_evaluations_and_images(demo, with_classes):
    demo.measured[MODEL] = 0.01
    assert demo.expected(MODEL, "0-7", 20, "ddim", None, 1) == (
        "Expected: 1.6 s (measured: 0.01 s per image and evaluation)."
    )
    assert demo.expected(MODEL, "0-7", 20, "heun", None, 1).startswith("Expected: 3.1 s")  # 39 evaluations
    assert with_classes.measured.keys() == {"plain", "guided"}
    with_classes.measured["guided"] = 0.5
    assert with_classes.expected("guided", "3", 10, "ddim", "cat", 3).startswith("Expected: 10.0 s")  # 20 evaluations
    for values in (("0-99", 20, "ddim", None, 1), ("x", 20, "ddim", None, 1), ("0", 0, "ddim", None, 1)):
        assert re.search("at most 16 images|Seeds takes whole numbers|between 1 and", demo.expected(MODEL, *values))


def test_the_time_of_the_last_sampling_counts(demo):
    demo.measured[MODEL] = 100.0
    last(demo.sample(MODEL, "0-3", 5, "ddim", None, 1))
    assert 0 < demo.measured[MODEL] < 1


def test_on_zero_gpu_a_gpu_is_asked_for_as_long_as_it_is_needed(student, folder, monkeypatch):
    """With a module in the place of ZeroGPU's, which runs the functions as they are."""
    lent, module = [], types.ModuleType("spaces")
    module.__spec__ = importlib.machinery.ModuleSpec("spaces", None)

    def lend(duration):
        def decorate(function):
            lent.append((function.__name__, duration))
            return function

        return decorate

    module.GPU = lend
    monkeypatch.setitem(sys.modules, "spaces", module)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setattr("torch.compile", lambda *_, **__: pytest.fail("there is no compiler there"))
    try:
        app = importlib.reload(space_app)
        demo = app.Demo(f"{MODEL},{student}")
        assert demo.measured == {}  # no GPU is there before a visitor asks for one
        app.make_page(demo)
        assert [name for name, _ in lent] == ["sample", "interpolate", "bits_per_dim"]
        sampling, interpolating = (dict(lent)[name] for name in ("sample", "interpolate"))
        few, many, heun = (
            sampling(MODEL, "0", *chain, None, 1) for chain in ((4, "ddim"), (200, "ddim"), (200, "heun"))
        )
        assert 10 < few < many < heun
        assert all(isinstance(seconds, int) for seconds in (few, many, heun))
        assert sampling(student, "0", 4, "ddim", None, 1) == few
        assert interpolating(MODEL, 0, 1, 0.5, 200, "ddim", None, 1) == many
        assert demo.expected(MODEL, "0", 20, "ddim", None, 1) == "Expected: 1.0 s (a guess)."
        with pytest.raises(app.UserError, match="num_inference_steps"):
            sampling(MODEL, "0", 0, "ddim", None, 1)
        *_, (_, _, images, _) = demo.sample(MODEL, "0", 4, "ddim", None, 1)
        assert len(images) == 1
    finally:
        monkeypatch.undo()
        importlib.reload(space_app)


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("models", "choices", "value", "guided"),
    [
        ("plain", ["0", "1", "2"], "0", False),
        ("guided", ["cat", "dog", "newt"], None, True),
        ("plain,guided", ["0", "1", "2", "cat", "dog", "newt"], None, True),
        (MODEL, [], None, False),
    ],
)
def test_classes_are_offered(folder, models, choices, value, guided):
    page = make_page(Demo(models, folder))
    fields = {getattr(block, "label", None): block for block in page.blocks.values()}
    label, guidance = fields["Class (empty: any)"], fields["Guidance (1: as learned)"]
    assert ([name for name, _ in label.choices], label.value, label.visible) == (choices, value, bool(choices))
    assert guidance.visible is guided


@pytest.mark.parametrize(
    ("model", "label", "guidance", "options"),
    [
        ("plain", "2", 1, {"class_labels": 2}),
        ("guided", "newt", 1, {"class_labels": 2}),
        ("guided", "1", 3, {"class_labels": 1, "guidance_scale": 3}),
        ("guided", "", 1, {}),
        ("guided", None, 1, {}),
    ],
)
def test_a_class_is_drawn(with_classes, folder, model, label, guidance, options):
    pipe = DDPMPipeline.from_pretrained(folder / model)
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(seeds=[4], num_inference_steps=10, **options).images[0]
    (made,) = last(with_classes.sample(model, "4", 10, "ddpm", label, guidance))[2]
    np.testing.assert_array_equal(np.asarray(made), np.asarray(wanted))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (("plain", "0", 10, "ddim", "cat", 1), "class 'cat' is no class of this network; it has 0..2"),
        (("plain", "0", 10, "ddim", "", 1), "give class_labels; its classes are 0..2"),
        (("plain", "0", 10, "ddim", "1", 5), "guidance_scale=5 needs a network .*trained with class dropout"),
        (("guided", "0", 10, "ddim", "cow", 1), "class 'cow' is no class of this network; it has cat, dog, newt"),
        (("guided", "0", 10, "ddim", "cat", float("nan")), "guidance_scale must be a finite number, got nan"),
        (
            ("guided", "0", 21, "ddim", None, 1),
            "num_inference_steps must be between 1 and the 20 steps of the chain, got 21",
        ),
        (("guided", "0-4", 10, "ddim", None, 1), "at most 4 images at a time"),
        (("guided", "0", 10, "dim", None, 1), "unknown sampler 'dim' .did you mean 'ddim'"),
        *(
            (("guided", "0", steps, "ddim", None, 1), "num_inference_steps must be a whole number, got")
            for steps in (2.5, "x", float("nan"), float("inf"), [])
        ),
    ],
)
def test_what_cannot_be_had_is_told(with_classes, values, sentence):
    with pytest.raises(UserError, match=sentence):
        next(with_classes.sample(*values))


def test_interpolation(with_classes):
    _, text = with_classes.interpolate("guided", 3, 4, 0.5, 10, "ddim", "dog", 1)
    assert text.startswith("11 images between two, mixed at t = ")
    for wrong, sentence in (
        ((0, None, 0.5), "each of seeds must be a whole number, got None"),
        ((0, 1, 1.5), "t counts diffusion steps, 0 to 20, got 30"),
    ):
        with pytest.raises(UserError, match=sentence):
            with_classes.interpolate("guided", *wrong, 10, "ddim", "", 1)


def test_bits_per_dim_of_a_class(with_classes, folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    pipe = DDPMPipeline.from_pretrained(folder / "guided")
    x_0 = torch.from_numpy(pixels / np.float32(127.5) - 1)[None, None]
    for label, index in (("dog", 1), ("", 3)):
        wanted = stratified_bits_per_dim(
            pipe.unet, pipe.scheduler, x_0, num_evaluations=40, class_labels=torch.tensor([index])
        )
        _, text = with_classes.bits_per_dim("guided", str(tmp_path / "image.png"), label)
        assert text.startswith(f"**{wanted.mean:.2f} ± {wanted.sampling_standard_error:.2f} bits/dim**")
        assert "40 network evaluations" in text  # there are no more than two for each of 20 steps


def test_too_many_pixels_are_not_decoded(demo, tmp_path, monkeypatch):
    Image.new("1", (200, 200)).save(tmp_path / "wide.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)  # Pillow refuses twice as many
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match=r"40000 pixels\) exceeds limit of 10000 pixels"):
        demo.bits_per_dim(MODEL, str(tmp_path / "wide.png"))


def test_what_is_not_finite_is_shown_to_nobody(tmp_path):
    pipe = DDPMPipeline(make_small_unet(), DDPMScheduler(num_train_timesteps=20))
    pipe.save_pretrained(tmp_path / "good")
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    pipe.save_pretrained(tmp_path / "bad")
    with pytest.raises(NotFiniteError, match=r"conv_in\.weight hold NaN"):
        Demo("good,bad", tmp_path)
    demo = Demo("good", tmp_path)
    with torch.no_grad():  # as if the network failed on the way
        demo.pipes["good"].unet.conv_out.bias[0] = float("inf")
    with pytest.raises(UserError, match=r"conv_out\.bias hold NaN or infinity"):
        next(demo.sample("good", "0", 5, "ddim", None, 1))
    with pytest.raises(UserError, match="NaN"):
        demo.bits_per_dim("good", str(FIXTURES.parent.parent / "docs" / "digits.png"))
