"""Rows that are made batch by batch, by several processes, and kept on disk so that an interrupted run resumes.

```
folder/
  00000000.safetensors     one batch: "ids" [n] int64 and the rows that belong to them
  00000256.safetensors
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..utils.errors import NotFiniteError, UserError
from ..utils.files import write_whole
from ..utils.processes import gather, processes, raise_on_all_ranks

Rows = dict[str, Tensor]


def write_tensors(path: Path, tensors: Rows) -> None:
    """Write a safetensors file completely or not at all, with an `OSError` where it cannot be written."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        write_whole(path, lambda partial: save_file(plain, partial))
    except SafetensorError as error:  # safetensors has its own error for a full disk
        raise OSError(f"cannot write {path}: {error}") from error


def read_tensors(path: Path) -> Rows | None:
    """Read what `write_tensors` wrote; `None` where there is nothing, or nothing that can be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def all_rows(
    count: int,
    make: Callable[[list[int]], Rows],
    *,
    batch_size: int,
    folder: Path | None = None,
    desc: str = "",
    progress: bool = False,
) -> Rows:
    """Return the rows 0..count-1 on every process, each made once by one of them.

    Args:
        count: How many rows.
        make: Ids to rows: tensors whose first axis is that of the ids. A row has to depend on its id only.
        batch_size: Ids at a time, at most: fewer where every process would not get its share otherwise.
        folder: Where finished batches are kept and found again; its name has to hold all that the rows depend on.
            Without it they are in memory only.
        desc, progress: Text and visibility of the progress bar.

    Raises:
        ValueError: A batch size below 1, or a folder that the processes do not share.
        NotFiniteError: A row holds NaN or infinity; it is not kept.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    here = processes()
    parts = [] if folder is None else kept_rows(folder)
    done = {i for part in parts for i in part["ids"].tolist()}
    missing = [i for i in range(count) if i not in done]
    gather(None)  # nobody writes before everybody has looked, so all agree on what is missing
    batch_size = max(1, min(batch_size, -(-len(missing) // here.num_processes)))
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    mine = batches[here.process_index :: here.num_processes]
    made: list[Rows] = []
    quiet = not (progress and here.is_main_process and missing)
    with raise_on_all_ranks(), tqdm(total=sum(map(len, mine)), desc=desc, unit="image", disable=quiet) as bar:
        for ids in mine:
            rows = {"ids": torch.tensor(ids), **{name: value.cpu() for name, value in make(ids).items()}}
            _check_finite(rows, desc)
            made.append(rows)
            if folder is not None:
                write_tensors(folder / f"{ids[0]:08d}.safetensors", rows)
            bar.update(len(ids))
    if here.num_processes > 1:
        made = [rows for part in gather(made) for rows in part] if folder is None else kept_rows(folder)
        parts = []
    with raise_on_all_ranks():
        return in_order([*parts, *made], range(count), folder)


def _check_finite(rows: Rows, desc: str) -> None:
    for name, value in rows.items():
        if value.is_floating_point():
            wrong = (~value.isfinite()).reshape(len(value), -1).any(1)
            if wrong.any():
                first = int(rows["ids"][wrong][0])
                raise NotFiniteError(f"{desc}: {name} of image {first} is not finite, and no number is made of it")


def kept_rows(folder: Path) -> list[Rows]:
    """Return the batches on disk; damaged ones are left out, to be made again."""
    return [rows for path in sorted(folder.glob("*.safetensors")) if (rows := read_tensors(path)) and "ids" in rows]


def in_order(parts: Sequence[Rows], ids: Sequence[int], folder: Path | None = None) -> Rows:
    """Return the rows of these ids, in their order, out of batches in any order; a `ValueError` if one is missing."""
    row_of = {i: row for row, i in enumerate(i for part in parts for i in part["ids"].tolist())}
    if missing := [i for i in ids if i not in row_of]:
        raise UserError(
            f"{len(missing)} of {len(ids)} rows are missing, the first of them that of {missing[0]}; all processes "
            f"have to share {folder}"
        )
    rows = [row_of[i] for i in ids]
    names = [name for name in (parts[0] if parts else {}) if name != "ids"]
    return {name: torch.cat([part[name] for part in parts])[rows] for name in names}
