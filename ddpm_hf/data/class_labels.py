"""The classes of a class-conditional network: by name, by number, and as a dataset has them.

One rule for a number, wherever a class is asked for: if any class is called by a number ("1", "2", "10"), a number is
such a name, never a place in the list; else it counts the classes from 0. "No class" has no number; it is `None`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..utils.errors import UserError

ClassLabels = int | str | Iterable[int | str | None] | torch.Tensor | np.ndarray | None


class ClassIndex(int):
    """A class by its place in the network's table, whatever the classes are called."""


def class_number(name: str) -> int | None:
    """Return the whole number that a class is called by (3 for "3" and "003"), or `None`."""
    return int(name) if re.fullmatch(r"-?[0-9]{1,18}", name) else None


def sorted_names(names: Iterable[str]) -> list[str]:
    """Sort class names: numbers as numbers (1, 2, 10), and before words."""
    return sorted(names, key=lambda name: (class_number(name) is None, class_number(name) or 0, name))


def number_labels(values: Sequence[Any], where: str) -> tuple[torch.Tensor, list[str]]:
    """Return `[N]` int64 class indices of whole numbers or strings, and the classes' names; a UserError for others."""
    if len(kinds := {type(value) for value in values}) > 1 or not kinds <= {int, str}:
        strange = next((repr(value) for value in values if type(value) not in (int, str)), "both")
        raise UserError(f"labels are whole numbers or strings, and {where} has {strange}")
    names = sorted_names({str(value) for value in values})
    index = {name: i for i, name in enumerate(names)}
    return torch.tensor([index[str(value)] for value in values], dtype=torch.long), names


def as_list(labels: ClassLabels) -> list[Any]:
    """Return one class label or many, in an array or a tensor too, as a list."""
    if isinstance(labels, torch.Tensor | np.ndarray):
        return labels.reshape(-1).tolist()
    return list(labels) if isinstance(labels, Iterable) and not isinstance(labels, str | bytes) else [labels]


