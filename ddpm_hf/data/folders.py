"""What is in a folder of images, links followed; and the labels that StyleGAN's and EDM's tools write there."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..utils.errors import UserError

LABEL_FILE = "dataset.json"


@dataclass
class Listing:
    """The entries of a folder and its subfolders.

    Attributes:
        files: All but hidden ones, in the order of their paths.
        folders: The names of the first-level folders.
        linked: Links to folders, which were entered.
        loops: Links that lead back to a folder which they are in, and were not entered.
        dangling: Links that lead to nothing.
        hidden: Files whose name begins with a dot.
    """

    files: list[Path] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    linked: list[Path] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)
    dangling: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)


def list_folder(folder: Path) -> Listing:
    """List all files of a folder and its subfolders, through links, but those in hidden folders (`.name`, `__MACOSX`).

    Raises:
        UserError: A folder cannot be listed.
    """
    found = Listing()
    _enter(folder, [folder.resolve()], found)
    found.files.sort()
    return found


def _enter(folder: Path, above: list[Path], found: Listing) -> None:
    """List one folder, which is the last of `above`, the folders that it is in, none of them a link."""
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
        elif os.path.isdir(path) if linked else entry.is_dir():
            real = path.resolve() if linked else above[-1] / entry.name
            if linked and any(real == other or real in other.parents for other in above):
                found.loops.append(path)
                continue
            if linked:
                found.linked.append(path)
            if len(above) == 1:
                found.folders.append(entry.name)
            _enter(path, [*above, real], found)
        elif os.path.isfile(path) if linked else entry.is_file():
            found.files.append(path)


def few(paths: list[Path], folder: Path) -> str:
    """The first of some paths in a folder, for messages."""
    return ", ".join(str(path.relative_to(folder)) for path in paths[:3]) + (" ..." if len(paths) > 3 else "")


def read_label_file(folder: Path) -> dict[str, int | str] | None:
    """Read `dataset.json` as StyleGAN and EDM have it: `{"labels": [["00000/img00000000.png", 6], ...]}`.

    Returns:
        Labels by the images' paths in the folder; empty where `labels` is null; `None` where there is no such file, or
        one of another kind.

    Raises:
        UserError: It cannot be read, or has labels that are not whole numbers or strings, or two for one image.
    """
    path = folder / LABEL_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the labels in {str(path)!r}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or "labels" not in content:
        return None
    pairs: Any = content["labels"]
    pairs = list(pairs.items()) if isinstance(pairs, dict) else [] if pairs is None else pairs
    labels: dict[str, int | str] = {}
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(f"the labels in {str(path)!r} must be pairs of a file and its label, got {str(pair)[:80]}")
        name, label = PurePosixPath(pair[0].replace("\\", "/")).as_posix(), pair[1]
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise UserError(
                f"labels are whole numbers or strings, and {str(path)!r} has {str(label)[:80]} for {pair[0]!r}"
            )
        if labels.setdefault(name, label) != label:
            raise UserError(f"{str(path)!r} has two labels for {pair[0]!r}: {labels[name]} and {label}")
    return labels
