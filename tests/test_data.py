"""Images in: what becomes of each kind of file, whole datasets, and what is refused."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from ddpm_hf.data import (
    decode_image,
    load_digits,
    load_folder,
    load_images,
    random_flip,
    to_model_range,
    to_uint8,
)


def test_digits_are_scikit_learns():
    reference = sklearn_digits()
    data = load_digits("all")
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.uint8
    assert np.array_equal(np.round(data.images[:, 0].numpy() * (16 / 255)), reference.images)
    assert np.array_equal(data.labels.numpy(), reference.target)


def test_digits_split_is_fixed_and_complete():
    train, held_out, whole = load_digits("train"), load_digits("validation"), load_digits("all")
    assert (len(train), len(held_out)) == (1501, 296)
    both = torch.cat([train.images, held_out.images]).flatten(1)
    assert torch.equal(both.unique(dim=0), whole.images.flatten(1).unique(dim=0))
    assert held_out.labels.bincount().min() >= 29
    # 296 images drawn evenly: the first held-out zero is the sixth zero of the original
    zeros = torch.from_numpy(np.flatnonzero(sklearn_digits().target == 0))
    assert torch.equal(held_out.images[held_out.labels == 0][0], whole.images[zeros[5]])


def test_range_and_back_is_exact_for_all_levels():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_model_range(levels)
    assert x.min() == -1
    assert x.max() == 1
    assert torch.equal(to_uint8(x), levels)
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_flips_are_half_and_whole_images():
    images = torch.arange(8, dtype=torch.uint8).expand(4000, 1, 8, 8)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    backwards = (flipped[:, 0, 0] == images[0, 0, 0].flip(0)).all(1)
    same = (flipped[:, 0, 0] == images[0, 0, 0]).all(1)
    assert (backwards | same).all()
    assert abs(backwards.float().mean() - 0.5) < 0.03


# ---------------------------------------------------------------------- one image

RED, GREY = (200, 30, 30), 100


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def first_pixel(image, channels=3, **options):
    return decode_image(image, channels, **options)[:, 0, 0].tolist()


def sixteen_bit(level):
    return png(Image.fromarray(np.full((4, 4), level, dtype=np.uint16)))


def exif_turned():
    image = Image.new("RGB", (2, 2), (0, 0, 0))
    image.putpixel((0, 1), RED)  # bottom left; turned by 90 degrees clockwise it is at the top left
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(image, exif=exif)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (4, 4), RED), list(RED)),
        (Image.new("L", (4, 4), GREY), [GREY] * 3),
        (png(Image.new("RGB", (4, 4), RED).quantize(4)), list(RED)),
        (Image.new("1", (4, 4), 1), [255] * 3),
        (Image.new("RGBA", (4, 4), (*RED, 0)), [255] * 3),
        (Image.new("RGBA", (4, 4), (*RED, 255)), list(RED)),
        (Image.new("LA", (4, 4), (GREY, 0)), [255] * 3),
        (sixteen_bit(65535), [255] * 3),
        (sixteen_bit(257 * 100), [100] * 3),
        (sixteen_bit(300), [1] * 3),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), [255, 0, 0]),
        (exif_turned(), list(RED)),
    ],
    ids=[
        *("rgb", "grey", "palette", "1-bit", "transparent", "opaque", "grey-alpha"),
        *("16-bit-white", "16-bit", "16-bit-dark", "cmyk", "exif"),
    ],
)
def test_unusual_images(image, expected):
    assert np.abs(np.array(first_pixel(image)) - expected).max() <= 1


def test_half_transparent_on_a_chosen_background():
    half = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
    assert np.abs(np.array(first_pixel(half, background="black")) - [100, 0, 0]).max() <= 1
    assert np.abs(np.array(first_pixel(half, background="white")) - [227, 127, 127]).max() <= 1


def test_colour_becomes_grey_where_the_network_has_one_channel():
    assert first_pixel(Image.new("RGB", (4, 4), (255, 0, 0)), channels=1) == [76]  # ITU-R 601: 0.299 of red


def test_animated_gives_its_first_frame():
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    assert first_pixel(Image.open(io.BytesIO(buffer.getvalue())), channels=1) == [10]


def test_not_square_is_resized_and_centre_cropped():
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    small = decode_image(Image.fromarray(wide), resolution=(5, 5))
    assert small.shape == (3, 5, 5)
    assert small.min() > 230  # the dark sides are gone but for the filter's reach over the edge


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = decode_image(Image.fromarray(stripes), channels=1, resolution=(8, 8))
    assert abs(small.astype(int) - 128).max() < 20  # without antialiasing all would be 0 or 255


def test_refused_images():
    with pytest.raises(ValueError, match="float"):
        decode_image(Image.new("F", (4, 4)))
    with pytest.raises(ValueError, match="in_channels=2"):
        decode_image(Image.new("L", (4, 4)), channels=2)


# ---------------------------------------------------------------------- whole datasets


@pytest.fixture
def folder(tmp_path):
    for name, level in (("cat/a.png", 10), ("cat/b.jpg", 20), ("dog/c.png", 30)):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), level).save(path)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def test_folder_in_order_with_labels(folder):
    data = load_folder(folder, channels=1)
    assert data.images[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert data.labels.tolist() == [0, 0, 1]


def test_every_bad_file_is_named(folder):
    (folder / "dog" / "cut.png").write_bytes((folder / "dog" / "c.png").read_bytes()[:40])
    (folder / "cat" / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"2 of 5 images.*text\.png.*cut\.png"):
        load_folder(folder)


def test_mixed_sizes_need_a_resolution(folder):
    Image.new("L", (9, 8)).save(folder / "odd.png")
    with pytest.raises(ValueError, match=r"8x8.*8x9.*--resolution"):
        load_folder(folder)
    assert load_folder(folder, resolution=(8, 8)).images.shape == (4, 3, 8, 8)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images"):
        load_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        load_folder(tmp_path / "file")


def test_parquet_through_datasets_keeps_16_bits_and_labels(tmp_path):
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)).save(deep, format="PNG")
    plain = io.BytesIO()
    Image.new("L", (8, 8), 50).save(plain, format="PNG")
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"picture": [{"bytes": deep.getvalue()}, {"bytes": plain.getvalue()}], "label": [1, 0]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    data = load_images(dataset_name=str(tmp_path / "set"), channels=1, cache_dir=str(tmp_path / "cache"))
    assert data.images[:, 0, 0, 0].tolist() == [100, 50]
    assert data.labels.tolist() == [1, 0]


def test_dataset_without_images_or_that_does_not_exist(tmp_path):
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match="no image column; its columns are x"):
        load_images(dataset_name=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="cannot load the dataset"):
        load_images(dataset_name=str(tmp_path / "nowhere"))


def test_held_out_share_is_never_in_training(tmp_path):
    for level in range(20):
        Image.new("L", (8, 8), level).save(tmp_path / f"{level:02d}.png")
    common = {"train_data_dir": str(tmp_path), "channels": 1, "validation_split": 0.25}
    train = load_images(split="train", **common).images[:, 0, 0, 0].tolist()
    held_out = load_images(split="validation", **common).images[:, 0, 0, 0].tolist()
    assert len(held_out) == 5
    assert sorted(train + held_out) == list(range(20))


def test_digits_can_be_had_in_colour_and_larger():
    data = load_images(dataset="digits", channels=3, resolution=(16, 16), split="validation")
    assert data.images.shape == (296, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"dataset": "digits", "train_data_dir": "x"}, "got 2"),
        ({"dataset": "digit"}, "did you mean 'digits'"),
        ({"dataset": "digits", "validation_split": 1.5}, "1.5"),
    ],
)
def test_bad_choices(options, message):
    with pytest.raises(ValueError, match=message):
        load_images(**options)
