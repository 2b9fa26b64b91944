"""Folders of image files or arrays, and single array files; links are followed, labels come from folders or files.

`open_folder` finds out what a folder holds. What is not read raises a `UserError` that says what to do.
"""

from __future__ import annotations

import json
import os
import zipfile
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset

from ..utils.errors import UserError, in_one_line
from .class_labels import number_labels
from .decoding import DecodeOptions, leave_out_bad
from .tensors import Source

ARRAY_SUFFIXES = (".npy", ".npz")
METADATA = ("metadata.csv", "metadata.jsonl")  # what `datasets` reads columns from in a folder of images
_LABEL_FILE = "dataset.json"  # what StyleGAN's and EDM's tools write labels to
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
# Names of the images and of their labels in .npz files: the plain ones, and those that numpy.savez makes up.
_IMAGE_KEYS, _LABEL_KEYS = ("images", "arr_0"), ("labels", "arr_1")


@dataclass
class Listing:
    """The entries of a folder and its subfolders."""

    files: list[Path] = field(default_factory=list)  # all but hidden ones, in the order of their paths
    folders: list[str] = field(default_factory=list)  # the names of the first-level folders
    linked: list[Path] = field(default_factory=list)  # links to folders, which were entered
    loops: list[Path] = field(default_factory=list)  # links to a folder that they are in, which were not
    dangling: list[Path] = field(default_factory=list)  # links to nothing
    hidden: list[Path] = field(default_factory=list)  # files whose name begins with a dot


def list_folder(folder: Path) -> Listing:
    """List all files of a folder and its subfolders, through links, but not in hidden ones (`.name`, `__MACOSX`)."""
    _list_into(found := Listing(), folder, [folder.resolve()])
    found.files.sort()
    return found


