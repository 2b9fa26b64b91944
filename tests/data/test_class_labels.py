"""Which class a label means: one rule for names and numbers, in every place where a class is asked for."""

import numpy as np
import pytest
import torch
from conftest import make_small_unet

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.data.class_labels import Classes, ClassIndex, sorted_names
from ddpm_hf.data.datasets import ImageDataset, load_digits
from ddpm_hf.evaluation.run import EvaluationOptions, evaluate_likelihood
from ddpm_hf.hub.model_card import CardFacts, ModelFacts, make_card
from ddpm_hf.hub.space_app import Demo
from ddpm_hf.pipelines.figures import progressive_generation
from ddpm_hf.sampling.generation import class_sequence, generate, write_samples

NUMBERED = Classes(5, ("1", "2", "3", "10"), null=4)
WORDS = Classes(3, ("cats", "dogs"), null=2)
NAMELESS = Classes(3)


def test_names_that_are_numbers_sort_as_numbers():
    assert sorted_names(["10", "3", "1", "2"]) == ["1", "2", "3", "10"]
    assert sorted_names(["dogs", "10", "-1", "9", "cats", "01", "1"]) == ["-1", "01", "1", "9", "10", "cats", "dogs"]
    assert sorted_names([f"class{i}" for i in (2, 10)]) == ["class10", "class2"]


@pytest.mark.parametrize(
    ("classes", "label", "expected"),
    [
        (NUMBERED, 1, 0),
        (NUMBERED, "1", 0),
        (NUMBERED, "01", 0),
        (NUMBERED, 10, 3),
        (NUMBERED, np.int64(10), 3),
        (NUMBERED, torch.tensor(10), 3),
        (NUMBERED, np.str_("10"), 3),
        (NUMBERED, None, 4),
        (NUMBERED, ClassIndex(1), 1),
        (Classes(4, ("1", "10", "2", "3")), 10, 1),  # a network keeps the order that was saved with it
        (Classes(2, ("01", "1")), "01", 0),
        (Classes(2, ("01", "1")), 1, 1),
        (Classes(2, ("007", "8")), 7, 0),
        (Classes(2, ("1", "cats")), "cats", 1),
        (WORDS, 1, 1),
        (WORDS, "1", 1),
        (NAMELESS, 2, 2),
        (NAMELESS, "2", 2),
    ],
)
def test_a_label_means_one_class(classes, label, expected):
    assert classes.index(label) == expected


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [
        (NUMBERED, 0, "class 0 is no class of this network; it has 1, 2, 3, 10"),
        (NUMBERED, 4, "class 4 is no class"),  # the place of "no class", which has no number
        (NUMBERED, -1, "class -1 is no class"),
        (NUMBERED, " 1", "class ' 1' is no class"),
        (NUMBERED, "1.0", "class '1.0' is no class"),
        (NUMBERED, 1.0, "class 1.0 is neither a name nor a whole number"),
        (NUMBERED, True, "class True is neither"),
        (NUMBERED, np.bool_(True), "class True is neither"),
        (NUMBERED, b"1", "class b'1' is neither"),
        (NUMBERED, [1], r"class \[1\] is neither"),
        (Classes(2, ("1", "cats")), 0, "class 0 is no class of this network; it has 1, cats"),
        (Classes(2, ("01", "001")), 1, "class 1 could be '01' and '001'; write it as the network does"),
        (Classes(2, ("None", "cats")), "dogs", "class 'dogs' is no class of this network; it has None, cats"),
        (WORDS, 2, "class 2 is no class of this network; it has cats, dogs"),
        (WORDS, ClassIndex(3), "class 3 is no class"),
        (NAMELESS, 3, r"class 3 is no class of this network; it has 0\.\.2"),
        (NAMELESS, None, "class None is neither"),
        (Classes(3, null=2), 2, r"it has 0\.\.1"),
        (Classes(None), 0, "none: it is not class-conditional"),
    ],
)
def test_a_label_that_means_none_is_refused(classes, label, message):
    with pytest.raises(ValueError, match=message):
        classes.index(label)


@pytest.mark.parametrize(
    "labels", [[1, 10], ("1", "10"), torch.tensor([1, 10]), np.array([1, 10]), np.array(["1", "10"]), iter([1, "10"])]
)
def test_many_labels_of_any_kind(labels):
    assert NUMBERED.checked(labels, 1.0, 2).tolist() == [0, 3]


