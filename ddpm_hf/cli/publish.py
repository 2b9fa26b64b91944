"""`ddpm-hf push | space`: a model on the Hub, and a web page of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command_line import Parser, UsageError


def push_parser(prog: str | None = None) -> Parser:
    """The parser of `ddpm-hf push`."""
    parser = Parser(prog, "Publish a model's folder on the Hub, in one commit.", "RUN --repo_id ORG/NAME [flags]")
    group = parser.add_argument_group("model and card")
    group.add_argument("run", type=str, help="a run's output folder, or any folder that save_pretrained wrote")
    group.add_argument("--license", type=str | None, default=None, help="for the card, such as apache-2.0")
    group.add_argument(
        "--report", type=str | None, default=None, help="an evaluation to show instead of the run's own"
    )
    group = parser.add_argument_group("Hub")
    group.add_argument("--repo_id", type=str, required=True, help="org/name; made if it does not exist")
    _add_hub_flags(group, "false: publish for everybody to see")
    group.add_argument("--commit_message", type=str, default="Upload a DDPM", help="what the commit is called")
    return parser


def _add_hub_flags(group: Any, private_help: str) -> None:
    names = ("--private", "--hub_private_repo")
    group.add_argument(*names, type=bool, nargs="?", const=True, default=True, help=private_help)
    group.add_argument(
        "--token",
        "--hub_token",
        type=str | None,
        default=None,
        help="better: 'hf auth login' or HF_TOKEN, which other users of the machine cannot see",
    )


def push(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf push`."""
    values = push_parser(prog).parse_args(list(arguments))
    from ..hub.publish import Push, quiet_client

    quiet_client()
    job = Push(
        values.run,
        values.repo_id,
        private=values.private,
        token=values.token,
        license=values.license,
        report=values.report,
        commit_message=values.commit_message,
    )
    print(job.run())
    return 0


def space_parser(prog: str | None = None) -> Parser:
    """The parser of `ddpm-hf space`."""
    parser = Parser(prog, "Make a web page (a Space) of a trained model.", "RUN [flags]")
    group = parser.add_argument_group("model and page")
    group.add_argument("run", type=str, help="a run's output folder, or any folder that save_pretrained wrote")
    group.add_argument(
        "--output", type=str | None, default=None, help="only write it into this folder, to run FOLDER/app.py"
    )
    group.add_argument("--license", type=str | None, default=None, help="of the model; default: what its card says")
    group = parser.add_argument_group("Hub")
    group.add_argument("--repo_id", type=str | None, default=None, help="org/name of the Space; made or renewed")
    group.add_argument(
        "--model_id", type=str | None, default=None, help="load the model by this name on the Hub, and copy none"
    )
    _add_hub_flags(group, "false: a page for everybody to see")
    return parser


def space(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf space`."""
    values = space_parser(prog).parse_args(list(arguments))
    if values.repo_id is None and values.output is None:
        raise UsageError("give --repo_id org/name to push the Space, or --output FOLDER to write it here")
    if values.repo_id is not None and values.output is not None:
        raise UsageError("give either --repo_id to push the Space, or --output to write it here")
    from ..hub.publish import quiet_client
    from ..hub.space import push_space, write_space

    quiet_client()
    options = {"model_id": values.model_id, "license": values.license, "token": values.token}
    if values.output is not None:
        write_space(values.run, values.output, **options)
        print(f"wrote {values.output}; try it with: python {Path(values.output) / 'app.py'}")
        return 0
    print(push_space(values.run, values.repo_id, private=values.private, **options))
    return 0
