"""Datasets: where images come from, in memory, as needed and streamed, and what is refused."""

import io
import json
import os
import re
import shutil
import threading
import tracemalloc
import warnings
import zipfile
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

import ddpm_hf.data.datasets
import ddpm_hf.data.decoding
from ddpm_hf.data.datasets import ImageDataset, LazyImageDataset, StreamedImages, load_digits, load_images
from ddpm_hf.data.tensors import crop_seeds, flip_images, to_model_range, to_uint8

LAZY = {"memory_limit_bytes": 0}  # nothing fits


def load_folder(folder, **options):
    return load_images(train_data_dir=str(folder), **options)


@pytest.fixture(autouse=True)
def warnings_are_errors():
    """Nothing is reported that a test does not expect."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


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


def test_exactly_the_chosen_images_are_mirrored_as_a_whole():
    images = torch.randint(256, (64, 3, 5, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    before = images.clone()
    flip = torch.arange(64) % 3 == 1
    flipped = flip_images(images, flip)
    assert flipped.dtype == torch.uint8
    for original, result, mirrored in zip(before.numpy(), flipped.numpy(), flip.tolist(), strict=True):
        assert np.array_equal(result, original[:, :, ::-1] if mirrored else original)
    assert torch.equal(images, before)  # not in place
    assert torch.equal(flip_images(images, torch.zeros(64, dtype=torch.bool)), images)
    assert torch.equal(flip_images(flipped, flip), images)


# ---------------------------------------------------------------------- folders


def write_png(path, level, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path)


def levels(images):
    """The first pixel of each image: what tells the images of these tests apart."""
    return images[:, 0, 0, 0].tolist()


@pytest.fixture
def folder(tmp_path):
    for name, level in (("cat/a.png", 10), ("cat/b.jpg", 20), ("dog/deep/c.png", 30)):
        write_png(tmp_path / "images" / name, level)
    write_png(tmp_path / "images" / ".hidden" / "d.png", 40)
    write_png(tmp_path / "images" / "__MACOSX" / "cat" / "e.png", 50)
    return tmp_path / "images"


def test_folder_in_order_with_labels(folder):
    data = load_folder(folder, channels=1)
    assert levels(data.images) == [10, 20, 30]
    assert data.labels.tolist() == [0, 0, 1]
    assert data.class_names == ["cat", "dog"]
    assert data.name == "images"


def test_no_labels_where_they_would_say_nothing(folder):
    assert load_folder(folder / "cat").labels is None  # no folders
    assert load_folder(folder / "cat").class_names is None
    write_png(folder / "outside.png", 5)
    said = []
    assert load_folder(folder, report=said.append).labels is None
    assert len(said) == 1
    assert re.search(r"1 of 4 images have no label in the folders of .*, so none of them has one here", said[0])
    write_png(folder.parent / "one" / "only" / "a.png", 5)
    assert load_folder(folder.parent / "one").labels is None  # a single class


def test_folders_named_like_splits_are_not_classes(tmp_path):
    for split in ("train", "test"):
        write_png(tmp_path / split / "a.png", 0)
    with pytest.raises(ValueError, match=r"test, train in .* look like splits.*/train'"):
        load_folder(tmp_path)


def test_classes_called_by_numbers_are_in_their_order(tmp_path):
    for name in ("10", "3", "1", "2"):
        write_png(tmp_path / name / "a.png", int(name))
    data = load_folder(tmp_path, channels=1)
    assert data.class_names == ["1", "2", "3", "10"]
    assert {level: data.class_names[label] for level, label in zip(levels(data.images), data.labels, strict=True)} == {
        1: "1",
        2: "2",
        3: "3",
        10: "10",
    }


def test_links_are_followed(folder, tmp_path):
    """As torchvision does: folders, files, and through links in linked folders."""
    write_png(tmp_path / "far" / "e.PNG", 50)
    write_png(tmp_path / "farther" / "f.png", 60)
    write_png(tmp_path / "single.png", 25)
    (folder / "eel").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "more").symlink_to("../farther")
    (folder / "cat" / "c.png").symlink_to(tmp_path / "single.png")
    data = load_folder(folder, channels=1)
    assert levels(data.images) == [10, 20, 25, 30, 50, 60]
    assert [data.class_names[label] for label in data.labels] == ["cat"] * 3 + ["dog"] + ["eel"] * 2
    found = {path for path, _ in torchvision.datasets.ImageFolder(str(folder)).samples}
    assert len(found) == 6 + 2  # what is hidden, too
    (tmp_path / "a link").symlink_to(folder)
    assert torch.equal(load_folder(tmp_path / "a link", channels=1).images, data.images)


def test_links_that_lead_back_are_not_followed(folder):
    (folder / "cat" / "up").symlink_to("..")
    (folder / "outside").symlink_to("../..")
    (folder / "cat" / "other").symlink_to("../dog")
    (folder / "dog" / "other").symlink_to("../cat")
    said = []
    data = load_folder(folder, channels=1, report=said.append)
    # cat: its own, and dog's through the link; dog: cat's, whose links lead back, and its own.
    assert [
        (data.class_names[label], level) for label, level in zip(data.labels, levels(data.images), strict=True)
    ] == [
        *[("cat", 10), ("cat", 20), ("cat", 30)],
        *[("dog", 30), ("dog", 10), ("dog", 20)],
    ]
    assert len(said) == 1
    assert said[0].startswith("5 file(s) or link(s) in ")
    assert "or lead back to a folder above them: cat/other/other, cat/up, dog/" in said[0]


def test_links_to_nothing_are_named(folder):
    (folder / "cat" / "gone.png").symlink_to("nowhere.png")
    (folder / "eel").symlink_to("/nowhere/eel")
    (folder / "self").symlink_to("self")
    with pytest.raises(ValueError, match=r"3 link\(s\) in .* lead to nothing: cat/gone.png, eel, self"):
        load_folder(folder)
    said = []
    data = load_folder(folder, channels=1, on_bad_image="skip", report=said.append)
    assert levels(data.images) == [10, 20, 30]
    assert data.class_names == ["cat", "dog"]
    assert said[0].startswith("2 file(s) or link(s) in ")
    assert said[0].endswith(": eel, self")
    assert said[1].startswith(f"left out {folder / 'cat' / 'gone.png'}: No such file")


def test_folders_that_cannot_be_listed_are_named(folder, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"cannot list the image folder '.*dog': Permission denied"):
        load_folder(folder)


@pytest.fixture
def shards_with_labels(tmp_path):
    """As StyleGAN's and EDM's tools write them: the folders are parts, and the labels are in a file."""

    def write(labels):
        for i in range(4):
            write_png(tmp_path / "edm" / f"{i // 2:05d}" / f"img{i:08d}.png", i)
        (tmp_path / "edm" / "dataset.json").write_text(labels if isinstance(labels, str) else json.dumps(labels))
        return tmp_path / "edm"

    return write


NAMES = [f"{i // 2:05d}/img{i:08d}.png" for i in range(4)]


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        ([[name, label] for name, label in zip(NAMES, [10, 9, 10, 0], strict=True)], [2, 1, 2, 0], ["0", "9", "10"]),
        (dict(zip(NAMES, ["b", "a", "a", "b"], strict=True)), [1, 0, 0, 1], ["a", "b"]),
        ([[name.replace("/", "\\"), 3] for name in NAMES], [0, 0, 0, 0], ["3"]),
        (None, None, None),
    ],
    ids=["numbers", "names", "Windows", "none"],
)
def test_labels_of_stylegan_and_edm(shards_with_labels, labels, expected, names):
    data = load_folder(shards_with_labels({"labels": labels}), channels=1)
    assert levels(data.images) == [0, 1, 2, 3]
    assert (None if data.labels is None else data.labels.tolist()) == expected
    assert data.class_names == names


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[name, [0.0, 1.0]] for name in NAMES], r"a whole number or a string, got \['00000/img.*', \[0.0, 1.0\]\]"),
        ([[name, 1.0] for name in NAMES], r"got \['00000/img.*', 1.0\]"),
        ([[name, True] for name in NAMES], r"got \['00000/img.*', True\]"),
        (
            [*[[name, 1] for name in NAMES], ["00009/a.png", 1]],
            r"labels of 1 file\(s\) that are not there, such as 00009/a.png;",
        ),
        ([[NAMES[0], 1], [NAMES[0], 2]], "has two labels for '00000/img00000000.png': 1 and 2"),
        ([1, 2], "must be pairs of a file and its label, .* got 1"),
        ("{", "cannot read the labels in '.*dataset.json': Expecting"),
    ],
)
def test_labels_of_stylegan_that_are_refused(shards_with_labels, labels, message):
    with pytest.raises(ValueError, match=message):
        load_folder(shards_with_labels(labels if isinstance(labels, str) else {"labels": labels}))


def test_labels_of_stylegan_that_do_not_fit_the_files(shards_with_labels):
    said = []
    folder = shards_with_labels({"labels": [[name, 1] for name in NAMES[:3]]})
    assert load_folder(folder, report=said.append).labels is None
    assert re.fullmatch(r"1 of 4 images have no label in dataset.json of .*, so none of them has one here", said[0])
    said.clear()
    folder = shards_with_labels({"labels": [[name, 1] for name in [*NAMES, "gone.png"]]})
    assert load_folder(folder, on_bad_image="skip", report=said.append).labels.tolist() == [0] * 4
    folder = shards_with_labels({"info": "of another kind"})
    assert load_folder(folder, report=said.append).class_names == ["00000", "00001"]
    assert "1 file(s)" in said[0]


def test_columns_beside_images_are_named(folder):
    (folder / "metadata.csv").write_text("file_name,label\ncat/a.png,x\n")
    said = []
    load_folder(folder, report=said.append)
    table = load_images(dataset_name=str(folder), channels=1, report=said.append)  # lists one of the three images
    assert table.class_names == ["x"]
    assert said.pop() == f"2 of 3 images in {str(folder)!r} are not in metadata.csv: left out"
    assert len(said) == 1
    assert said[0].endswith(": metadata.csv")


def test_other_files_are_reported(folder):
    (folder / "notes.txt").write_text("not an image")
    said = []
    assert len(load_folder(folder, report=said.append)) == 3
    assert len(said) == 1
    assert "1 file(s)" in said[0]
    assert "notes.txt" in said[0]


@pytest.mark.parametrize("options", [{}, LAZY, {"crop": "random"}], ids=["memory", "lazy", "random crops"])
def test_every_bad_file_is_named(folder, options):
    (folder / "dog" / "cut.png").write_bytes((folder / "cat" / "a.png").read_bytes()[:40])
    (folder / "cat" / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"2 of 5 images.*text\.png.*cut\.png.*on_bad_image='skip'"):
        load_folder(folder, resolution=(8, 8), **options).batch(torch.arange(5))


def test_many_bad_files_are_all_named_where_they_are_left_out(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02d}.png").write_text("hello")
    said = []
    with pytest.raises(ValueError, match=r"cannot read any of the 30 images, such as .*00\.png: ") as caught:
        load_folder(tmp_path, report=said.append)
    assert str(caught.value).count("png") == 1  # the reason is the same for all
    with pytest.raises(ValueError, match="none of the 30 images"):
        load_folder(tmp_path, on_bad_image="skip", report=said.append)
    Image.new("L", (8, 8)).save(tmp_path / "zzz.png")
    with pytest.raises(ValueError, match=r"cannot read 30 of 31 images: .*00\.png.*19\.png .* \.\.\.; fix") as caught:
        load_folder(tmp_path, report=said.append)
    assert str(caught.value).count("(") == 1
    assert all(f"{number:02d}.png" in " ".join(said) for number in range(30))


@pytest.mark.parametrize("crop", ["center", "random"])
def test_bad_files_are_left_out_and_named(folder, crop):
    (folder / "cat" / "aa.png").write_text("hello")
    (folder / "zzz").mkdir()
    (folder / "zzz" / "empty.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out .*(aa|empty)\.png") as caught:
        data = load_folder(folder, channels=1, resolution=(8, 8), on_bad_image="skip", crop=crop)
    assert len(caught) == 2
    images, labels = data.batch(torch.arange(len(data)))
    assert levels(images) == [10, 20, 30]
    assert labels.tolist() == [0, 0, 1]


def test_bad_files_are_replaced_where_they_are_found_late(folder):
    (folder / "cat" / "aa.png").write_text("hello")
    said = []
    data = load_folder(folder, channels=1, resolution=(8, 8), on_bad_image="skip", report=said.append, **LAZY)
    assert len(data) == 4
    assert said == []
    for _ in range(2):
        images, labels = data.batch(torch.tensor([1, 3, 1]))
        assert levels(images) == [20, 30, 20]  # b.jpg follows aa.png
        assert labels.tolist() == [0, 1, 0]
    assert len(said) == 1
    assert "aa.png" in said[0]
    alone = data.subset(torch.tensor([1]))
    with pytest.raises(ValueError, match="1 images of images in a row cannot be read"):
        alone.batch(torch.tensor([0]))


def test_mixed_sizes_need_a_resolution(folder):
    write_png(folder / "cat" / "odd.png", 0, (9, 8))
    with pytest.raises(ValueError, match=r"8x8.*8x9.*resolution"):
        load_folder(folder)
    assert load_folder(folder, resolution=(8, 8)).images.shape == (4, 3, 8, 8)
    assert load_folder(folder, resolution=8).images.shape == (4, 3, 8, 8)  # as of a run
    with pytest.raises(ValueError, match="both positive, got"):
        load_folder(folder, resolution=0)
    assert load_folder(folder, resolution=(4, 12)).images.shape == (4, 3, 4, 12)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for named in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=r"is neither a folder that holds images, such as .*, nor an array file"):
            load_folder(named)
    write_png(tmp_path / "a.png", 0)
    with pytest.raises(ValueError, match=r"a.png' is neither a folder"):
        load_folder(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("file", "named", "message"),
    [
        ("images.zip", "images.zip", "is an archive; unpack it first"),
        ("images.tar.gz", "images.tar.gz", "is an archive; unpack it first"),
        ("images.zip", "", "is an archive; unpack it first"),
        ("bedroom_train_lmdb/data.mdb", "", "LMDB database, as LSUN comes; write its values into files"),
        ("data.mdb", "data.mdb", "LMDB"),
        ("cifar-10-batches-py/data_batch_1", "", "pickles, and those are never read; take it from the Hub"),
        ("test_batch", "", "pickles"),
        ("a.pkl", "a.pkl", "is neither a folder"),
    ],
)
def test_sources_that_are_refused(tmp_path, file, named, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"anything")
    with pytest.raises(ValueError, match=message):
        load_images(train_data_dir=str(tmp_path / named))


def test_mixed_kinds_of_files_are_refused(folder):
    np.save(folder / "a.npy", np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"several kinds of files \(cat/a.png, a.npy\)"):
        load_folder(folder)


# ---------------------------------------------------------------------- arrays


def test_one_array_file_is_a_dataset(tmp_path):
    values = np.linspace(-1, 1, 6 * 4 * 4 * 2).reshape(6, 4, 4, 2).astype(np.float32)
    np.savez(tmp_path / "field.npz", images=values, labels=np.array([5, 7, 5, 9, 9, 9]))
    data = load_images(train_data_dir=str(tmp_path / "field.npz"), channels=2, value_range=(-1, 1))
    expected = np.rint((values + 1) * 127.5).transpose(0, 3, 1, 2)
    assert np.array_equal(data.images.numpy(), expected)
    assert data.labels.tolist() == [0, 1, 0, 2, 2, 2]
    assert data.class_names == ["5", "7", "9"]
    assert data.name == "field"


def test_a_folder_of_arrays(tmp_path):
    for name, stack in (
        ("a/x.npy", np.full((3, 4, 4), 1)),
        ("a/y.npy", np.full((4, 4), 2)),
        ("b/z.npy", np.full((2, 4, 4), 3)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, stack.astype(np.uint8))
    data = load_folder(tmp_path, channels=1)
    assert levels(data.images) == [1, 1, 1, 2, 3, 3]
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert data.class_names == ["a", "b"]
    lazy = load_folder(tmp_path, channels=1, resolution=(4, 4), **LAZY)
    assert levels(lazy.batch(torch.tensor([5, 3, 0, 2]))[0]) == [3, 2, 1, 1]


def test_bad_arrays_are_named_with_their_values(tmp_path):
    values = np.zeros((5, 4, 4))
    values[3, 1, 2] = 1.5
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(
        ValueError, match=r"1 of 5 images: image 3 of .*a\.npy \(the value 1\.5 is outside the range 0 to 1"
    ):
        load_folder(tmp_path, channels=1, value_range=(0, 1))
    with pytest.raises(ValueError, match="state what becomes black and white"):
        load_folder(tmp_path, channels=1)
    (tmp_path / "b.npy").write_text("hello")
    with pytest.raises(ValueError, match=r"1 of 2 array files: .*b\.npy \(EOF: reading magic string"):
        load_folder(tmp_path, channels=1, value_range=(0, 1))
    said = []
    data = load_folder(tmp_path, channels=1, value_range=(0, 1), on_bad_image="skip", report=said.append)
    assert len(data) == 4
    assert len(said) == 2


# ---------------------------------------------------------------------- in memory, as needed, cropped


@pytest.fixture
def varied(tmp_path):
    """12 noise images of several shapes."""
    random = np.random.default_rng(0)
    for number in range(12):
        height, width = random.integers(16, 40, 2)
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))
        path = tmp_path / "varied" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return tmp_path / "varied"


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_as_needed_equals_in_memory(varied, num_workers):
    whole = load_folder(varied, resolution=(8, 12), num_workers=num_workers)
    lazy = load_folder(varied, resolution=(8, 12), num_workers=num_workers, **LAZY)
    assert isinstance(whole, ImageDataset)
    assert isinstance(lazy, LazyImageDataset)
    assert (len(lazy), lazy.name, lazy.class_names) == (len(whole), whole.name, whole.class_names)
    assert lazy.image_shape == whole.image_shape == (3, 8, 12)
    indices = torch.tensor([7, 0, 11, 0, 3])
    chosen = torch.tensor([9, 2, 4])
    for a, b in ((whole, lazy), (whole.subset(chosen), lazy.subset(chosen))):
        for at in (torch.arange(len(a)), indices[indices < len(a)], torch.tensor([], dtype=torch.long)):
            images, labels = a.batch(at)
            its_images, its_labels = b.batch(at)
            assert torch.equal(images, its_images)
            assert torch.equal(labels, its_labels)
            assert its_labels.dtype == torch.int64


def test_what_fits_is_decided_by_the_uint8_pixels(varied):
    needed = 12 * 3 * 8 * 8
    assert isinstance(load_folder(varied, resolution=(8, 8), memory_limit_bytes=needed), ImageDataset)
    assert isinstance(load_folder(varied, resolution=(8, 8), memory_limit_bytes=needed - 1), LazyImageDataset)


def test_without_a_resolution_too_the_memory_limit_holds(varied, tmp_path):
    for number in range(5):
        write_png(tmp_path / "even" / f"{number}.png", number)
    assert len(load_folder(tmp_path / "even", channels=1, memory_limit_bytes=5 * 8 * 8)) == 5
    with pytest.raises(ValueError, match=r"even do not fit into 319 bytes.*choose one size with resolution.*8x8"):
        load_folder(tmp_path / "even", channels=1, memory_limit_bytes=5 * 8 * 8 - 1)
    with pytest.raises(ValueError, match="choose one size with resolution"):
        load_folder(varied, **LAZY)


def test_random_crops_need_no_room_for_all_images(varied, monkeypatch):
    monkeypatch.setattr(ddpm_hf.data.datasets, "_CHUNK", 1)
    peaks = {}
    for crop in ("center", "random"):
        tracemalloc.start()
        load_folder(varied, resolution=(512, 512), crop=crop)
        peaks[crop] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    whole = 12 * 3 * 512 * 512
    assert peaks["center"] > whole  # or tracemalloc would not see it
    assert peaks["random"] < whole / 2


def test_only_the_images_of_the_batch_are_decoded(varied, monkeypatch):
    decoded, lock = [], threading.Lock()
    original = ddpm_hf.data.decoding.read_image

    def noting(source, options, seed):
        with lock:
            decoded.append(source.name)
        return original(source, options, seed)

    monkeypatch.setattr(ddpm_hf.data.decoding, "read_image", noting)
    lazy = load_folder(varied, resolution=(8, 8), **LAZY)
    assert decoded == []
    lazy.batch(torch.tensor([0, 7]))
    assert sorted(decoded) == ["00.png", "03.png"]  # a/00 02 04 06 08 10, then b/01 03


def test_random_crops_are_a_function_of_their_seeds(varied):
    data = load_folder(varied, resolution=(8, 8), crop="random")
    centred = load_folder(varied, resolution=(8, 8))
    assert isinstance(data, LazyImageDataset)
    all_of_them = torch.arange(12)
    first = crop_seeds(0, all_of_them)
    images, _ = data.batch(all_of_them, first)
    assert torch.equal(data.batch(all_of_them, first)[0], images)
    # neither the others in the batch nor their order matter
    assert torch.equal(data.batch(torch.tensor([5, 2]), first[[5, 2]])[0], images[[5, 2]])
    assert not torch.equal(data.batch(all_of_them, crop_seeds(1, all_of_them))[0], images)
    assert not torch.equal(data.batch(all_of_them, crop_seeds(0, all_of_them + 12))[0], images)
    assert torch.equal(data.batch(all_of_them)[0], centred.images)  # no seeds: the centre
    assert torch.equal(centred.batch(all_of_them, first)[0], centred.images)


def test_crop_seeds_differ_by_seed_and_position():
    seeds = torch.cat([crop_seeds(seed, torch.arange(100)) for seed in range(3)])
    assert seeds.dtype == torch.int64
    assert len(seeds.unique()) == 300
    assert torch.equal(crop_seeds(1, torch.tensor([7])), seeds[107:108])


def test_one_size_is_needed_to_crop_or_to_decode_later(varied):
    with pytest.raises(ValueError, match="resolution"):
        load_folder(varied, crop="random")


# ---------------------------------------------------------------------- datasets of the Hub, parquet


def png_bytes(level, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("L", size, level).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(folder, images, file="train.parquet", image="picture", **columns):
    """`columns` are (type, values)."""
    folder.mkdir(exist_ok=True)
    features = datasets.Features({image: datasets.Image(), **{key: kind for key, (kind, _) in columns.items()}})
    rows = {image: [{"bytes": x} for x in images], **{key: values for key, (_, values) in columns.items()}}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / file)


AB = datasets.ClassLabel(names=["a", "b"])


@pytest.mark.parametrize("given", ["dataset_name", "train_data_dir"])
def test_what_save_to_disk_wrote_is_opened(tmp_path, given):
    features = datasets.Features(image=datasets.Image(), label=AB)
    table = datasets.Dataset.from_list(
        [{"image": {"bytes": png_bytes(level), "path": None}, "label": level % 2} for level in range(4)], features
    )
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "several")
    datasets.DatasetDict(test=table.select([1]), dev=table).save_to_disk(tmp_path / "no train")
    for name, expected in (("one", [0, 1, 2, 3]), ("several", [0, 1, 2, 3]), ("no train/test", [1])):
        data = load_images(**{given: str(tmp_path / name)}, channels=1)
        assert levels(data.images) == expected
        assert [data.class_names[label] for label in data.labels] == ["ab"[level % 2] for level in expected]
        streamed = load_images(**{given: str(tmp_path / name)}, channels=1, resolution=(8, 8), streaming=True)
        assert levels(streamed.take(9).images) == expected
        assert sorted(levels(streamed.batch_at(0, range(len(expected)), len(expected), 0)[0])) == expected
    with pytest.raises(
        ValueError, match=r"unknown split 'train' of '.*no train'; it has .*; name the folder of one, such"
    ):
        load_images(**{given: str(tmp_path / "no train")})


def test_what_datasets_would_leave_out_of_a_folder_is_refused(tmp_path):
    write_parquet(tmp_path / "far", [png_bytes(1)])
    write_parquet(tmp_path / "near", [png_bytes(2)])
    (tmp_path / "near" / "more").symlink_to("../far")
    for given in ("dataset_name", "train_data_dir"):
        with pytest.raises(
            ValueError, match=r"datasets would leave out links to folders, .*near': more; put the files there"
        ):
            load_images(**{given: str(tmp_path / "near")})
    (tmp_path / "near" / "more").unlink()
    (tmp_path / "near" / "gone.parquet").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"links to nothing .*near': gone.parquet; "):
        load_images(dataset_name=str(tmp_path / "near"))
    (tmp_path / "near" / "gone.parquet").unlink()
    shutil.copy(next((tmp_path / "far").glob("*.parquet")), tmp_path / "near" / "B.PARQUET")
    with pytest.raises(ValueError, match=r"ending in capitals in .*near': B.PARQUET; "):
        load_images(train_data_dir=str(tmp_path / "near"))


def test_splits_of_a_dataset_of_its_own(tmp_path):
    for split, pixels in (("train", range(20)), ("test", [30, 31]), ("validation", [40])):
        write_parquet(tmp_path / "set", [png_bytes(value) for value in pixels], file=f"{split}.parquet")
    where = {"dataset_name": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache"), "channels": 1}
    assert levels(load_images(**where, split="test").images) == [30, 31]
    assert levels(load_images(**where, split="test", validation_split=0.25).images) == [30, 31]  # all of it
    assert levels(load_images(**where, split="validation").images) == [40]
    held_out = levels(load_images(**where, split="validation", validation_split=0.25).images)
    assert len(held_out) == 5
    assert max(held_out) < 20  # of train
    assert len(load_images(**where, validation_split=0.25)) == 15
    streamed = load_images(**where, split="test", resolution=(8, 8), streaming=True, validation_split=0.25)
    assert sorted(levels(streamed.batch_at(0, range(2), 2, 0)[0])) == [30, 31]
    with pytest.raises(ValueError, match=r"(?i)cannot load the dataset .* unknown split \"dev\""):
        load_images(**where, split="dev")


@pytest.mark.parametrize("given", ["dataset_name", "train_data_dir"])
def test_parquet_through_datasets_keeps_16_bits_and_labels(tmp_path, given):
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)).save(deep, format="PNG")
    write_parquet(tmp_path / "set", [deep.getvalue(), png_bytes(50)], label=(AB, [1, 0]))
    where = {given: str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    data = load_images(**where, channels=1)
    assert levels(data.images) == [100, 50]
    assert data.labels.tolist() == [1, 0]
    assert data.class_names == ["a", "b"]
    lazy = load_images(**where, channels=1, resolution=(8, 8), **LAZY)
    assert torch.equal(lazy.batch(torch.tensor([1, 0]))[0], data.images.flip(0))
    one_file = load_images(
        train_data_dir=str(tmp_path / "set" / "train.parquet"), channels=1, cache_dir=str(tmp_path / "cache")
    )
    assert torch.equal(one_file.images, data.images)


def test_parquet_not_written_by_datasets(tmp_path):
    table = datasets.Dataset.from_dict({"image": [{"bytes": png_bytes(9), "path": "9.png"}], "label": ["x"]})
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "a.parquet")
    data = load_images(train_data_dir=str(tmp_path / "set"), channels=1, cache_dir=str(tmp_path / "cache"))
    assert levels(data.images) == [9]
    assert data.class_names == ["x"]


@pytest.mark.parametrize(
    ("column", "expected", "names"),
    [
        (None, [0, 1, 0], ["cat", "dog"]),
        ("number", [1, 0, 2], ["3", "10", "20"]),
        ("word", [2, 0, 1], ["left", "right", "up"]),
        ("kind", [0, 1, 0], ["cat", "dog"]),
    ],
)
def test_label_columns(tmp_path, column, expected, names):
    write_parquet(
        tmp_path / "set",
        [png_bytes(level) for level in (1, 2, 3)],
        image="img",  # as CIFAR-10 calls it
        number=(datasets.Value("int32"), [10, 3, 20]),
        word=(datasets.Value("string"), ["up", "left", "right"]),
        kind=(datasets.ClassLabel(names=["cat", "dog"]), [0, 1, 0]),
    )
    data = load_images(dataset_name=str(tmp_path / "set"), label_column=column, cache_dir=str(tmp_path / "cache"))
    assert data.labels.tolist() == expected
    assert data.class_names == names


def test_columns_to_choose_from(tmp_path):
    features = datasets.Features(
        {
            "small": datasets.Image(),
            "large": datasets.Image(),
            "fine": AB,
            "coarse": AB,
            "score": datasets.Value("float32"),
        }
    )
    rows = {
        "small": [{"bytes": png_bytes(1)}],
        "large": [{"bytes": png_bytes(2)}],
        "fine": [0],
        "coarse": [-1],
        "score": [0.5],
    }
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    said = []
    common = {"dataset_name": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache"), "report": said.append}
    data = load_images(**common)
    assert levels(data.images) == [1]
    assert data.labels.tolist() == [0]
    assert ["small, large" in said[0], "fine, coarse" in said[1]] == [True, True]
    assert levels(load_images(**common, image_column="large").images) == [2]
    for options, message in (
        (
            {"image_column": "lage"},
            r"image_column='lage' is no column of images.*did you mean 'large'.*: small, large",
        ),
        ({"label_column": "finest"}, "label_column='finest' is no column of labels"),
        ({"image_column": "score"}, "'score' is no column of images"),
        ({"label_column": "score"}, r"'score' is no column of labels \(whole numbers or strings\)"),
        ({"label_column": "coarse"}, "1 of 1 images .* have no label in 'coarse'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(**common, **options)


def test_bad_and_missing_images_of_a_table_are_named(tmp_path):
    write_parquet(tmp_path / "set", [png_bytes(1), b"hello", png_bytes(3)])
    where = {"dataset_name": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache"), "channels": 1}
    with pytest.raises(ValueError, match=r"1 of 3 images: image 1 of .*begins with b'hello'"):
        load_images(**where)
    said = []
    assert levels(load_images(**where, on_bad_image="skip", report=said.append).images) == [1, 3]
    assert len(said) == 1


def write_plain_parquet(folder, **columns):
    """As other programs than `datasets` write it: only values."""
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(folder / "train.parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_are_missing_from_a_table_are_refused_as_unreadable(tmp_path, streaming):
    images = [{"bytes": png_bytes(1), "path": "1.png"}, {"bytes": None, "path": None}, None]
    write_plain_parquet(tmp_path / "set", image=images)
    where = {"dataset_name": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache"), "channels": 1}
    where |= {"resolution": (8, 8), "streaming": streaming}

    def read(**options):
        data = load_images(**where, **options)
        return data.take(3) if streaming else data

    with pytest.raises(ValueError, match=r"image 1 of .*the file is empty"):
        read()
    said = []
    assert levels(read(on_bad_image="skip", report=said.append).images) == [1]
    assert len(said) == 2


def test_dataset_without_images_or_that_does_not_exist(tmp_path):
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(tmp_path / "set" / "train.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"no column of .* holds images; its columns are x"):
            load_images(dataset_name=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"), streaming=streaming)
        with pytest.raises(ValueError, match="cannot load the dataset"):
            load_images(dataset_name=str(tmp_path / "nowhere"), streaming=streaming)


# ---------------------------------------------------------------------- streams

N = 50


@pytest.fixture
def shards(tmp_path):
    """50 images, told apart by their level, in three parquet files."""
    for file, part in enumerate(np.array_split(np.arange(N), 3)):
        write_parquet(
            tmp_path / "shards",
            [png_bytes(int(level)) for level in part],
            file=f"part-{file}.parquet",
            label=(AB, (part % 2).tolist()),
        )
    return tmp_path / "shards"


def stream(folder, **options):
    options = {"channels": 1, "resolution": (8, 8), "shuffle_buffer": 10, "streaming": True, **options}
    return load_images(dataset_name=str(folder), **options)


def run(data, steps, total=8, seed=0, rows=None):
    return [levels(data.batch_at(step, rows or range(total), total, seed)[0]) for step in steps]


def test_a_stream_gives_every_image_once_an_epoch_in_a_new_order(shards):
    data = stream(shards)
    assert isinstance(data, StreamedImages)
    assert (data.class_names, data.image_shape, data.num_images) == (["a", "b"], (1, 8, 8), None)
    seen = list(chain.from_iterable(run(data, range(25))))  # 200 images, 4 epochs
    epochs = [seen[start : start + N] for start in range(0, 200, N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert data.num_images == N
    images, labels = data.batch_at(3, range(8), 8, 0)
    assert labels.tolist() == [level % 2 for level in levels(images)]
    assert run(stream(shards), range(6)) == run(stream(shards), range(6))
    assert run(stream(shards), range(6), seed=1) != run(stream(shards), range(6))


def test_a_stream_resumes_without_decoding_what_it_skips(shards, monkeypatch):
    whole = run(stream(shards), range(20))
    decoded = []
    original = ddpm_hf.data.decoding.read_image
    monkeypatch.setattr(ddpm_hf.data.decoding, "read_image", lambda *args: decoded.append(1) or original(*args))
    for start in (1, 5, 6, 7, 13, 19):  # also beyond the first and the second epoch
        decoded.clear()
        assert run(stream(shards), range(start, min(start + 2, 20))) == whole[start : start + 2]
        assert len(decoded) == 8 * len(whole[start : start + 2])
    data = stream(shards)  # back and forth, too
    assert run(data, (9, 2, 18, 3, 3)) == [whole[step] for step in (9, 2, 18, 3, 3)]


def test_a_stream_is_cut_into_processes_and_micro_batches(shards):
    whole = run(stream(shards), range(9))
    first, second = stream(shards), stream(shards)
    for step in range(9):
        assert run(first, [step], rows=range(4))[0] + run(second, [step], rows=range(4, 8))[0] == whole[step]
    one = stream(shards)
    parts = [[run(one, [step], rows=range(at, at + 2))[0] for at in (0, 2, 4, 6)] for step in range(9)]
    assert [list(chain.from_iterable(part)) for part in parts] == whole


def test_what_is_held_out_of_a_stream_is_never_streamed(shards):
    held_out = set(levels(stream(shards, validation_split=0.3, split="validation").take(N).images))
    assert 5 <= len(held_out) <= 25
    train = stream(shards, validation_split=0.3)
    seen = set(chain.from_iterable(run(train, range(15))))
    assert seen | held_out == set(range(N))
    assert not seen & held_out
    assert train.num_images == N - len(held_out)
    nothing = load_images(train_data_dir=str(shards), split="validation", streaming=True, resolution=(8, 8))
    for empty in (nothing, stream(shards, validation_split=1e-9, split="validation")):
        with pytest.raises(ValueError, match="no images in this split"):
            empty.batch_at(0, range(4), 4, 0)
    with pytest.raises(ValueError, match=r"cannot load the dataset .* Bad split: validation"):
        stream(shards, split="validation")  # the dataset's own, where nothing is held out of `train`


def test_the_beginning_of_a_stream_in_memory(shards):
    data = stream(shards).take(20)
    assert isinstance(data, ImageDataset)
    assert levels(data.images) == list(range(20))
    assert data.labels.tolist() == [0, 1] * 10
    assert data.class_names == ["a", "b"]
    assert len(stream(shards).take(1000)) == N


def test_bad_images_of_a_stream(tmp_path):
    images = [png_bytes(level) if level % 5 else b"hello" for level in range(1, 21)]
    write_parquet(tmp_path / "set", images)
    with pytest.raises(ValueError, match=r"cannot read [1-4] of 20 images: image \d+ of the shuffled stream"):
        run(stream(tmp_path / "set"), [0], total=20)
    with pytest.raises(ValueError, match="image 4 of the stream"):
        stream(tmp_path / "set").take(6)
    said = []
    data = stream(tmp_path / "set", on_bad_image="skip", report=said.append)
    epoch = run(data, range(5), total=4)
    assert set(chain.from_iterable(epoch)) == {level for level in range(1, 21) if level % 5}
    assert len(set(said)) == len(said) == 4
    for start in range(5):  # after a restart the same replacements
        assert (
            run(stream(tmp_path / "set", on_bad_image="skip", report=said.append), [start], total=4)[0] == epoch[start]
        )
    assert levels(data.take(6).images) == [1, 2, 3, 4, 6, 7]
    write_parquet(tmp_path / "bad", [b"hello"] * 20)
    with pytest.raises(ValueError, match=r"100 images .* in a row"):
        run(stream(tmp_path / "bad", on_bad_image="skip", report=said.append), [0])


@pytest.mark.parametrize("missing", [None, -1])
def test_a_stream_in_which_labels_are_missing(tmp_path, missing):
    write_parquet(tmp_path / "set", [png_bytes(level) for level in range(4)], label=(AB, [0, 1, missing, 1]))
    said = []
    data = stream(tmp_path / "set", report=said.append)
    images, labels = data.batch_at(0, range(4), 4, 0)
    assert sorted(levels(images)) == [0, 1, 2, 3]  # who needs no labels does not lose images
    assert labels is None
    assert data.take(4).labels is None
    assert data.take(2).labels.tolist() == [0, 1]
    assert len(said) == 1
    assert "have no label, so none of them has one here" in said[0]
    asked = stream(tmp_path / "set", label_column="label")
    with pytest.raises(ValueError, match=r"1 of 4 images of the stream .* have no label in 'label'.*label_column"):
        asked.batch_at(0, range(4), 4, 0)
    with pytest.raises(ValueError, match="have no label"):
        asked.take(3)


@pytest.fixture
def archive(tmp_path):
    """A dataset that is a zip file of images, of which a stream knows only where they are."""
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "images.zip", "w") as file:
        for level in range(12):
            file.writestr(f"{level:02d}.png", png_bytes(level))
    return tmp_path / "zipped"


def test_images_at_urls_are_streamed(archive):
    row = next(iter(stream(archive)._stream))["image"]
    assert row["bytes"] is None
    assert row["path"].startswith("zip://")
    assert levels(stream(archive).take(12).images) == list(range(12))
    assert sorted(run(stream(archive), [0], total=12)[0]) == list(range(12))
    assert run(stream(archive, validation_split=0.4), [0, 1]) == run(stream(archive, validation_split=0.4), [0, 1])


def test_what_is_held_out_depends_on_the_bytes_alone(archive, tmp_path):
    (tmp_path / "plain").mkdir()
    with zipfile.ZipFile(archive / "images.zip") as file:
        file.extractall(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "moved" / "elsewhere")
    write_parquet(tmp_path / "table", [png_bytes(level) for level in range(12)])
    places = [archive, tmp_path / "plain", tmp_path / "moved" / "elsewhere", tmp_path / "table"]
    for split in ("train", "validation"):
        found = [levels(stream(p, validation_split=0.4, split=split).take(12).images) for p in places]
        assert 2 <= len(found[0]) <= 10
        assert all(sorted(other) == sorted(found[0]) for other in found)


def test_nothing_is_read_beforehand_where_all_images_belong(archive, monkeypatch):
    import ddpm_hf.data.streams

    monkeypatch.setattr(ddpm_hf.data.streams, "read_bytes", lambda source: pytest.fail("it was read"))
    assert len(stream(archive).take(12)) == 12


def test_random_crops_of_a_stream_are_a_function_of_seed_and_position(tmp_path):
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(10):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (8, 30)).astype(np.uint8)).save(buffer, format="PNG")
        pictures.append(buffer.getvalue())
    write_parquet(tmp_path / "wide", pictures)

    def batch(step, rows=range(5), **options):
        return stream(tmp_path / "wide", **options).batch_at(step, rows, 5, 3)[0]

    assert torch.equal(batch(1, crop="random"), batch(1, crop="random"))
    assert torch.equal(batch(1, range(2, 4), crop="random"), batch(1, crop="random")[2:4])
    assert not torch.equal(batch(1, crop="random"), batch(1))


def test_streams_that_are_refused(shards, folder):
    with pytest.raises(ValueError, match="choose one size with resolution"):
        stream(shards, resolution=None)
    with pytest.raises(ValueError, match="streaming is for dataset_name"):
        load_images(train_data_dir=str(folder), streaming=True)
    with pytest.raises(ValueError, match="streaming is for dataset_name"):
        load_images(dataset="digits", streaming=True)
    with pytest.raises(ValueError, match="shuffle_buffer must be at least 1"):
        stream(shards, shuffle_buffer=0)
    write_parquet(shards.parent / "words", [png_bytes(1)], label=(datasets.Value("string"), ["x"]))
    assert stream(shards.parent / "words").batch_at(0, range(1), 1, 0)[1] is None
    with pytest.raises(ValueError, match="does not say which classes there are"):
        stream(shards.parent / "words", label_column="label")


def test_a_folder_of_parquet_files_is_streamed_too(shards):
    by_name = run(stream(shards), range(3))
    data = load_images(train_data_dir=str(shards), channels=1, resolution=(8, 8), streaming=True, shuffle_buffer=10)
    assert run(data, range(3)) == by_name


# ---------------------------------------------------------------------- the entry point


@pytest.mark.parametrize("options", [{}, {"resolution": (8, 8), **LAZY}], ids=["memory", "lazy"])
def test_held_out_share_is_never_in_training(tmp_path, options):
    for level in range(20):
        write_png(tmp_path / f"{level:02d}.png", level)
    common = {"train_data_dir": str(tmp_path), "channels": 1, "validation_split": 0.25, **options}
    parts = [load_images(split=split, **common) for split in ("train", "validation")]
    train, held_out = (levels(data.batch(torch.arange(len(data)))[0]) for data in parts)
    assert len(held_out) == 5
    assert sorted(train + held_out) == list(range(20))


def test_a_bad_image_moves_no_other_into_training(tmp_path):
    for level in range(20):
        write_png(tmp_path / f"{level:02d}.png", level)
    common = {"train_data_dir": str(tmp_path), "channels": 1, "validation_split": 0.25}
    held_out = levels(load_images(split="validation", **common).images)
    (tmp_path / "00.png").write_text("hello")
    train = load_images(split="train", on_bad_image="skip", report=lambda message: None, **common)
    assert not set(levels(train.images)) & set(held_out)


def test_digits_can_be_had_in_colour_and_larger():
    data = load_images(dataset="digits", channels=3, resolution=(16, 16), split="validation")
    assert data.images.shape == (296, 3, 16, 16)
    assert data.class_names == [str(digit) for digit in range(10)]
    assert torch.equal(data.labels, load_digits("validation").labels)
    assert load_images(dataset="digits", channels=1, resolution=(8, 6)).images.shape == (1501, 1, 8, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"dataset": "digits", "train_data_dir": "x"}, "got 2"),
        ({"dataset": "digit"}, "did you mean 'digits'"),
        ({"dataset": "digits", "validation_split": 1.5}, "1.5"),
        ({"dataset": "digits", "split": "test"}, "not 'test'"),
        ({"train_data_dir": "x", "split": "test"}, "train or validation, got 'test'"),
        ({"dataset": "digits", "crop": "centre"}, r"crop must be one of center, random.*did you mean 'center'"),
        ({"dataset": "digits", "on_bad_image": "ignore"}, "on_bad_image must be one of error, skip"),
        ({"dataset": "digits", "num_workers": -1}, "num_workers must be at least 0"),
        ({"dataset": "digits", "background": "whit"}, "background must be a colour"),
    ],
)
def test_bad_choices(options, message):
    with pytest.raises(ValueError, match=message):
        load_images(**options)


def test_labels_that_only_some_array_files_have(tmp_path):
    images = np.zeros((2, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1]))
    np.savez(tmp_path / "b.npz", images=images)
    said: list[str] = []
    data = load_images(train_data_dir=str(tmp_path), channels=1, report=said.append)
    assert data.labels is None
    assert len(said) == 1
    assert "2 of 4 images have no label in the array files of" in said[0]


def test_labels_in_array_files_are_not_replaced_by_their_folders(tmp_path):
    for part, labels in (("part0", [7, 5]), ("part1", [5, 10])):
        (tmp_path / "set" / part).mkdir(parents=True)
        images = np.full((2, 4, 4, 3), labels[0], np.uint8)
        np.savez(tmp_path / "set" / part / "a.npz", images=images, labels=np.array(labels))
    data = load_folder(tmp_path / "set")
    assert [data.class_names[label] for label in data.labels] == ["7", "5", "5", "10"]
