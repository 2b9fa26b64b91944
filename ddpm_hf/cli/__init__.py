"""`ddpm-hf train | sample | evaluate | reproduce | convert | push ...`: which command it is, and what it ends with.

A user's mistake gets one sentence on stderr and exit code 2. A fault, of this package or of a library, gets a sentence
that names the file with its traceback, and exit code 1. Heavy libraries are imported by the command that needs them.
"""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentError

from ..utils.errors import UserError
from .command_line import Parser
from .completion import bash_completion
from .convert import convert, convert_parser
from .evaluate import evaluate, evaluate_parser, optimal_variance, optimal_variance_parser
from .publish import push, push_parser, space, space_parser
from .sample import sample, sample_parser
from .train import parse_training_config, reproduce, reproduction_parser, train, training_parser

__all__ = ["COMMANDS", "PARSERS", "main", "parse_training_config", "run", "train", "training_parser"]

COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "reproduce": reproduce,
    "sample": sample,
    "evaluate": evaluate,
    "optimal_variance": optimal_variance,
    "convert": convert,
    "push": push,
    "space": space,
}

PARSERS: dict[str, Callable[[str | None], Parser]] = {
    "train": training_parser,
    "reproduce": reproduction_parser,
    "sample": sample_parser,
    "evaluate": evaluate_parser,
    "optimal_variance": optimal_variance_parser,
    "convert": convert_parser,
    "push": push_parser,
    "space": space_parser,
}

_HELP = """usage: ddpm-hf COMMAND [flags]

The DDPM of Ho, Jain and Abbeel (2020).

making a model:
  train             train a model; the same as examples/train.py
  reproduce         an experiment of the paper: train, sample, evaluate, compare
  convert           other implementations' weights as a folder that diffusers opens

using and measuring it:
  sample            images: from noise, from given images, the paper's figures
  evaluate          the paper's numbers: bits/dim, FID, IS, KID, neighbours, ...
  optimal_variance  measure the best variance once, for better samples in few steps

showing it:
  push              publish it on the Hub
  space             a web page on the Hub to try it out

ddpm-hf COMMAND --help lists the flags of a command, with their defaults and the paper's values;
ddpm-hf --version says which version this is. --debug, with any command (or DDPM_HF_TRACEBACK=1), shows the traceback
of an error.
eval "$(ddpm-hf --bash_completion)" lets bash complete commands and flags."""


def run(command: Callable[..., int], arguments: Sequence[str], prog: str) -> int:
    """Run one command and return its exit code.

    A user's mistake becomes one sentence on stderr and exit code 2; so do a file, a disk or a connection that fails,
    and too little memory. Ctrl-C is exit code 130. Any other exception is a fault: its traceback goes into a file that
    a sentence names, and the exit code is 1. With `--debug` among the arguments, or the environment variable
    DDPM_HF_TRACEBACK=1, exceptions are raised instead.
    """
    debug = "--debug" in arguments or bool(os.environ.get("DDPM_HF_TRACEBACK"))
    try:
        return command([argument for argument in arguments if argument != "--debug"], prog)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        if (sentence := _sentence(error)) is None:
            print(f"error: {_fault(error, prog)}", file=sys.stderr)
            return 1
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    finally:
        _leave_processes()


# Libraries whose errors about files and connections are sentences for users, and have no number of the system's.
_SPEAKING = ("ddpm_hf", "huggingface_hub", "diffusers", "transformers", "datasets")


def _sentence(error: Exception) -> str | None:
    """What a user is told of an error; nothing where it is a fault."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (UserError, ArgumentError)):
        return text
    # By its name, as importing torch takes seconds; on CPUs PyTorch has only these words.
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return "too little memory on the device; give a smaller --batch_size (training: --train_batch_size)"
    if isinstance(error, MemoryError):
        return "too little memory on this machine; give a smaller --batch_size, or fewer images"
    if isinstance(error, OSError):
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if error.errno is not None or str(frame.f_globals.get("__name__")).partition(".")[0] in _SPEAKING:
            return text
    return None


def _fault(error: Exception, prog: str) -> str:
    """Write a traceback into a file; a sentence that says where it is."""
    words = " ".join("".join(traceback.format_exception_only(error)).split())
    file = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    # What was typed stays out of it: there may be an access token among that.
    content = f"{prog}\n{''.join(traceback.format_exception(error))}"
    for folder in (_cache_dir, lambda: Path(tempfile.gettempdir())):
        try:
            path = folder() / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        except Exception:  # whatever is broken there, the next one is tried
            continue
        where = f"its traceback is in {path}, and --debug shows it"
        break
    else:
        where = "--debug shows its traceback"
    return f"unexpected, and not your mistake but a fault of ddpm-hf or of a library: {words}; {where}"


def _cache_dir() -> Path:
    from ..utils.files import default_cache_dir

    return default_cache_dir() / "tracebacks"


def _leave_processes() -> None:
    """Part from sibling processes in order: one that just ends makes PyTorch abort now and then."""
    distributed = sys.modules.get("torch.distributed")  # else nothing was joined, and importing it takes seconds
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """The `ddpm-hf` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = ["--debug"] if "--debug" in arguments else []
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from .. import __version__

        print(__version__)
        return 0
    if arguments[0] == "--bash_completion":
        print(bash_completion({name: make(None).flags() for name, make in PARSERS.items()}))
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        print(f"error: unknown command {name!r}{hint}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(COMMANDS[name], [*rest, *debug], f"ddpm-hf {name}")
