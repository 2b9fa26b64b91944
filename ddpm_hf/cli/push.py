"""`ddpm-hf push`: a model on the Hub."""

from collections.abc import Callable, Sequence

from . import model
from .command_line import Parser, given


def push_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf push`."""
    parser = Parser(prog, "Publish a model's folder on the Hub, in one commit.", "RUN --repo_id ORG/NAME [flags]")
    flag = parser.group("model and card")
    model.add_run(flag)
    flag("--license", str, None, "for the card, such as apache-2.0")
    flag("--report", str, None, "an evaluation to show instead of the run's own")
    flag = parser.group("Hub")
    flag("--repo_id", str, None, "org/name; made if it does not exist", required=True)
    add_hub_flags(flag)
    flag("--commit_message", str, "Upload a DDPM", "what the commit is called")
    return parser


def add_hub_flags(flag: Callable[..., None]) -> None:
    """Add who may see a repository, and who writes it."""
    flag("--private --hub_private_repo", bool, True, "false: publish for everybody to see")
    text = "better: 'hf auth login' or HF_TOKEN, which other users of the machine cannot see"
    flag("--token --hub_token", str, None, text)


def push(arguments: Sequence[str], prog: str | None = None) -> None:
    """Run `ddpm-hf push`."""
    values = push_parser(prog).parse_args(arguments)
    run = model.run_folder(values)
    from ..hub.publish import Push, quiet_client

    quiet_client()
    options = given(values, "private", "token", "license", "report", "commit_message", "weights")
    print(Push(run, values.repo_id, **options).run())
