"""Read weights from files of PyTorch or safetensors: the only place that opens PyTorch's files, which are pickles.

Unpickling could run code; `weights_only=True` reads tensors and plain values and nothing else.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .errors import UserError, first_line


def read_weights(path: Path) -> Any:
    """Return what a safetensors file, by its ending, or PyTorch file holds, on the CPU, or raise UserError."""
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise  # the machine's fault, not the file's
    except Exception as error:  # damaged pickles end in nearly any error: KeyError, EOFError, IndexError, ...
        unpickling = isinstance(error, pickle.UnpicklingError)
        reason = f"it is not a {kind}, or is damaged ({'no pickle' if unpickling else first_line(error)[:120]})"
        if unpickling and re.search("weights_only|unsupported", str(error), re.IGNORECASE):
            how = "save its state dict alone (torch.save(model.state_dict(), ...) or safetensors) with its own code"
            reason = f"it holds more than tensors and would run code when loaded, so it is refused; {how}"
        raise UserError(f"{str(path)!r} cannot be read as weights: {reason}") from None