def test_arrays_and_tensors_follow_the_same_rule():
    assert NUMBERED.checked(np.array(2), 1.0, 3).tolist() == [1, 1, 1]
    assert NUMBERED.checked([None, 1], 1.0, 2).tolist() == [4, 0]
    assert NUMBERED.checked(None, 1.0, 2).tolist() == [4, 4]
    for wrong in (torch.tensor([4]), torch.tensor([1.0]), torch.tensor([True]), np.array([1.0]), 1.5, b"1"):
        with pytest.raises(ValueError, match="class "):
            NUMBERED.checked(wrong, 1.0, 1)
    with pytest.raises(ValueError, match=r"give class_labels; its classes are 0\.\.2"):
        NAMELESS.checked(None, 1.0, 1)


@pytest.fixture(scope="module")
def numbered():
    """A pipeline whose classes are called 1, 2, 3 and 10, each of which makes another image."""
    unet = make_small_unet(num_class_embeds=5, _class_names=["1", "2", "3", "10"], _null_class=4)
    with torch.no_grad():
        unet.class_embedding.weight.mul_(20)
    pipe = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_way_to_ask_for_a_class_gives_the_same_images(numbered, tmp_path):
    options = {"seeds": [0], "output_type": "pt"}
    one, ten = (numbered(class_labels=[ClassIndex(i)], **options).images for i in (0, 3))
    assert (one - ten).abs().max() > 0.1
    for label, image in ((1, one), ("1", one), (torch.tensor([1]), one), (10, ten), (np.array([10]), ten)):
        assert torch.equal(numbered(class_labels=label, **options).images, image)
    pixels = (one * 255).round().to(torch.uint8)
    assert class_sequence(numbered, "1,10", 3) == [0, 3, 0]
    for labels in (class_sequence(numbered, "1", 1), [1], ["1"], torch.tensor([1])):
        ((_, made),) = generate(numbered, [0], class_labels=labels)
        assert torch.equal(made, pixels)
        write_samples(numbered, [0], tmp_path / "out.npz", class_labels=labels)
        assert np.array_equal(np.load(tmp_path / "out.npz")["arr_0"][0], pixels[0].permute(1, 2, 0).numpy())
    for label in (1, "1", np.int64(1), torch.tensor(1)):
        figure = progressive_generation(numbered, [0], class_labels=label)
        assert torch.allclose(figure.x_t[:, -1].clamp(-1, 1), one * 2 - 1, atol=1e-4)
    numbered.save_pretrained(tmp_path / "model")
    demo = Demo(str(tmp_path / "model"))
    (*_, (_, _, images, _)) = demo.sample(str(tmp_path / "model"), "0", 10, "ddpm", "1", 1)
    assert np.array_equal(np.asarray(images[0]), pixels[0, 0].numpy())
    assert "class_labels='1'" in make_card(ModelFacts.read(tmp_path / "model"), CardFacts("m"))


def test_bits_per_dim_go_by_the_names(numbered):
    """The same images, whose classes are numbered in the order of text, or only some of them are there."""
    images = load_digits("validation").images[:4]
    sets = [
        ImageDataset(images, torch.tensor([0, 3, 1, 2]), "a", ["1", "2", "3", "10"]),
        ImageDataset(images, torch.tensor([0, 1, 2, 3]), "b", ["1", "10", "2", "3"]),
    ]
    values = [evaluate_likelihood(numbered, data, "all", EvaluationOptions(num_evaluations=4)).values for data in sets]
    assert values[0] == values[1]
    for data in sets:
        assert numbered.classes.of_dataset(data).tolist() == [0, 3, 1, 2]
    some = ImageDataset(images[:2], torch.tensor([0, 1]), "c", ["2", "10"])
    assert numbered.classes.of_dataset(some).tolist() == [1, 3]
    with pytest.raises(ValueError, match="knows no class '4'; it was trained on 1, 2, 3, 10"):
        evaluate_likelihood(
            numbered, ImageDataset(images[:2], torch.tensor([0, 1]), "d", ["2", "4"]), "all", EvaluationOptions()
        )


def test_networks_without_names_have_numbers():
    assert NAMELESS.of_names(["0", "2"]) == [0, 2]  # and not 0, 1: what is called 2 is class 2
    assert NAMELESS.of_names(["a", "b", "c"]) == [0, 1, 2]
    assert NAMELESS.of_names(None) == [0, 1, 2]
    assert Classes(3, null=2).of_names(None) == [0, 1]
    with pytest.raises(ValueError, match=r"class label 3 is outside 0\.\.2"):
        NAMELESS.of_names(["1", "2", "3"])
    with pytest.raises(ValueError, match=r"has the classes 0\.\.2 without names, and the images have 2: a, b"):
        NAMELESS.of_names(["a", "b"])
    with pytest.raises(ValueError, match="class label 2 is outside"):
        Classes(3, null=2).of_names(["a", "b", "c"])
