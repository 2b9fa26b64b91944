"""Tables of `datasets`: opened by Hub id or path, and which of their columns are images and labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.text import nearest
from .folders import few, list_folder

_LABEL_COLUMNS = ("label", "labels", "class", "category")


def is_saved_table(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def _open_saved_table(name: str, split: str, streaming: bool) -> Any:
    """One split of what `save_to_disk` wrote; a table that was saved by itself is called `train`.

    Raises:
        UserError: There is no such split.
    """
    import datasets

    table = datasets.load_from_disk(name)
    known = list(table) if isinstance(table, datasets.DatasetDict) else ["train"]
    if split not in known:
        raise UserError(
            f"unknown split {split!r} of {name!r}; it has {', '.join(known)}"
            + (f"; name the folder of one, such as {str(Path(name) / known[0])!r}" if known != ["train"] else "")
        )
    table = table[split] if isinstance(table, datasets.DatasetDict) else table
    if streaming:
        return table.to_iterable_dataset(num_shards=max(1, min(len(table), len(table.cache_files))))
    return table


def _check_folder(folder: Path) -> None:
    """Whether `datasets` would read all of a folder; it enters no linked folders, and leaves out dangling links.

    Raises:
        UserError: It would not.
    """
    listing = list_folder(folder)
    linked = [link for link in listing.linked if any(link in path.parents for path in listing.files)]
    capitals = [p for p in listing.files if p.suffix.lower() == ".parquet" and p.suffix != ".parquet"]
    for paths, what, advice in (
        (
            linked,
            "link(s) to folders",
            "give a folder of images as --train_data_dir, or put the files themselves there",
        ),
        (listing.dangling, "link(s) to nothing", "fix or remove them"),
        (capitals, "file(s) with an ending in capitals", "rename them to .parquet"),
    ):
        if paths:
            raise UserError(
                f"{str(folder)!r} holds {len(paths)} {what}, which datasets would leave out: {few(paths, folder)}; "
                f"{advice}"
            )


def open_table(name: str, split: str, config_name: str | None, cache_dir: str | None, streaming: bool) -> Any:
    """One split of a dataset of the Hub, of local files or of `save_to_disk`, as `datasets` gives it.

    Raises:
        UserError: It cannot be loaded, for whatever reason, or `datasets` would leave out a part of a folder.
    """
    import datasets

    if Path(name).is_dir() and not is_saved_table(Path(name)):
        _check_folder(Path(name))
    try:
        if is_saved_table(Path(name)):
            return _open_saved_table(name, split, streaming)
        if Path(name).is_file() and name.lower().endswith(".parquet"):
            return datasets.load_dataset(
                "parquet", data_files=name, split=split, cache_dir=cache_dir, streaming=streaming
            )
        return datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # whatever the loading script, the network or the file format came up with
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the dataset {name!r} (split {split!r}): {reason}") from error


def choose_columns(
    name: str, features: Any, image_column: str | None, label_column: str | None, report: Callable[[str], None]
) -> tuple[str, str | None]:
    """Which columns are read: those asked for, or the first that will do.

    Args:
        name: The dataset's, for messages.
        features: Its columns and their types, as `datasets` gives them.
        image_column, label_column: Those asked for, or `None`.
        report: Is called with a warning where several would do.

    Returns:
        The image column, and the label column or `None` where there is none.

    Raises:
        ValueError: A column that is asked for is not there or of another type, or there are no images.
    """
    import datasets

    columns = ", ".join(features)
    for flag, wanted in (("--image_column", image_column), ("--label_column", label_column)):
        if wanted is not None and wanted not in features:
            raise UserError(
                f"{flag} {wanted!r}: no such column in {name!r}{nearest(wanted, features)}; its columns are {columns}"
            )
    if image_column is None:
        pictures = [key for key, feature in features.items() if _is_image(feature)]
        if not pictures:
            raise UserError(
                f"no column of the dataset {name!r} holds images; its columns are {columns}; one of addresses or file "
                "names is read where --image_column names it"
            )
        image_column = pictures[0]
        if len(pictures) > 1:
            report(f"{name!r} has the image columns {', '.join(pictures)}; took {image_column} (--image_column)")
    elif not _is_image(features[image_column]) and not _may_hold_images(features[image_column]):
        raise UserError(f"the column {image_column!r} of {name!r} holds {features[image_column]}, not images")
    if label_column is None:
        classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        classes = classes or [key for key in _LABEL_COLUMNS if key in features and _is_label(features[key])]
        label_column = classes[0] if classes else None
        if len(classes) > 1:
            report(f"{name!r} has the label columns {', '.join(classes)}; took {label_column} (--label_column)")
    elif not _is_label(features[label_column]):
        raise UserError(
            f"the column {label_column!r} of {name!r} holds {features[label_column]}; labels are whole numbers or "
            "strings"
        )
    return image_column, label_column


def _is_image(feature: Any) -> bool:
    """An image column, or what it looks like in parquet files that were not written by `datasets`."""
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} == set(feature))


def _may_hold_images(feature: Any) -> bool:
    """Encoded images, or files or URLs of images: taken for them where somebody says so."""
    import datasets

    return isinstance(feature, datasets.Value) and feature.dtype in (
        "binary",
        "large_binary",
        "string",
        "large_string",
    )


def _is_label(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "string", "large_string"))


def bytes_or_path(value: dict[str, Any] | None) -> bytes | Path | str:
    """An image as `datasets` gives it when it does not decode, for `read_image`: its bytes, its file, or its URL."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        return b""  # a missing image: read_image says that it is empty
    if value["bytes"] is not None:
        return value["bytes"]
    path = value["path"]
    # Streams name files where they are (hf://..., zip://...::...); a Path would make one slash of two.
    return path if "://" in path else Path(path)
