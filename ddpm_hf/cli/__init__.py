"""`ddpm-hf train | sample | evaluate | reproduce | convert | push ...`: which command it is, and how it ends.

A user's mistake gets one sentence on stderr and exit code 2. A fault, of this package or of a library, gets a sentence
that names the file with its traceback, and exit code 1. Heavy libraries are imported by the command that needs them.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from .. import __version__
from ..utils.errors import UserError, in_one_line, showing_flags
from ..utils.text import nearest
from .best_timesteps import best_timesteps, best_timesteps_parser
from .command_line import Parser
from .convert import convert, convert_parser
from .ema import ema, ema_parser
from .evaluate import evaluate, evaluate_parser
from .optimal_variance import optimal_variance, optimal_variance_parser
from .publish import publish, publish_parser
from .push import push, push_parser
from .sample import sample, sample_parser
from .scale_epsilon import scale_epsilon, scale_epsilon_parser
from .space import space, space_parser
from .train import (
    distill,
    distillation_parser,
    parse_training_config,
    reproduce,
    reproduction_parser,
    train,
    training_parser,
)

__all__ = ["COMMANDS", "PARSERS", "main", "parse_training_config", "run", "train", "training_parser"]

# What runs each command, and its parser.
_ALL: dict[str, tuple[Callable[..., int | None], Callable[[str | None], Parser]]] = {
    "train": (train, training_parser),
    "reproduce": (reproduce, reproduction_parser),
    "distill": (distill, distillation_parser),
    "sample": (sample, sample_parser),
    "evaluate": (evaluate, evaluate_parser),
    "ema": (ema, ema_parser),
    "optimal_variance": (optimal_variance, optimal_variance_parser),
    "best_timesteps": (best_timesteps, best_timesteps_parser),
    "scale_epsilon": (scale_epsilon, scale_epsilon_parser),
    "convert": (convert, convert_parser),
    "publish": (publish, publish_parser),
    "push": (push, push_parser),
    "space": (space, space_parser),
}
COMMANDS = {name: command for name, (command, _) in _ALL.items()}
PARSERS = {name: parser for name, (_, parser) in _ALL.items()}
# What makes a command need less memory, where it is not --batch_size.
_BATCH_SIZES = {
    **dict.fromkeys(("train", "train.py", "distill"), "--train_batch_size"),
    "reproduce": "--train_batch_size, or, where the model is measured, --batch_size",
    "publish": "--eval_batch_size",
}
# Libraries whose errors about files and connections are written for users, and have no number of the system's.
_CLEAR_ERRORS = ("ddpm_hf", "huggingface_hub", "diffusers", "transformers", "datasets")


_HELP = """usage: ddpm-hf COMMAND [flags]

The DDPM of Ho, Jain and Abbeel (2020).

{}

ddpm-hf COMMAND --help lists the flags of a command, with their defaults and the paper's values; ddpm-hf --version says
which version this is. --debug, with any command (or DDPM_HF_TRACEBACK=1), shows the traceback of an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `ddpm-hf` command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = next((argument for argument in arguments if argument != "--debug"), None)
    if name in (None, "-h", "--help"):
        print(_HELP.format("\n".join(f"  {of:18}{parser(None).description}" for of, parser in PARSERS.items())))
        return 0 if name else 2
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        print(f"error: unknown command {name!r}{hint}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    arguments.remove(name)
    return run(COMMANDS[name], arguments, f"ddpm-hf {name}")


def run(command: Callable[..., int | None], arguments: Sequence[str], prog: str) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C, 1 for a fault.

    A file, a disk or a connection that fails, and too little memory, are one sentence and exit code 2 as well. With
    `--debug` among the arguments, or the environment variable DDPM_HF_TRACEBACK=1, exceptions are raised instead.
    """
    with showing_flags():
        return _run(command, arguments, prog)


def _run(command: Callable[..., int | None], arguments: Sequence[str], prog: str) -> int:
    try:
        return command([argument for argument in arguments if argument != "--debug"], prog) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in arguments or os.environ.get("DDPM_HF_TRACEBACK"):
            raise
        sentence = _sentence(error, _BATCH_SIZES.get(prog.split()[-1], "--batch_size"))
        print(f"error: {sentence or _fault(error, prog)}", file=sys.stderr)
        return 2 if sentence else 1
    finally:
        # A process that just ends, instead of leaving its siblings in order, makes PyTorch abort now and then.
        distributed = sys.modules.get("torch.distributed")  # else there are none, and importing it takes seconds
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _sentence(error: Exception, batch_size: str) -> str | None:
    """Return what a user is told of an error, by a command with that flag; `None` where it is a fault."""
    text = in_one_line(error)
    if isinstance(error, UserError):
        return text
    # By its name, as importing torch takes seconds; on CPUs PyTorch has only these words.
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"too little memory on the device; give a smaller {batch_size}"
    if isinstance(error, MemoryError):
        return f"too little memory on this machine; give a smaller {batch_size}, or fewer images"
    if isinstance(error, OSError):
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if error.errno is not None or str(frame.f_globals.get("__name__")).partition(".")[0] in _CLEAR_ERRORS:
            return text
    return None


def _fault(error: Exception, prog: str) -> str:
    """Write a traceback into a file; return a sentence that says where it is."""
    where = "--debug shows its traceback"
    with suppress(OSError):
        # What was typed stays out of it: there may be an access token among that.
        descriptor, path = tempfile.mkstemp(prefix="ddpm-hf-", suffix=".txt", text=True)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{prog}\n{''.join(traceback.format_exception(error))}")
        where = f"its traceback is in {path}, and --debug shows it"
    kind = " ".join("".join(traceback.format_exception_only(error)).split())
    return f"unexpected, and not your mistake but a fault of ddpm-hf or of a library: {kind}; {where}"