def _list_into(found: Listing, folder: Path, above: list[Path]) -> None:
    """List one folder; `above` are the real paths of the folders that it is in and of itself."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list the image folder {str(folder)!r}: {error.strerror}") from None
    for entry in listed:
        path, linked = folder / entry.name, entry.is_symlink()
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            if path.is_file():
                found.hidden.append(path)
        elif linked and not os.path.exists(path):
            found.dangling.append(path)
        elif entry.is_dir():
            real = path.resolve() if linked else above[-1] / entry.name
            if linked and any(real == other or real in other.parents for other in above):
                found.loops.append(path)
                continue
            if linked:
                found.linked.append(path)
            if len(above) == 1:
                found.folders.append(entry.name)
            _list_into(found, path, [*above, real])
        elif entry.is_file():
            found.files.append(path)


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
    shown = repr(str(folder))
    if folder.is_file():
        kinds = _by_kind([folder])
        if kinds["arrays"]:
            return _open_arrays(folder.stem, [folder], options, stack_only=True)[0]
        if kinds["parquet"]:
            return None
        if folder.suffix.lower() in _ARCHIVES:
            raise UserError(f"{shown} is an archive; unpack it first, and name the folder")
        raise UserError(f"{shown} is a file of a kind that is not read; name a folder of images, or an array file")
    if not folder.is_dir():
        raise UserError(f"the image folder {shown} does not exist")
    if is_saved_table(folder):
        return None
    listing = list_folder(folder)
    kinds = _by_kind(sorted([*listing.files, *_dangling_images(folder, listing.dangling, options)]))
    others = kinds.pop("others")
    if len(examples := [str(paths[0].relative_to(folder)) for paths in kinds.values() if paths]) > 1:
        raise UserError(f"{shown} holds several kinds of files ({', '.join(examples)}); keep one kind in the folder")
    if not examples:
        archive = next((path.name for path in others if path.suffix.lower() in _ARCHIVES), None)
        what = f"holds the archive {archive}: unpack it first" if archive else "should hold files such as .png or .jpg"
        raise UserError(f"no images in {shown}; it {what}")
    labels = None if kinds["parquet"] else read_label_file(folder)
    _report_left_out(folder, [p for p in others if labels is None or p != folder / _LABEL_FILE], listing, options)
    if kinds["parquet"]:
        return None
    files, name = kinds["images"] or kinds["arrays"], folder.resolve().name
    paths = files  # the file of each image
    first = sorted({path.relative_to(folder).parts[0] for path in files if path.parent != folder})
    if labels is None and len(first) > 1 and {part.lower() for part in first} <= _SPLIT_NAMES:
        example = min(first, key=lambda part: "train" not in part.lower())
        named = f"the folders {', '.join(first)} in {shown}"
        raise UserError(f"{named} look like splits, not classes; name one, for example {str(folder / example)!r}")
    if kinds["images"]:
        source = Source(name, len(files), lambda rows: [files[row] for row in rows], lambda row: str(files[row]))
    else:
        source, paths = _open_arrays(name, files, options)
    if labels is not None:
        _label_by_file(source, folder, paths, labels, files, options)
    # labels in array files say more than the folders that these are in
    elif source.labels is None and len(set(classes := first_folders(folder, paths, options) or [])) > 1:
        source.labels, source.class_names = number_labels(classes, shown)
        if empty := sorted(set(listing.folders) - set(classes)):
            options.report(f"no images are in {', '.join(empty)} in {shown}, so these are no classes")
    return source


def _dangling_images(folder: Path, dangling: list[Path], options: DecodeOptions) -> list[Path]:
    """Return the links to nothing that would be images: with `skip` they are left out when they are read."""
    if dangling and options.on_bad_image == "error":
        named = ", ".join(f"{path.relative_to(folder)} -> {path.readlink()}" for path in dangling[:20])
        more = f" and {len(dangling) - 20} more" if len(dangling) > 20 else ""
        what = f"{len(dangling)} link(s) in {str(folder)!r} lead to nothing: {named}{more}"
        raise UserError(f"{what}; fix or remove them, or leave them out with --on_bad_image skip")
    images = [path for path in dangling if path.suffix.lower() in {*image_suffixes(), *ARRAY_SUFFIXES}]
    for path in (path for path in dangling if path not in images):
        options.report(f"left out {path}: a link to {path.readlink()}, which is not there")
    return images


def _by_kind(paths: list[Path]) -> dict[str, list[Path]]:
    """Sort files by their endings into `images`, `arrays`, `parquet` and `others`; raise where one never is read."""
    kinds: dict[str, list[Path]] = {"images": [], "arrays": [], "parquet": [], "others": []}
    of_suffix = {".parquet": "parquet", **dict.fromkeys(ARRAY_SUFFIXES, "arrays")}
    of_suffix |= dict.fromkeys(image_suffixes(), "images")
    for path in paths:
        kind = of_suffix.get(path.suffix.lower(), "others")
        if path.name == "data.mdb":
            raise UserError(
                f"{str(path)!r} is an LMDB database, as LSUN comes; export it to a folder, its values are image "
                "files: for key, value in lmdb.open(DB, readonly=True, lock=False).begin().cursor(): "
                "(folder / (key.decode() + '.jpg')).write_bytes(value)"
            )
        if path.name.startswith(("data_batch_", "test_batch")) and kind == "others":
            raise UserError(
                f"{str(path)!r} looks like CIFAR-10's Python version, whose files are pickles, and those are never "
                "read; take the dataset from the Hub (--dataset_name), or as image files or .npy arrays"
            )
        kinds[kind].append(path)
    return kinds


def _report_left_out(folder: Path, others: list[Path], listing: Listing, options: DecodeOptions) -> None:
    """Report what in a folder is not read, and why."""
    shown, suffixes = repr(str(folder)), image_suffixes()
    tables = [path for path in others if path.name in METADATA]
    others = [path for path in others if path.name not in METADATA]
    if tables:
        options.report(f"{few(tables, folder)} in {shown} is not read; --dataset_name {shown} takes columns from it")
    hidden = [p for p in listing.hidden if p.suffix.lower() in suffixes and not p.name.startswith("._")]
    for paths, before, after in (
        (others, "file(s)", "are not images by their ending, and were left out"),
        (hidden, "hidden image(s)", "were left out"),
        (listing.loops, "link(s)", "lead back to a folder above them, and were not followed"),
    ):
        if paths:
            options.report(f"{len(paths)} {before} in {shown} {after}: {few(paths, folder)}")


def first_folders(folder: Path, paths: list[Path], options: DecodeOptions) -> list[str] | None:
    """Return the first-level folder of each image; `None` if an image is in none, with a warning if others are."""
    outside = [path for path in paths if path.parent == folder]
    first = [path.relative_to(folder).parts[0] for path in paths if path.parent != folder]
    if not outside:
        return first
    if len(set(first)) > 1:
        where = f"{len(outside)} of {len(paths)} images in {str(folder)!r} are in no folder ({few(outside, folder)})"
        options.report(f"{where}, so none of them has a class here")
    return None


def read_label_file(folder: Path) -> dict[str, int | str] | None:
    """Read `dataset.json` as StyleGAN and EDM have it: `{"labels": [["00000/img00000000.png", 6], ...]}`.

    Returns labels by the images' paths in the folder, empty where it has none; `None` for no file, or one of another
    kind.
    """
    path = folder / _LABEL_FILE
    shown = repr(str(path))
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the labels in {shown}: {in_one_line(error)}") from None
    if not isinstance(content, dict) or "labels" not in content:
        return None
    pairs: Any = content["labels"] or []
    labels: dict[str, int | str] = {}
    for pair in pairs.items() if isinstance(pairs, dict) else pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(f"the labels in {shown} must be pairs of a file and its label, got {str(pair)[:80]}")
        name, label = PurePosixPath(pair[0].replace("\\", "/")).as_posix(), pair[1]
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise UserError(f"labels are whole numbers or strings, and {shown} has {str(label)[:80]} for {pair[0]!r}")
        if labels.setdefault(name, label) != label:
            raise UserError(f"{shown} has two labels for {pair[0]!r}: {labels[name]} and {label}")
    return labels


def _label_by_file(
    source: Source, folder: Path, paths: list[Path], labels: dict[str, Any], files: list[Path], options: DecodeOptions
) -> None:
    """Give a source the labels of `dataset.json`: `paths` has the file of each image, `files` all that are there."""
    if not labels:
        return
    where = repr(str(folder / _LABEL_FILE))
    names = [path.relative_to(folder).as_posix() for path in paths]
    if gone := sorted(set(labels) - {path.relative_to(folder).as_posix() for path in files}):
        more = " ..." if len(gone) > 3 else ""
        message = f"{where} has labels of {len(gone)} file(s) that are not there: {', '.join(gone[:3])}{more}"
        if options.on_bad_image == "error":
            raise UserError(f"{message}; fix it, or leave them out with --on_bad_image skip")
        options.report(f"left out: {message}")
    if len(set(names)) < len(names):
        raise UserError(f"{where} has one label per file, and some files of arrays hold several images")
    if bare := [path for path, name in zip(paths, names, strict=True) if name not in labels]:
        what = f"{len(bare)} of {len(paths)} images have no label in {where} ({few(bare, folder)})"
        options.report(f"{what}, so none has one here")
    else:
        source.labels, source.class_names = number_labels([labels[name] for name in names], where)


def _open_arrays(
    name: str, paths: list[Path], options: DecodeOptions, stack_only: bool = False
) -> tuple[Source, list[Path]]:
    """Return the images of array files, one file after the other, and the file of each image."""
    opened: list[tuple[Path, np.ndarray, np.ndarray | None]] = []
    bad: dict[str, ValueError] = {}
    for path in paths:
        try:
            opened.append((path, *open_arrays(path, options, stack_only)))
        except ValueError as error:
            bad[str(path)] = error
    leave_out_bad(bad, len(paths), options, "array files")
    stacks: Any = [stack for _, stack, _ in opened]
    images: ConcatDataset[np.ndarray] = ConcatDataset(stacks)

    def where(row: int) -> str:
        file = bisect_right(images.cumulative_sizes, row)
        path, stack, _ = opened[file]
        return f"image {row + len(stack) - images.cumulative_sizes[file]} of {path}" if len(stack) > 1 else str(path)

    source = Source(name, len(images), lambda rows: [images[row] for row in rows], where)
    labels = [labels for _, _, labels in opened if labels is not None]
    if len(labels) == len(opened):
        source.labels, source.class_names = number_labels(np.concatenate(labels).tolist(), name)
    elif labels:
        bare = len(opened) - len(labels)
        options.report(f"{bare} of {len(opened)} array files of {name} have no labels, so none has here")
    return source, [path for path, stack, _ in opened for _ in stack]


def open_arrays(path: Path, options: DecodeOptions, stack_only: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Open the images of a `.npy` or `.npz` file as `[N, C, H, W]`, and their labels `[N]` if the file has them.

    One image (`HW`, `HWC`, `CHW`) is a stack of one, two-dimensional arrays not with `stack_only`. A `.npy` file is
    mapped into memory. Pickles are never read. A UserError gives the reason without the file's name.
    """
    labels = None
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as members:
                keys = [key for key in _IMAGE_KEYS if key in members] or [k for k in members if k not in _LABEL_KEYS]
                if len(keys) != 1 and keys[:1] != ["images"]:
                    known = ", ".join(members) or "(none)"
                    raise UserError(f"it holds the arrays {known}; call the one with the images 'images'")
                images = members[keys[0]]
                labels = next((members[key] for key in _LABEL_KEYS if key in members), None)
        else:
            with path.open("rb") as file:
                start = file.read(6)
            if start != b"\x93NUMPY":
                raise UserError(f"not a .npy file; it begins with {start!r}" if start else "the file is empty")
            images = np.load(path, mmap_mode="r", allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # damaged headers end in SyntaxError, EOFError, zlib.error, ...
        reason = in_one_line(error)
        if isinstance(error, zipfile.BadZipFile) or "pickled (object) data" in reason:  # what numpy takes others for
            reason = "not a .npz file, or a truncated one"
        elif "Python objects" in reason or "Object arrays" in reason:
            reason = "it holds Python objects (a pickle), which are never read; save it as an array of numbers"
        raise UserError(reason) from None
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
    if images.ndim == 2 and channels == 1 and not stack_only:
        return images[None, None]
    if images.ndim in (3, 4):
        first, last = shape[-3] == channels, shape[-1] == channels
        if images.ndim == 3 and channels == 1 and not (first or last):
            return images[:, None]  # N, H, W
        if first and last:
            if options.array_layout is None:
                both = f"its shape {shape} has {channels} at either place for channels"
                raise UserError(f"{both}; say which it is with --array_layout CHW or HWC")
            first = options.array_layout == "CHW"
        if first or last:
            stack = images if images.ndim == 4 else images[None]
            return stack if first else stack.transpose(0, 3, 1, 2)
    fits = f"[N, H, W, {channels}], [N, {channels}, H, W]" + (", [N, H, W]" if channels == 1 else "")
    one = "" if stack_only else ", or the same without N for one image"
    raise UserError(f"its shape {shape} does not fit in_channels={channels}; what does: {fits}{one}")
