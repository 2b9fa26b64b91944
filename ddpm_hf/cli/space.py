"""`ddpm-hf space`: a web page on the Hub to try a model out."""

from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import UserError
from . import model
from .command_line import Parser, given
from .push import add_hub_flags


def space_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf space`."""
    parser = Parser(prog, "Make a web page (a Space) of a trained model.", "RUN [flags]")
    flag = parser.group("model and page")
    model.add_run(flag)
    flag("--output", str, None, "only write it into this folder, to run FOLDER/app.py")
    flag("--license", str, None, "of the model; default: what its card says")
    flag = parser.group("Hub")
    flag("--repo_id", str, None, "org/name of the Space; made or renewed")
    flag("--model_id", str, None, "load the model by this name on the Hub, and copy none")
    add_hub_flags(flag)
    return parser


def space(arguments: Sequence[str], prog: str | None = None) -> None:
    """Run `ddpm-hf space`."""
    values = space_parser(prog).parse_args(arguments)
    run = model.run_folder(values)
    if (values.repo_id is None) == (values.output is None):
        raise UserError("give --repo_id org/name to push the Space, or --output FOLDER to write it here: one of them")
    from ..hub.publish import quiet_client
    from ..hub.space import push_space, write_space

    quiet_client()
    options = given(values, "model_id", "license", "token", "weights")
    if values.output is None:
        print(push_space(run, values.repo_id, private=values.private, **options))
    else:
        write_space(run, values.output, **options)
        print(f"wrote {values.output}; try it with: python {Path(values.output) / 'app.py'}")
