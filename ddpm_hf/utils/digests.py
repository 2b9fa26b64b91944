"""Compute short names of what numbers depend on: settings, weights, images."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from .progress import in_parts


def digest(*parts: Any) -> str:
    """Return a SHA-256 of JSON values, bytes and tensors, in their order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            plain = part.detach().cpu().contiguous()
            total.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, bytes):
            total.update(part)
        else:
            total.update(json.dumps(part, sort_keys=True, default=str).encode())
        total.update(b"\0")
    return total.hexdigest()


def weights_digest(module: torch.nn.Module) -> str:
    """Return a SHA-256 of a network's weights and their names."""
    return digest(*(part for name, value in sorted(module.state_dict().items()) for part in (name, value)))


def images_digest(images: Any) -> str:
    """Return a SHA-256 of the pixels of all images (`data.load_images`), in their order."""
    parts = in_parts(torch.arange(len(images)).split(512), "hashing images")
    return digest(*(digest(images.batch(rows)[0]) for rows in parts))
