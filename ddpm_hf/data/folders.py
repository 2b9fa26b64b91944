"""Folders of image files or arrays, and single array files; links are followed, labels come from folders or files.

`open_folder` finds out what a folder holds. What is not read raises a `UserError` that says what to do.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset

from ..utils.errors import UserError, in_one_line
from .class_labels import number_labels
from .decoding import DecodeOptions, leave_out_bad
from .tensors import Source

_LABEL_FILE = "dataset.json"  # what StyleGAN's and EDM's tools write labels to
_SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
# Names of the images and of their labels in .npz files: the plain ones, and those that numpy.savez makes up.
_IMAGE_KEYS, _LABEL_KEYS = ("images", "arr_0"), ("labels", "arr_1")
# Names of files that are known, and not read, and what to do with them.
_REFUSED = {
    r"\.(zip|tar|tgz|gz|bz2|xz|7z|rar|zst)": "an archive; unpack it first, and name the folder",
    r"data\.mdb": "an LMDB database, as LSUN comes; write its values into files (docs/images.md says how)",
    r"(data|test)_batch(_\d)?": "CIFAR-10 as pickles, and those are never read; take it from the Hub (--dataset_name)",
}


class Listing(NamedTuple):
    """The entries of a folder and its subfolders."""

    files: list[Path]
    linked: list[Path]  # links to folders, which were entered
    loops: list[Path]  # links to a folder that they are in, which were not
    dangling: list[Path]  # links to nothing


def list_folder(folder: Path) -> Listing:
    """List all files of a folder and its subfolders, through links, but nothing hidden (`.name`, `__MACOSX`)."""
    found, folders = Listing([], [], [], []), [folder]
    while folders:
        here = folders.pop()
        try:
            entries = list(os.scandir(here))
        except OSError as error:
            raise UserError(f"cannot list the image folder {str(here)!r}: {error.strerror}") from None
        for entry in entries:
            path, linked = here / entry.name, entry.is_symlink()
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if linked and not os.path.exists(path):
                found.dangling.append(path)
            elif not entry.is_dir():
                found.files.append(path)
            elif linked and _leads_back(path):
                found.loops.append(path)
            else:
                folders.append(path)
                found.linked.extend([path] * linked)
    return Listing(*map(sorted, found))


def _leads_back(link: Path) -> bool:
    """Return whether a link leads to a folder that it is in, perhaps through other links."""
    real, above = link.resolve(), [folder.resolve() for folder in link.parents]
    return any(real == folder or real in folder.parents for folder in above)


def few(paths: list[Path], folder: Path) -> str:
    """Return the first of some paths in a folder, for messages."""
    return ", ".join(str(path.relative_to(folder)) for path in paths[:3]) + (" ..." if len(paths) > 3 else "")


def is_saved_table(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def image_suffixes() -> set[str]:
    """Return the endings of the files that Pillow opens."""
    Image.init()
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}


def open_folder(folder: Path, options: DecodeOptions) -> Source | None:
    """Open a folder or an array file; `None` for what `datasets` reads: parquet, and what `save_to_disk` wrote."""
    shown, one_file = repr(str(folder)), folder.is_file()
    if not folder.exists():
        raise UserError(f"the image folder {shown} does not exist")
    if is_saved_table(folder):
        return None
    listing = Listing([folder], [], [], []) if one_file else list_folder(folder)
    if listing.dangling and options.on_bad_image == "error":
        what = f"{len(listing.dangling)} link(s) in {shown} lead to nothing: {few(listing.dangling, folder)}"
        raise UserError(f"{what}; fix or remove them, or leave them out with --on_bad_image skip")
    kinds: dict[str, list[Path]] = {"images": [], "arrays": [], "parquet": [], "others": []}
    of_suffix = dict.fromkeys(image_suffixes(), "images") | {".npy": "arrays", ".npz": "arrays", ".parquet": "parquet"}
    for path in sorted([*listing.files, *listing.dangling]):  # these are left out when they are read
        kinds[of_suffix.get(path.suffix.lower(), "others")].append(path)
    others = kinds.pop("others") + listing.loops
    found = {kind: paths for kind, paths in kinds.items() if paths}
    if not found or (one_file and "images" in found):
        for path in others:
            for name, advice in _REFUSED.items():
                if re.search(f"{name}$", path.name.lower()):
                    raise UserError(f"{str(path)!r} is {advice}")
        raise UserError(f"{shown} is neither a folder that holds images, such as .png or .jpg, nor an array file")
    if len(found) > 1:
        examples = ", ".join(str(paths[0].relative_to(folder)) for paths in found.values())
        raise UserError(f"{shown} holds several kinds of files ({examples}); keep one kind in the folder")
    labels = read_label_file(folder) if "images" in found else None
    if others := [path for path in others if labels is None or path != folder / _LABEL_FILE]:
        why = "they are no images by their ending, or lead back to a folder above them"
        options.report(f"{len(others)} file(s) or link(s) in {shown} were left out, as {why}: {few(others, folder)}")
    if "parquet" in found:
        return None
    if "arrays" in found:
        source, files = _open_arrays(folder, found["arrays"], options)
    else:
        files = found["images"]
        source = Source("", len(files), lambda rows: [files[row] for row in rows], lambda row: str(files[row]))
    source.name = folder.stem if one_file else folder.resolve().name
    parts = [path.relative_to(folder).parts for path in files]
    names = sorted({path[0] for path in parts if path[1:]})
    if labels is None and len(names) > 1 and {name.lower() for name in names} <= _SPLIT_NAMES:
        example = str(folder / min(names, key=lambda name: "train" not in name.lower()))
        named = f"the folders {', '.join(names)} in {shown}"
        raise UserError(f"{named} look like splits, not classes; name one, for example {example!r}")
    if labels:
        paths = ["/".join(path) for path in parts]
        if (gone := sorted(set(labels) - set(paths))) and options.on_bad_image == "error":
            what = f"{_LABEL_FILE} in {shown} has labels of {len(gone)} file(s) that are not there, such as {gone[0]}"
            raise UserError(f"{what}; fix it, or leave them out with --on_bad_image skip")
        label_images(source, [labels.get(path) for path in paths], f"{_LABEL_FILE} of {shown}", options)
    elif labels is None and source.labels is None and len(names) > 1:
        # Labels in array files say more than the folders that these are in.
        label_images(source, [path[0] if path[1:] else None for path in parts], f"the folders of {shown}", options)
    return source


def label_images(source: Source, labels: Sequence[Any], where: str, options: DecodeOptions) -> None:
    """Give a source labels, one per image, unless some are `None`, which is reported."""
    if not (missing := sum(label is None for label in labels)):
        source.labels, source.class_names = number_labels(labels, where)
    elif missing < len(labels):
        options.report(f"{missing} of {len(labels)} images have no label in {where}, so none of them has one here")


def read_label_file(folder: Path) -> dict[str, int | str] | None:
    """Read `dataset.json` as StyleGAN and EDM have it: `{"labels": [["00000/img00000000.png", 6], ...]}`.

    Returns labels by the images' paths in the folder, empty where it has none; `None` for no file, or one of another
    kind.
    """
    path = folder / _LABEL_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the labels in {str(path)!r}: {in_one_line(error)}") from None
    if not isinstance(content, dict) or "labels" not in content:
        return None
    pairs: Any = content["labels"] or []
    labels: dict[str, int | str] = {}
    for pair in pairs.items() if isinstance(pairs, dict) else pairs if isinstance(pairs, list) else [pairs]:
        match pair:
            case (str(name), int(label) | str(label)) if not isinstance(label, bool):
                name = PurePosixPath(name.replace("\\", "/")).as_posix()
                if labels.setdefault(name, label) != label:
                    raise UserError(f"{str(path)!r} has two labels for {name!r}: {labels[name]} and {label}")
            case _:
                wanted = "pairs of a file and its label, a whole number or a string"
                raise UserError(f"the labels in {str(path)!r} must be {wanted}, got {str(pair)[:80]}")
    return labels


def _open_arrays(folder: Path, paths: list[Path], options: DecodeOptions) -> tuple[Source, list[Path]]:
    """Return the images of array files, one file after the other, and the file of each image."""
    opened: list[tuple[Path, np.ndarray, np.ndarray | None]] = []
    bad: dict[str, ValueError] = {}
    for path in paths:
        try:
            opened.append((path, *open_arrays(path, options, stack_only=folder.is_file())))
        except ValueError as error:
            bad[str(path)] = error
    leave_out_bad(bad, len(paths), options, "array files")
    stacks: Any = [stack for _, stack, _ in opened]
    images: ConcatDataset[np.ndarray] = ConcatDataset(stacks)

    def where(row: int) -> str:
        file = bisect_right(images.cumulative_sizes, row)
        path, stack, _ = opened[file]
        return f"image {row + len(stack) - images.cumulative_sizes[file]} of {path}" if len(stack) > 1 else str(path)

    source = Source("", len(images), lambda rows: [images[row] for row in rows], where)
    labels = [[None] * len(stack) if labels is None else labels.tolist() for _, stack, labels in opened]
    label_images(source, [label for part in labels for label in part], f"the array files of {str(folder)!r}", options)
    return source, [path for path, stack, _ in opened for _ in stack]


def open_arrays(path: Path, options: DecodeOptions, stack_only: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Open the images of a `.npy` or `.npz` file as `[N, C, H, W]`, and their labels `[N]` if the file has them.

    One image (`HW`, `HWC`, `CHW`) is a stack of one, two-dimensional arrays not with `stack_only`. A `.npy` file is
    mapped into memory. Pickles are never read. A UserError gives the reason without the file's name.
    """
    labels = None
    try:
        if path.suffix.lower() == ".npz":
            if not zipfile.is_zipfile(path):  # numpy takes it for a pickle
                raise UserError("not a .npz file, or a truncated one")
            with np.load(path, allow_pickle=False) as members:
                keys = [key for key in _IMAGE_KEYS if key in members] or [k for k in members if k not in _LABEL_KEYS]
                if len(keys) != 1 and keys[:1] != ["images"]:
                    known = ", ".join(members) or "(none)"
                    raise UserError(f"it holds the arrays {known}; call the one with the images 'images'")
                images = members[keys[0]]
                labels = next((members[key] for key in _LABEL_KEYS if key in members), None)
        else:
            images = np.lib.format.open_memmap(path, mode="r")
    except MemoryError:
        raise
    except Exception as error:  # damaged headers end in SyntaxError, EOFError, zlib.error, ...
        raise UserError(in_one_line(error)) from None
    if images.dtype.kind not in "buif":
        raise UserError(f"its values are of type {images.dtype}, not numbers")
    images = _as_nchw(images, options, stack_only)
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iuU"):
        got = f"{labels.dtype} {labels.shape}"
        raise UserError(f"labels must be whole numbers or strings of shape ({len(images)},), got {got}")
    return images, labels


def _as_nchw(images: np.ndarray, options: DecodeOptions, stack_only: bool) -> np.ndarray:
    """Return a view `[N, C, H, W]` of a stack of images or of one image."""
    shape, channels = images.shape, options.channels
    if 0 in shape:
        raise UserError(f"its shape {shape} holds no pixels")
    first, last = (images.ndim in (3, 4) and shape[axis] == channels for axis in (-3, -1))
    if first and last:
        if options.array_layout is None:
            both = f"its shape {shape} has {channels} at either place for channels"
            raise UserError(f"{both}; say which it is with --array_layout CHW or HWC")
        first = options.array_layout == "CHW"
    if first or last:
        stack = images if images.ndim == 4 else images[None]
        return stack if first else stack.transpose(0, 3, 1, 2)
    if channels == 1 and images.ndim in ((3,) if stack_only else (2, 3)):  # N, H, W, or H, W
        return images.reshape(-1, 1, *shape[-2:])
    fits = f"[N, H, W, {channels}], [N, {channels}, H, W]" + (", [N, H, W]" if channels == 1 else "")
    one = "" if stack_only else ", or the same without N for one image"
    raise UserError(f"its shape {shape} does not fit in_channels={channels}; what does: {fits}{one}")
