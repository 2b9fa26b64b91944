"""Where images come from, not decoded yet: image files, arrays, tables; and their labels.

A [`Source`] gives the raw images of any rows; `image_decoding.py` makes pixels of them. `open_folder` finds out what a
folder holds, and refuses what is not read with a sentence that says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..utils.errors import UserError
from .class_labels import sorted_names
from .decoding import Reading
from .files import ARRAY_SUFFIXES, open_arrays
from .folders import LABEL_FILE, Listing, few, list_folder, read_label_file
from .tables import bytes_or_path, choose_columns, is_saved_table, open_table
from .tensors import ImageDataset

_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
# What `datasets` reads columns from in a folder of images.
_METADATA = ("metadata.csv", "metadata.jsonl")
_SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


class Source:
    """Images that have not been decoded yet.

    Attributes:
        name: Of the dataset.
        labels: `[N]` int64, or `None`.
        class_names: One for each label, or `None`.
    """

    name: str
    labels: Tensor | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def where(self, row: int) -> str:
        """What to call one image in a message."""
        return f"image {row} of {self.name}"

    def fetch(self, rows: list[int]) -> list[Any]:
        """What `read_image` or `read_array` takes, for each of `rows`."""
        raise NotImplementedError


class _Files(Source):
    """Image files."""

    def __init__(self, name: str, paths: list[Path]):
        self.name, self.paths = name, paths

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, row: int) -> str:
        return str(self.paths[row])

    def fetch(self, rows: list[int]) -> list[Any]:
        return [self.paths[row] for row in rows]


class _Arrays(Source):
    """Stacks of images in `.npy` and `.npz` files, one after the other."""

    def __init__(self, name: str, paths: list[Path], stacks: list[np.ndarray]):
        self.name, self.paths, self.stacks = name, paths, stacks
        self.ends = np.cumsum([len(stack) for stack in stacks])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _place(self, row: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.ends, row, side="right"))
        return file, row - int(self.ends[file] - len(self.stacks[file]))

    def where(self, row: int) -> str:
        file, inside = self._place(row)
        return f"image {inside} of {self.paths[file]}" if len(self.stacks[file]) > 1 else str(self.paths[file])

    def fetch(self, rows: list[int]) -> list[Any]:
        return [self.stacks[file][inside] for file, inside in map(self._place, rows)]


class _Rows(Source):
    """A table of `datasets`, whose image column gives bytes or paths."""

    def __init__(self, name: str, table: Any, column: str):
        self.name, self.table, self.column = name, table, column

    def __len__(self) -> int:
        return len(self.table)

    def fetch(self, rows: list[int]) -> list[Any]:
        return [bytes_or_path(value) for value in self.table[rows][self.column]]


class Tensors(Source):
    """Grey images in memory, to be given other channels or another size."""

    def __init__(self, data: ImageDataset):
        self.name, self.labels, self.class_names = data.name, data.labels, data.class_names
        self.images = data.images[:, 0].numpy()

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, rows: list[int]) -> list[Any]:
        return [Image.fromarray(self.images[row]) for row in rows]


# ---------------------------------------------------------------------- labels


def _number_labels(values: Sequence[Any], where: str) -> tuple[Tensor, list[str]]:
    """Class indices 0, 1, ... of whole numbers or strings, in their order (see `sorted_names`).

    Raises:
        ValueError: A missing label, or something else than numbers and strings.
    """
    kinds = {type(value) for value in values}
    if not kinds <= {int} and not kinds <= {str}:
        strange = next(value for value in values if not isinstance(value, int | str)) if kinds - {int, str} else "both"
        raise UserError(f"labels are whole numbers or strings, and {where} has {strange!r}")
    names = sorted_names({str(value) for value in values})
    index = {name: i for i, name in enumerate(names)}
    return torch.tensor([index[str(value)] for value in values], dtype=torch.long), names


def _label_first_folders(
    source: Source, root: Path, paths: list[Path], folders: list[str], report: Callable[[str], None]
) -> None:
    """Labels from the names of the first-level folders, if every image is in one and there are several.

    Args:
        source: Is given the labels.
        root: The folder.
        paths: The file of each image.
        folders: The first-level folders, some of which may hold no images.
        report: Is called with a warning where some images have no class, or some folders no images.
    """
    outside = [path for path in paths if path.parent == root]
    if not outside:
        labels, names = _number_labels([path.relative_to(root).parts[0] for path in paths], str(root))
        if len(names) > 1:
            source.labels, source.class_names = labels, names
            if empty := sorted(set(folders) - set(names)):
                report(f"no images are in {', '.join(empty)} in {str(root)!r}, so these are no classes")
    elif len({path.relative_to(root).parts[0] for path in paths if path.parent != root}) > 1:
        report(
            f"{len(outside)} of {len(paths)} images in {str(root)!r} are in no folder ({few(outside, root)}), so none "
            "of them has a class here"
        )


def _label_by_file(
    source: Source, root: Path, paths: list[Path], given: dict[str, int | str], files: list[Path], reading: Reading
) -> None:
    """Labels from `dataset.json`.

    Args:
        source: Is given the labels.
        root: The folder.
        paths: The file of each image.
        given: Labels by the files' paths in the folder; none if it is empty.
        files: All files that are there, readable or not.
        reading: Whether missing files are an error.

    Raises:
        UserError: Labels of files that are not there, or of several images in one file.
    """
    where = repr(str(root / LABEL_FILE))
    if not given:
        return
    names = [path.relative_to(root).as_posix() for path in paths]
    if gone := sorted(set(given) - {path.relative_to(root).as_posix() for path in files}):
        said = f"{where} has labels of {len(gone)} file(s) that are not there: {', '.join(gone[:3])}"
        said += " ..." if len(gone) > 3 else ""
        if reading.on_bad_image == "error":
            raise UserError(f"{said}; fix it, or leave them out with --on_bad_image skip")
        reading.report(f"left out: {said}")
    if len(set(names)) < len(names):
        raise UserError(f"{where} has one label per file, and some files of arrays hold several images")
    if bare := [path for path, name in zip(paths, names, strict=True) if name not in given]:
        reading.report(
            f"{len(bare)} of {len(paths)} images have no label in {where} ({few(bare, root)}), so none has one here"
        )
    else:
        source.labels, source.class_names = _number_labels([given[name] for name in names], where)


# ---------------------------------------------------------------------- folders and files


def open_folder(folder: Path, reading: Reading) -> Source | None:
    """What is in a folder; `None` for parquet files and what `save_to_disk` wrote, which `datasets` reads.

    Raises:
        ValueError: There is no such folder, no images are in it or several kinds of files, it is of a kind that is not
            read, or its arrays cannot be read.
    """
    shown = repr(str(folder))
    if folder.is_file():
        return _open_single_file(folder, reading)
    if not folder.is_dir():
        raise UserError(f"the image folder {shown} does not exist")
    if is_saved_table(folder):
        return None
    Image.init()
    readable = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    listing = list_folder(folder)
    paths = sorted([*listing.files, *_links_to_nothing(folder, listing, reading, {*readable, *ARRAY_SUFFIXES})])
    images, arrays, parquet, others = _by_kind(paths, readable)
    kinds = [kind for kind in (images, arrays, parquet) if kind]
    if len(kinds) > 1:
        examples = ", ".join(str(kind[0].relative_to(folder)) for kind in kinds)
        raise UserError(f"{shown} holds images in several kinds of files ({examples}); keep one kind in the folder")
    if not kinds:
        archives = [path.name for path in others if path.suffix.lower() in _ARCHIVES]
        raise UserError(
            f"no images in {shown}; "
            + (
                f"it holds the archive {archives[0]}: unpack it first"
                if archives
                else "it should hold files such as .png or .jpg, or folders of them"
            )
        )
    labels = None if parquet else read_label_file(folder)
    hidden = [path for path in listing.hidden if path.suffix.lower() in readable and not path.name.startswith("._")]
    _report_left_out(folder, others, hidden, listing.loops, labels is not None, reading.report)
    if parquet:
        return None
    files = images or arrays
    first = {path.relative_to(folder).parts[0].lower() for path in files if path.parent != folder}
    if labels is None and len(first) > 1 and first <= _SPLIT_NAMES:
        raise UserError(
            f"the folders {', '.join(sorted(first))} in {shown} look like splits, not classes; name the one to use, "
            f"for example {str(folder / sorted(first, key=lambda name: 'train' not in name)[0])!r}"
        )
    name = folder.resolve().name
    source = _Files(name, images) if images else _open_arrays(name, arrays, reading)
    paths = files
    if isinstance(source, _Arrays):
        paths = [path for path, stack in zip(source.paths, source.stacks, strict=True) for _ in stack]
    if labels is not None:
        _label_by_file(source, folder, paths, labels, files, reading)
    elif source.labels is None:  # labels in array files say more than the folders that these are in
        _label_first_folders(source, folder, paths, listing.folders, reading.report)
    return source


def _by_kind(paths: list[Path], readable: set[str]) -> tuple[list[Path], list[Path], list[Path], list[Path]]:
    """Files by their endings: images (of the endings `readable`), arrays, parquet files, others.

    Raises:
        UserError: A file of a kind that is not read and says where to go instead.
    """
    images: list[Path] = []
    arrays: list[Path] = []
    parquet: list[Path] = []
    others: list[Path] = []
    for path in paths:
        suffix = path.suffix.lower()
        if path.name == "data.mdb":
            raise UserError(
                f"{str(path)!r} is an LMDB database, as LSUN comes; export it to a folder, its values are image "
                "files: for key, value in lmdb.open(DB, readonly=True, lock=False).begin().cursor(): "
                "(folder / (key.decode() + '.jpg')).write_bytes(value)"
            )
        if path.name.startswith(("data_batch_", "test_batch")) and suffix not in readable:
            raise UserError(
                f"{str(path)!r} looks like CIFAR-10's Python version, whose files are pickles, and those are never "
                "read; take the dataset from the Hub (--dataset_name), or as image files or .npy arrays"
            )
        kind = others
        if suffix in readable:
            kind = images
        elif suffix in ARRAY_SUFFIXES:
            kind = arrays
        elif suffix == ".parquet":
            kind = parquet
        kind.append(path)
    return images, arrays, parquet, others


def _links_to_nothing(folder: Path, listing: Listing, reading: Reading, suffixes: set[str]) -> list[Path]:
    """Links to files that are not there: those that would be images, to be reported as such when they are read.

    Raises:
        UserError: There are some, and they are not to be skipped.
    """
    gone = listing.dangling
    if gone and reading.on_bad_image == "error":
        named = ", ".join(f"{path.relative_to(folder)} -> {path.readlink()}" for path in gone[:20])
        more = f" and {len(gone) - 20} more" if len(gone) > 20 else ""
        raise UserError(
            f"{len(gone)} link(s) in {str(folder)!r} lead to nothing: {named}{more}; fix or remove them, or leave "
            "them out with --on_bad_image skip"
        )
    images = [path for path in gone if path.suffix.lower() in suffixes]
    for path in gone:
        if path not in images:
            reading.report(f"left out {path}: a link to {path.readlink()}, which is not there")
    return images


def _report_left_out(
    folder: Path,
    others: list[Path],
    hidden: list[Path],
    loops: list[Path],
    labelled: bool,
    report: Callable[[str], None],
) -> None:
    """Say what in a folder is not read, and why; `labelled` if the labels are read from its `dataset.json`."""
    shown = repr(str(folder))
    others = [path for path in others if not (labelled and path == folder / LABEL_FILE)]
    if tables := [path for path in others if path.name in _METADATA]:
        report(
            f"{few(tables, folder)} in {shown} is not read; --dataset_name {shown} takes images and columns from it"
        )
        others = [path for path in others if path not in tables]
    for paths, what in (
        (others, "file(s) in {} are not images by their ending, and were left alone"),
        (hidden, "hidden image(s) in {} were left out"),
        (loops, "link(s) in {} lead back to a folder above them, and were not followed"),
    ):
        if paths:
            report(f"{len(paths)} {what.format(shown)}: {few(paths, folder)}")


def _open_single_file(path: Path, reading: Reading) -> Source | None:
    suffix = path.suffix.lower()
    if suffix in ARRAY_SUFFIXES:
        return _open_arrays(path.stem, [path], reading, stack_only=True)
    if suffix == ".parquet":
        return None
    what = "is a file, not a folder"
    if suffix in _ARCHIVES:
        what = "is an archive; unpack it first, and name the folder"
    elif suffix in (".mdb", ".pkl", ".pickle", ".pt", ".pth"):
        what = "is a file of a kind that is not read; export its images as files or as a .npy array"
    raise UserError(f"the image folder {str(path)!r} {what}")


def _open_arrays(name: str, paths: list[Path], reading: Reading, stack_only: bool = False) -> _Arrays:
    opened, stacks, labels = [], [], []
    bad: list[tuple[str, ValueError]] = []
    for path in paths:
        try:
            stack, its_labels = open_arrays(path, reading.form, stack_only)
        except ValueError as reason:
            bad.append((str(path), reason))
            continue
        opened.append(path)
        stacks.append(stack)
        labels.append(its_labels)
    if bad and (reading.on_bad_image == "error" or not opened):
        raise UserError(
            f"cannot read {len(bad)} of {len(paths)} array files: " + "; ".join(f"{p} ({error})" for p, error in bad)
        )
    for where, error in bad:
        reading.report(f"left out {where}: {error}")
    source = _Arrays(name, opened, stacks)
    given = [values for values in labels if values is not None]
    if len(given) == len(labels):
        source.labels, source.class_names = _number_labels(np.concatenate(given).tolist(), name)
    elif given:
        reading.report(
            f"{len(labels) - len(given)} of {len(labels)} array files of {name} have no labels, so none has here"
        )
    return source


# ---------------------------------------------------------------------- tables


def _report_image_folder(folder: Path, num_rows: int, labelled: bool, report: Callable[[str], None]) -> None:
    """Say what `datasets` leaves out of a folder of image files: files without a row, classes where some have none."""
    Image.init()
    images = [path for path in list_folder(folder).files if path.suffix.lower() in Image.EXTENSION]
    table = next((path for path in map(folder.joinpath, _METADATA) if path.is_file()), None)
    if table is not None and num_rows < len(images):
        report(
            f"{len(images) - num_rows} of {len(images)} images in {str(folder)!r} are not in {table.name}: left out"
        )
    parts = {path.relative_to(folder).parts[0] for path in images if path.parent != folder}
    outside = [path for path in images if path.parent == folder]
    if not labelled and table is None and outside and len(parts) > 1:
        report(
            f"{len(outside)} of {len(images)} images in {str(folder)!r} are in no folder ({few(outside, folder)}), so "
            "none of them has a class here"
        )


def open_rows(
    name: str,
    split: str,
    config_name: str | None,
    cache_dir: str | None,
    image_column: str | None,
    label_column: str | None,
    report: Callable[[str], None],
) -> Source:
    """The images and labels of one split of a table of `datasets`; see `load_images` for the arguments.

    Raises:
        ValueError: The dataset cannot be loaded, has no images or no such columns, or images without a label in the
            column that was asked for.
    """
    import datasets

    data = open_table(name, split, config_name, cache_dir, streaming=False)
    image, label = choose_columns(name, data.features, image_column, label_column, report)
    if not len(data):
        raise UserError(f"the dataset {name!r} has no images in split {split!r}")
    if Path(name).is_dir() and not is_saved_table(Path(name)):
        _report_image_folder(Path(name), len(data), label is not None, report)
    # Bytes instead of decoded images: what datasets would decode has lost 16-bit levels and alpha by then.
    raw = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    source = _Rows(name, raw, image)
    if label is not None:
        values = data.select_columns([label])[:][label]
        feature = data.features[label]
        unlabelled = sum(value is None or (isinstance(value, int) and value < 0) for value in values)
        if unlabelled and label_column is not None:
            raise UserError(f"{unlabelled} of {len(values)} images of {name!r} have no label in {label!r}")
        if unlabelled:
            report(f"{unlabelled} of {len(values)} images of {name!r} have no label, so none of them has one here")
        elif isinstance(feature, datasets.ClassLabel):
            source.labels, source.class_names = torch.tensor(values, dtype=torch.long), list(feature.names)
        else:
            source.labels, source.class_names = _number_labels(values, f"the column {label!r}")
    return source
