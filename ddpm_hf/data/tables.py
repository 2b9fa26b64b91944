"""Tables of `datasets`: opened by Hub id or path, and which of their columns are images and labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..utils.errors import UserError, first_line
from ..utils.text import nearest
from .decoding import DecodeOptions
from .folders import few, image_suffixes, is_saved_table, label_images, list_folder
from .tensors import Source

_METADATA = ("metadata.csv", "metadata.jsonl")  # what `datasets` reads columns from in a folder of images
_LABEL_COLUMNS = ("label", "labels", "class", "category")


@dataclass(frozen=True)
class TableOptions:
    """What of a dataset is read."""

    config_name: str | None = None  # as in `datasets.load_dataset`
    cache_dir: str | None = None
    image_column: str | None = None  # the first one of images if `None`
    label_column: str | None = None  # the first one of classes, or one that is called `label` or the like, if `None`


def open_rows(name: str, split: str, table: TableOptions, options: DecodeOptions) -> Source:
    """Open the images and labels of one split of a dataset.

    Raises a UserError if it cannot be loaded, has no images or no such columns, or an image lacks a label asked for.
    """
    import datasets

    data = open_table(name, split, table)
    image, label, class_names = choose_columns(name, data.features, table, options)
    if not len(data):
        raise UserError(f"the dataset {name!r} has no images in split {split!r}")
    if Path(name).is_dir() and not is_saved_table(Path(name)):
        images = [path for path in list_folder(Path(name)).files if path.suffix.lower() in image_suffixes()]
        metadata = next((file for file in _METADATA if (Path(name) / file).is_file()), None)
        if metadata and len(data) < len(images):
            missing = len(images) - len(data)
            options.report(f"{missing} of {len(images)} images in {name!r} are not in {metadata}: left out")
    # Bytes instead of decoded images: what datasets would decode has lost 16-bit values and alpha by then.
    encoded = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    source = Source(name, len(data), lambda rows: encoded[rows][image], lambda row: f"image {row} of {name}")
    if label is None:
        return source
    labels = data.select_columns([label])[:][label]
    labels = [None if isinstance(value, int) and value < 0 else value for value in labels]  # -1: unknown
    if table.label_column is not None and None in labels:
        raise UserError(f"{labels.count(None)} of {len(labels)} images of {name!r} have no label in {label!r}")
    label_images(source, labels, f"the column {label!r} of {name!r}", options)
    if class_names is not None and source.labels is not None:
        source.labels, source.class_names = torch.tensor(labels, dtype=torch.long), class_names
    return source


def open_table(name: str, split: str, table: TableOptions, streaming: bool = False) -> Any:
    """Open one split of a dataset of the Hub, of local files or of `save_to_disk`, as `datasets` gives it.

    Raises a UserError if it cannot be loaded, or `datasets` would leave out a part of a folder.
    """
    import datasets

    path = Path(name)
    try:
        if is_saved_table(path):
            saved = datasets.load_from_disk(name)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            if split not in splits:
                hint = f"; name the folder of one, such as {str(path / min(saved))!r}" if splits is saved else ""
                raise UserError(f"unknown split {split!r} of {name!r}; it has {', '.join(splits)}{hint}")
            data = splits[split]
            shards = max(1, min(len(data), len(data.cache_files)))
            return data.to_iterable_dataset(num_shards=shards) if streaming else data
        if path.is_dir():
            _check_folder(path)
        common: dict[str, Any] = {"split": split, "cache_dir": table.cache_dir, "streaming": streaming}
        if path.is_file() and name.lower().endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=name, **common)
        return datasets.load_dataset(name, table.config_name, **common)
    except UserError:
        raise
    except Exception as error:  # whatever the loading script, the network or the file format came up with
        raise UserError(f"cannot load the dataset {name!r} (split {split!r}): {first_line(error)}") from error


def _check_folder(folder: Path) -> None:
    """Raise if `datasets` would leave out a part of a folder."""
    listing = list_folder(folder)
    left_out = [link for link in listing.linked if any(link in path.parents for path in listing.files)]
    left_out += [path for path in listing.files if path.suffix.lower() == ".parquet" != path.suffix]
    if left_out := left_out + listing.dangling:
        what = "links to folders, links to nothing or files with an ending in capitals"
        advice = "put the files there, or use --train_data_dir for a folder of images"
        raise UserError(f"datasets would leave out {what} in {str(folder)!r}: {few(left_out, folder)}; {advice}")


def choose_columns(
    name: str, features: Any, table: TableOptions, options: DecodeOptions
) -> tuple[str, str | None, list[str] | None]:
    """Return the image column, the label column if there is one, and its class names if it is of type `ClassLabel`.

    They are those asked for, which a UserError refuses if they will not do, or the first that will.
    """
    import datasets

    def is_image(feature: Any) -> bool:
        # Bytes and a path are what an image looks like in parquet files that datasets did not write.
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})

    def of_type(*dtypes: str) -> list[str]:
        return [key for key, f in features.items() if isinstance(f, datasets.Value) and f.dtype.startswith(dtypes)]

    def choose(flag: str, wanted: str | None, likely: list[str], possible: list[str], what: str) -> str | None:
        if wanted is not None and wanted not in possible:
            known = f"{name!r}{nearest(wanted, possible)}: {', '.join(possible) or 'none'}"
            raise UserError(f"{flag} {wanted!r} is no column of {what} in {known}")
        if wanted is None and len(likely) > 1:
            options.report(f"{name!r} has several columns of {what}: {', '.join(likely)}; took {likely[0]} ({flag})")
        return wanted or next(iter(likely), None)

    images = [key for key, feature in features.items() if is_image(feature)]
    encoded = of_type("binary", "large_binary", "string", "large_string")  # bytes, file names or URLs of images
    image = choose("--image_column", table.image_column, images, images + encoded, "images")
    if image is None:
        columns = f"its columns are {', '.join(features)}; name one of file names or URLs with --image_column"
        raise UserError(f"no column of the dataset {name!r} holds images; {columns}")
    classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = classes + of_type("int", "uint", "string", "large_string")
    likely = classes or [key for key in _LABEL_COLUMNS if key in labels]
    label = choose("--label_column", table.label_column, likely, labels, "labels (whole numbers or strings)")
    return image, label, list(features[label].names) if label in classes else None