@dataclass(frozen=True)
class Classes:
    """What a network knows of classes."""

    count: int | None  # how many, that of "no class" included; `None` for an unconditional network
    names: tuple[str, ...] = ()  # those that it was trained with; none for stock's networks
    null: int | None = None  # stands for "no class" (classifier-free guidance); `None` without class dropout

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Classes:
        """Read them from a `UNet2DModel`'s configuration; a UserError for stock's networks with other conditions."""
        if (embedding := config.get("class_embed_type")) in ("timestep", "identity"):
            what = f"class_embed_type={embedding!r} takes a number or vector per image instead of a class"
            raise UserError(f"a network with {what}, which no pipeline passes to it; call the network itself")
        return cls(config.get("num_class_embeds"), tuple(config.get("_class_names") or ()), config.get("_null_class"))

    def all_names(self) -> list[str]:
        """Return one name per class; its number where it has none."""
        return [*self.names, *map(str, range(len(self.names), self.count or 0))]

    def _indices(self) -> list[int]:
        return [i for i in range(self.count or 0) if i != self.null]

    def known(self) -> str:
        """Return those that can be asked for, for messages."""
        if self.names:
            return ", ".join(self.names)
        numbers = self._indices()
        return f"{numbers[0]}..{numbers[-1]}" if numbers else "none: it is not class-conditional"

    def index(self, label: Any) -> ClassIndex:
        """Return the index of a class, given by its exact name or its number (also as text), or `None` for "no class".

        Raises a UserError if there is no such class, the number could be two of them, or it is no whole number.
        """
        if isinstance(label, torch.Tensor | np.generic | np.ndarray) and label.ndim == 0:
            label = label.item()
        if label is None and self.null is not None:
            return ClassIndex(self.null)
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise UserError(f"class {label!r} is neither a name nor a whole number; the classes are {self.known()}")
        number = class_number(label) if isinstance(label, str) else label
        numbers = [class_number(name) for name in self.names]
        if isinstance(label, ClassIndex):
            found = [int(label)] if 0 <= label < (self.count or 0) else []
        elif label in self.names:
            found = [self.names.index(str(label))]
        elif number is not None and str(number) in self.names:  # of "1" and "01" the one that is written like it
            found = [self.names.index(str(number))]
        elif any(known is not None for known in numbers):
            found = [i for i, known in enumerate(numbers) if known == number is not None]
        else:
            found = [number] if number in self._indices() else []
        if len(found) > 1:
            several = " and ".join(repr(self.names[i]) for i in found)
            raise UserError(f"class {label!r} could be {several}; write it as the network does, as text")
        if not found:
            raise UserError(f"class {label!r} is no class of this network; it has {self.known()}")
        return ClassIndex(found[0])

    def checked(self, labels: ClassLabels, guidance_scale: float, batch_size: int) -> torch.Tensor | None:
        """Return `[B]` class indices, or `None` for an unconditional network.

        `labels` is one for all images, or one per image, as `index` takes them. Raises a UserError for classes or
        guidance that the network does not have, or another number of labels.
        """
        if not math.isfinite(guidance_scale):
            raise UserError(f"--guidance_scale must be a finite number, got {guidance_scale}")
        if self.count is None:
            if labels is not None or guidance_scale != 1:
                raise UserError(
                    "--class_labels and --guidance_scale are for class-conditional networks; this one is not"
                )
            return None
        if guidance_scale != 1 and self.null is None:
            raise UserError(f"--guidance_scale {guidance_scale:g} needs a network that was trained with class dropout")
        if labels is None and self.null is None:
            raise UserError(f"this network is class-conditional: give --class_labels; its classes are {self.known()}")
        indices = torch.tensor([self.index(label) for label in as_list(labels)], dtype=torch.long)
        return one_per_image(indices, batch_size, "class_labels")

    def of_names(self, names: list[str] | None) -> list[ClassIndex]:
        """Return where a dataset's classes are among the network's: by name, if the network has names.

        Else classes that are all called by numbers are these, and others are taken in order. A UserError for others.
        """
        own = self._indices()
        if self.names:
            if unknown := [name for name in names or () if name not in self.names]:
                raise UserError(f"the network knows no class {unknown[0]!r}; it was trained on {self.known()}")
            found = [self.names.index(name) for name in names or self.names]
        elif not names:
            found = own
        elif all(class_number(name) is not None for name in names):
            found = [int(name) for name in names]
        elif len(names) < len(own):
            images = f"the images have {len(names)}: {', '.join(names)}; call these by its numbers"
            raise UserError(f"the network has the classes {self.known()} without names, and {images}")
        else:
            found = list(range(len(names)))
        if outside := [i for i in found if i not in own]:
            raise UserError(f"class label {outside[0]} is outside {self.known()}")
        return [ClassIndex(i) for i in found]

    def of_dataset(self, data: Any) -> torch.Tensor | None:
        """Return a dataset's labels as this network numbers them, `[N]`; `None` if it is unconditional.

        Images without labels have "no class". Raises a UserError if the network does not know them.
        """
        if self.count is None:
            return None
        if data.labels is None:
            if self.null is None:
                raise UserError(f"the network is class-conditional, and the images of {data.name!r} have no labels")
            return torch.full((len(data),), self.null)
        table = torch.tensor(self.of_names(data.class_names))
        if len(data.labels) and not 0 <= data.labels.min() <= data.labels.max() < len(table):
            raise UserError(f"the images of {data.name!r} have labels outside the network's {len(table)} classes")
        return table[data.labels]


def one_per_image(values: torch.Tensor, batch_size: int, name: str) -> torch.Tensor:
    """Repeat one value for all images; raises a UserError if values are neither one nor as many as the images."""
    if len(values) not in (1, batch_size):
        raise UserError(f"{name}: got {len(values)} for {batch_size} images; give one, or one per image")
    return values.expand(batch_size, *values.shape[1:])
