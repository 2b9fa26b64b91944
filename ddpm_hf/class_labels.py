"""The classes of a class-conditional network: by name, by number, and as a dataset has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import UserError

ClassLabels = int | str | Iterable[int | str] | torch.Tensor | None


@dataclass(frozen=True)
class Classes:
    """What a network knows of classes.

    Attributes:
        count: How many, that of "no class" included; `None` for an unconditional network.
        names: The names that it was trained with; none for stock's networks.
        null: The label that stands for "no class" (classifier-free guidance), or `None` without class dropout.
        embedding: `timestep` or `identity` for stock's networks that take a number or a vector per image instead of a
            class (`class_embed_type`).
    """

    count: int | None
    names: tuple[str, ...] = ()
    null: int | None = None
    embedding: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Classes:
        """Those of a `UNet2DModel`'s configuration."""
        if (embedding := config.get("class_embed_type")) in ("timestep", "identity"):
            return cls(None, embedding=embedding)
        return cls(config.get("num_class_embeds"), tuple(config.get("_class_names") or ()), config.get("_null_class"))

    def all_names(self) -> list[str]:
        """One name per class; its number where it has none."""
        return [self.names[i] if i < len(self.names) else str(i) for i in range(self.count or 0)]

    def index(self, label: int | str) -> int:
        """The index of a class, given by name or number.

        Raises:
            ValueError: There is no such class.
        """
        if label in self.names:
            return self.names.index(str(label))
        if isinstance(label, str) and label.isdecimal():
            label = int(label)
        count = self.count or 0
        if isinstance(label, str) or not 0 <= int(label) < count:
            have = ", ".join(self.names) or (f"0..{count - 1}" if count else "none: it is not class-conditional")
            raise UserError(f"class {label!r} is no class of this network; it has {have}")
        return int(label)

    def checked(self, labels: ClassLabels, guidance_scale: float, batch_size: int) -> torch.Tensor | None:
        """`[B]` class indices, or `None` for an unconditional network; what stands for them with an `embedding`.

        Args:
            labels: One for all images, or one per image; by name or number. "No class" for `None`.
            guidance_scale: See `DDPMPipeline`.
            batch_size: B.

        Raises:
            ValueError: Classes or guidance that the network does not have, or another number of labels.
        """
        if self.embedding is not None:
            return self._numbers(labels, guidance_scale, batch_size)
        if self.count is None:
            if labels is not None or guidance_scale != 1:
                raise UserError("class_labels and guidance_scale are for class-conditional networks; this one is not")
            return None
        if guidance_scale != 1 and self.null is None:
            raise UserError(
                f"guidance_scale={guidance_scale} needs a network trained with class dropout, and this one was not"
            )
        if labels is None:
            if self.null is None:
                raise UserError(f"this network is class-conditional: give class_labels, 0..{self.count - 1}")
            labels = self.null
        if not isinstance(labels, torch.Tensor):
            given = [labels] if isinstance(labels, (int, str, np.integer)) else labels
            labels = torch.tensor([self.index(label) for label in given], dtype=torch.long)
        indices = labels.long().reshape(-1)
        if len(indices) not in (1, batch_size):
            raise UserError(f"got {len(indices)} class_labels for {batch_size} images; give one, or one per image")
        self._check(indices)
        return indices.expand(batch_size)

    def _numbers(self, labels: Any, guidance_scale: float, batch_size: int) -> torch.Tensor:
        """What a network with an `embedding` takes: `[B]` numbers, or `[B, D]` vectors."""
        vectors = self.embedding == "identity"
        wanted = "a vector" if vectors else "a number"
        if labels is None or guidance_scale != 1:
            raise UserError(
                f"this network (class_embed_type={self.embedding!r}) takes {wanted} per image as class_labels, and no "
                "guidance_scale"
            )
        try:
            if not isinstance(labels, (torch.Tensor, np.ndarray)):
                labels = [float(labels)] if isinstance(labels, (str, int, float)) else list(labels)
                labels = [float(one) if isinstance(one, str) else one for one in labels]
            values = torch.as_tensor(labels)
            values = values.reshape(-1, values.shape[-1]) if vectors and values.ndim else values.reshape(-1)
        except (TypeError, ValueError):
            raise UserError(f"class_labels must be {wanted} per image for this network, got {labels!r}") from None
        if len(values) not in (1, batch_size):
            raise UserError(f"got {len(values)} class_labels for {batch_size} images; give one, or one per image")
        return values.expand(batch_size, *values.shape[1:])

    def of_names(self, names: list[str] | None) -> list[int]:
        """Where a dataset's classes are among the network's, by their names; as they come where there are none.

        Raises:
            ValueError: A class that the network does not know.
        """
        known = list(self.names or names or ())
        names = names or known
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"the network knows no class {unknown[0]!r}; it was trained on {', '.join(known)}")
        found = [known.index(name) for name in names] or list(range(self.count or 0))
        self._check(torch.tensor(found))
        return found

    def of_dataset(self, data: Any) -> torch.Tensor | None:
        """A dataset's (`data.load_images`) labels as this network numbers them, `[N]`; `None` if unconditional.

        Images without labels have "no class" where the network knows it.

        Raises:
            ValueError: A class that the network does not know, or no labels where it needs them.
        """
        if self.embedding is not None:
            raise UserError(f"this network (class_embed_type={self.embedding!r}) knows no classes of a dataset")
        if self.count is None:
            return None
        if data.labels is None:
            if self.null is None:
                raise UserError(f"the network is class-conditional, and the images of {data.name!r} have no labels")
            return torch.full((len(data),), self.null)
        table = torch.tensor(self.of_names(data.class_names))
        if len(data.labels) and not 0 <= data.labels.min() <= data.labels.max() < len(table):
            raise UserError(
                f"the images of {data.name!r} have labels {int(data.labels.min())} to {int(data.labels.max())}, and "
                f"the network knows {len(table)} classes"
            )
        return table[data.labels]

    def _check(self, indices: torch.Tensor) -> None:
        assert self.count is not None
        wrong = indices[(indices < 0) | (indices >= self.count)]
        if len(wrong):
            raise UserError(f"class label {int(wrong[0])} is outside 0..{self.count - 1}")
