"""Rows that are made batch by batch, by several processes, and kept on disk so that an interrupted run resumes.

```
folder/
  00000000.safetensors     one batch: "ids" [n] int64 and the rows that belong to them
  00000256.safetensors
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..utils.errors import NotFiniteError, UserError
from ..utils.files import write_whole
from ..utils.processes import gather, processes, raise_on_all_ranks
from ..utils.progress import progress_bar

Rows = dict[str, Tensor]
Maker = Callable[[list[int]], Rows]  # ids to rows: tensors whose first axis is that of the ids


def write_tensors(path: Path, tensors: Rows) -> None:
    """Write a safetensors file completely or not at all, with an `OSError` where it cannot be written."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        write_whole(path, lambda partial: save_file(plain, partial))
    except SafetensorError as error:  # safetensors has its own error for a full disk
        raise OSError(f"cannot write {path}: {error}") from error


def all_rows(
    count: int, make: Maker, batch_size: int, folder: Path | None = None, desc: str = "", progress: bool = False
) -> Rows:
    """Return the rows 0..count-1 on every process, each made once by one of them.

    Args:
        count: How many rows.
        make: Makes rows, each of which has to depend on its id only.
        batch_size: Ids at a time, at least 1: fewer where every process would not get its share otherwise.
        folder: Where finished batches are kept and found again, else they are in memory only; its name has to hold
            all that the rows depend on.
        desc, progress: Text and visibility of the progress bar.

    Raises a NotFiniteError for a row with NaN or infinity, which is not kept; a UserError if a folder is not shared.
    """
    here = processes()
    parts = [] if folder is None else kept_rows(folder)
    done = {i for part in parts for i in part["ids"].tolist()}
    missing = [i for i in range(count) if i not in done]
    gather(None)  # nobody writes before everybody has looked, so all agree on what is missing
    batch_size = max(1, min(batch_size, -(-len(missing) // here.num_processes)))
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    mine = batches[here.process_index :: here.num_processes]
    made: list[Rows] = []
    shown = bool(progress and here.is_main_process and missing)
    with raise_on_all_ranks(), progress_bar(sum(map(len, mine)), desc, show=shown) as bar:
        for ids in mine:
            rows = {name: value.cpu() for name, value in make(ids).items()}
            for name, value in rows.items():
                if not (finite := value.isfinite()).all():
                    first = ids[int(finite.reshape(len(ids), -1).all(1).int().argmin())]
                    raise NotFiniteError(f"{desc}: {name} of image {first} is not finite, so no number is made of it")
            made.append({"ids": torch.tensor(ids), **rows})
            if folder is not None:
                write_tensors(folder / f"{ids[0]:08d}.safetensors", made[-1])
            bar.update(len(ids))
    if here.num_processes > 1:
        made = [rows for part in gather(made) for rows in part] if folder is None else kept_rows(folder)
        parts.clear()
    parts += made
    made.clear()  # `in_order` frees them one by one
    with raise_on_all_ranks():
        return in_order(parts, range(count), folder)


def kept_rows(folder: Path) -> list[Rows]:
    """Return the batches on disk; damaged ones are left out, to be made again."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(OSError, SafetensorError, KeyError):
            part = load_file(path)
            if all(len(value) == len(part["ids"]) and value.isfinite().all() for value in part.values()):
                found.append(part)
    return found


def in_order(parts: list[Rows], ids: Sequence[int], folder: Path | None = None) -> Rows:
    """Return the rows of these ids, in their order, out of batches in any order, which are used up.

    Raises a UserError if one is missing.
    """
    place = {i: row for row, i in enumerate(dict.fromkeys(ids))}
    missing = place.keys() - {i for part in parts for i in part["ids"].tolist()}
    if missing:
        first = next(i for i in place if i in missing)
        what = f"{len(missing)} of {len(place)} rows are missing, the first that of {first}"
        raise UserError(f"{what}; all processes have to share {folder}")
    if len(kinds := {", ".join(sorted(part)) for part in parts}) > 1:  # else some rows would never be filled
        what = "; ".join(sorted(kinds))
        raise UserError(f"{folder} holds batches of different kinds, {what}; remove it, and they are made again")
    found: Rows = {}
    while parts:
        part = parts.pop()
        pairs = [(row, place[i]) for row, i in enumerate(part.pop("ids").tolist()) if i in place]
        rows, places = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
        for name, value in part.items():
            if name not in found:
                found[name] = value.new_empty((len(place), *value.shape[1:]))
            found[name][places] = value[rows]
    if len(place) < len(ids):  # some are asked for twice
        found = {name: value[[place[i] for i in ids]] for name, value in found.items()}
    return found
