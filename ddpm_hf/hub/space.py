"""Write a Space, a web page on the Hub that shows a trained model, into a folder, or push it (see docs/space.md)."""

import shutil
import tempfile
from contextlib import suppress
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import SpaceCard, SpaceCardData, constants
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import get_session

from ..utils.files import check_new_folder, write_directory
from ..utils.hub_errors import open_repository
from .files import CARD, check_folder, check_opens, make_snapshot
from .model_card import check_license
from .publish import PushError, check_repo_id, commit, files_in, known_token, retried

GRADIO = "6.31.0"  # constraints.txt pins the same
PACKAGE, MODEL = "ddpm_hf", "model"
_APP = """\
from ddpm_hf.hub.space_app import serve

serve(__file__, models="{models}", max_images=16, max_steps=1000, max_waiting=20)
"""


def space_texts(models: str, title: str, license: str | None = None, model_id: str | None = None) -> dict[str, str]:
    """Return `app.py`, `README.md` and `requirements.txt`; the page links to `model_id` on the Hub."""
    data = SpaceCardData(title=title, license=license, models=[model_id] if model_id else None)
    card = SpaceCard.from_template(data, str(Path(__file__).with_name("space_card.md")), gradio=GRADIO)
    needs = sorted(need for need in distribution("ddpm-hf").requires or () if "extra ==" not in need)
    return {
        "app.py": _APP.format(models=models),
        "README.md": f"{card}\n",
        "requirements.txt": "\n".join([*needs, ""]),
    }


def write_space(
    run: str | Path,
    output: str | Path,
    model_id: str | None = None,
    license: str | None = None,
    token: Any = None,
    weights: str = "ema",
) -> None:
    """Write a Space for a trained model into a new folder, which appears complete or not at all.

    It gets what `ddpm-hf push` would publish of `run`, with the same `weights`, or loads `model_id` from the Hub.
    `license` is by default what the run's card says; `token` must not be in any of the files. Raises OSError or
    UserError: there is no DDPM in `run` that opens, or `output` is not empty.
    """
    check_new_folder(output := Path(output))
    check_repo_id(model_id or MODEL)
    check_license(license)
    snapshot = make_snapshot(run := Path(run), token, weights)

    def fill(folder: Path) -> None:
        title, stated = f"DDPM: {model_id or run.resolve().name}", license
        with suppress(OSError, ValueError, yaml.YAMLError):  # no card, or one whose front matter cannot be read
            stated = stated or (metadata_load(snapshot / CARD) or {}).get("license")
        for name, text in space_texts(model_id or MODEL, title, stated, model_id).items():
            (folder / name).write_text(text, encoding="utf-8")
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "py.typed", "digits")
        shutil.copytree(Path(__file__).parents[1], folder / PACKAGE, ignore=ignored)
        terms = distribution("ddpm-hf").read_text("licenses/LICENSE")
        (folder / PACKAGE / "LICENSE").write_text(terms or "", encoding="utf-8")
        if model_id is None:
            shutil.copytree(snapshot, folder / MODEL)

    try:
        check_opens(snapshot, run)
        write_directory(output, fill)
    finally:
        shutil.rmtree(snapshot, ignore_errors=True)


def push_space(run: str | Path, repo_id: str, private: bool = True, token: str | None = None, **options: Any) -> str:
    """Make a Space on the Hub, or renew it, in one commit; return its address. See `write_space`, `publish.Push`."""
    check_repo_id(repo_id)
    check_folder(Path(run))
    token = known_token(token)

    def push() -> str:
        get_session().timeout = 60.0  # the client itself would wait for ever
        to = open_repository(repo_id, private, token, "space")
        on_hub = {sibling.rfilename for sibling in to.siblings or ()}
        # The Hub puts two files into a new Space; every Space of ours has a copy of the package.
        if on_hub - {".gitattributes", "README.md"} and f"{PACKAGE}/__init__.py" not in on_hub:
            raise PushError(f"{to.id} is another Space, which a push would overwrite; name another repository")
        old = [name for name in on_hub if name.startswith((f"{PACKAGE}/", f"{MODEL}/"))]
        commit(to, files_in(folder), old, print, token, commit_message="Upload a demo of a DDPM")
        return f"{constants.ENDPOINT}/spaces/{to.id}"

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "space"
        write_space(run, folder, token=token, **options)
        return retried(push, repo_id, 5, print)
