"""`ddpm-hf train | sample | evaluate | reproduce | convert | push ...`: which command it is, and what it ends with.

A user's mistake gets one sentence on stderr and exit code 2. Heavy libraries are imported by the command that needs
them.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentError

from .command_completion import bash_completion
from .command_convert import convert, convert_parser
from .command_evaluate import evaluate, evaluate_parser, optimal_variance, optimal_variance_parser
from .command_line import Parser
from .command_publish import push, push_parser, space, space_parser
from .command_sample import sample, sample_parser
from .command_train import parse_training_config, reproduce, reproduction_parser, train, training_parser

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
  convert           other people's weights to ours, ours to the official format

using and measuring it:
  sample            images: from noise, from given images, the paper's figures
  evaluate          the paper's numbers: bits/dim, FID, IS, KID, neighbours, ...
  optimal_variance  measure the best variance once, for better samples in few steps

showing it:
  push              publish it on the Hub
  space             a web page on the Hub to try it out

ddpm-hf COMMAND --help lists the flags of a command, with their defaults and the paper's values;
ddpm-hf --version says which version this is. DDPM_HF_TRACEBACK=1 shows where an error came from.
eval "$(ddpm-hf --bash_completion)" lets bash complete commands and flags."""


def run(command: Callable[..., int], arguments: Sequence[str], prog: str) -> int:
    """Run one command; a user's mistake becomes one sentence on stderr and exit code 2, Ctrl-C exit code 130.

    So does a device whose memory is too small for what was asked.

    The environment variable DDPM_HF_TRACEBACK=1 shows where the sentence came from.
    """
    try:
        return command(arguments, prog)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, ArgumentError, OSError) as error:
        if os.environ.get("DDPM_HF_TRACEBACK"):
            raise
        return _told(" ".join(str(error).split()))
    except RuntimeError as error:  # by its name, as importing torch takes seconds
        if type(error).__name__ != "OutOfMemoryError" or os.environ.get("DDPM_HF_TRACEBACK"):
            raise
        return _told("too little memory on the device; give a smaller --batch_size (training: --train_batch_size)")
    finally:
        _leave_processes()


def _told(sentence: str) -> int:
    """Print what is wrong; the exit code."""
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _leave_processes() -> None:
    """Part from sibling processes in order: one that just ends makes PyTorch abort now and then."""
    distributed = sys.modules.get("torch.distributed")  # else nothing was joined, and importing it takes seconds
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """The `ddpm-hf` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from . import __version__

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
    return run(COMMANDS[name], rest, f"ddpm-hf {name}")


if __name__ == "__main__":
    sys.exit(main())
