"""A Space (a web page on the Hub) for a trained model: written into a folder, or pushed.

write_space("runs/digits", "my-space")          # then: python my-space/app.py
push_space("runs/digits", "org/demo")

my-space/
  README.md           front matter: which gradio, which app, license
  app.py              a page of three limits and a list of models
  requirements.txt    what this package needs
  ddpm_hf/            a copy of this package, as it is not on an index that a Space could install it from
  model/              what `ddpm-hf push` would publish of the run; not there if the Space takes its model by name
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import get_session

from ..utils.errors import UserError
from ..utils.files import flush
from .files import CARD, check_opens, make_snapshot, read_card
from .model_card import check_license, front_matter
from .publish import PushError, check_repo_id, known_token, retried

GRADIO = "6.31.0"  # constraints.txt pins the same
PYTHON = "3.11"
MODEL = "model"
_LARGEST_MODEL = 1_000_000_000  # bytes; the storage of a Space is small
_PACKAGE = "ddpm_hf"
_MARK = f"{_PACKAGE}/space_page.py"  # what tells a Space of ours from another
_HARMLESS = {".gitattributes", "README.md"}  # what the Hub itself puts into a new Space

_APP = '''\
"""A demo of denoising diffusion models: watch them sample, interpolate, measure bits/dim. See README.md."""

import os
from pathlib import Path

from ddpm_hf.space_demo import Limits
from ddpm_hf.space_page import serve

# Folders (here or in the working directory) or names on the Hub, with commas between them; visitors choose one.
MODELS = os.environ.get("DDPM_HF_SPACE_MODELS") or "{models}"
MAX_IMAGES = 16  # that one visitor can ask for at once
MAX_STEPS = 1000  # of the sampler
MAX_WAITING = 20  # visitors in the queue; the next one is told to come later

if __name__ == "__main__":
    serve(MODELS, Limits(MAX_IMAGES, MAX_STEPS, MAX_WAITING), Path(__file__).parent)
'''

_README = """\
A denoising diffusion model (DDPM, [Ho et al. 2020](https://arxiv.org/abs/2006.11239)) to try out: watch images come
out of noise, interpolate between the images of two seeds, measure the bits/dim of an image of your own.

On a machine of your own: `pip install -r requirements.txt gradio=={gradio}`, then `python app.py`. It needs no network
if its models are folders.

- Models: `MODELS` in `app.py`, or the variable `DDPM_HF_SPACE_MODELS`, such as `runs/digits,org/name`. A private model
  needs the Space's secret `HF_TOKEN`.
- Limits: `MAX_IMAGES`, `MAX_STEPS` and `MAX_WAITING` in `app.py`. One request is worked on at a time; the others wait.
"""


@dataclass(frozen=True)
class SpaceFacts:
    """What the texts of a Space say.

    Attributes:
        models: What visitors choose between, with commas.
        title: On the Space's page.
        license: Of the model, if it is known.
        model_id: The model's name on the Hub, for a link to it.
    """

    models: str
    title: str
    license: str | None = None
    model_id: str | None = None

    def files(self) -> dict[str, str]:
        """`app.py`, `README.md` and `requirements.txt`.

        Raises:
            ValueError: This package is not installed, so that its requirements are not known.
        """
        front: dict[str, Any] = {"title": self.title, "emoji": "🎲", "colorFrom": "gray", "colorTo": "blue"}
        front |= {"sdk": "gradio", "sdk_version": GRADIO, "python_version": PYTHON, "app_file": "app.py"}
        front |= {} if self.license is None else {"license": self.license}
        front |= {} if self.model_id is None else {"models": [self.model_id]}
        text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
        return {
            "app.py": _APP.format(models=self.models),
            "README.md": f"---\n{text}---\n\n# {self.title}\n\n{_README.format(gradio=GRADIO)}",
            "requirements.txt": requirements(),
        }


def requirements() -> str:
    """What this package needs, one a line; gradio comes with the Space.

    Raises:
        ValueError: This package is not installed.
    """
    try:
        needs = distribution("ddpm-hf").requires or []
    except PackageNotFoundError:
        raise UserError("ddpm-hf is not installed, so what it needs is not known: pip install . first") from None
    return "\n".join(sorted(need for need in needs if "extra ==" not in need)) + "\n"


def write_space(
    run: str | Path,
    output: str | Path,
    *,
    model_id: str | None = None,
    license: str | None = None,
    token: str | None = None,
) -> None:
    """Write a Space for a trained model into a new folder, which appears complete or not at all.

    Args:
        run: The model's folder; it is copied, as far as `ddpm-hf push` would publish it.
        output: The folder to make.
        model_id: The model's name on the Hub; the Space loads it from there, and holds no copy.
        license: Of the model; what the run's card says if left out.
        token: Must not be in any of the texts.

    Raises:
        OSError, ValueError: There is no DDPM in `run` that opens, or it is too large for a Space, or `output` holds
            something.
    """
    run, output = Path(run), Path(output)
    if not run.is_dir():
        raise OSError(f"there is no folder {str(run)!r}")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"--output {str(output)!r} holds something; name another, or remove it first")
    if model_id is not None:
        check_repo_id(model_id)
    check_license(license)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", suffix=".partial", dir=output.parent))
    try:
        _write(run, staging, model_id, license, token)
        staging.chmod(0o755)  # temporary folders are for their owner only
        for path in (*staging.rglob("*"), staging):
            flush(path)
        staging.replace(output)
        flush(output.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write(run: Path, folder: Path, model_id: str | None, license: str | None, token: str | None) -> None:
    snapshot = make_snapshot(run, token)
    try:
        if license is None and (snapshot / CARD).is_file():
            license = _license_of(read_card(snapshot / CARD))
        if model_id is None:
            size = sum(path.stat().st_size for path in snapshot.rglob("*"))
            if size > _LARGEST_MODEL:
                raise UserError(
                    f"{str(run)!r} has {size / 1e9:.1f} GB, too much for a Space: push it with ddpm-hf push, and name "
                    "it with --model_id"
                )
        check_opens(snapshot, run)
        if model_id is None:
            shutil.copytree(snapshot, folder / MODEL)
    finally:
        shutil.rmtree(snapshot, ignore_errors=True)
    name = run.resolve().name if model_id is None else model_id
    for file, text in SpaceFacts(model_id or MODEL, f"DDPM: {name}", license, model_id).files().items():
        (folder / file).write_text(text, encoding="utf-8")
    package = Path(__file__).parents[1]
    shutil.copytree(
        package, folder / _PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "py.typed")
    )
    if terms := distribution("ddpm-hf").read_text("licenses/LICENSE"):
        (folder / _PACKAGE / "LICENSE").write_text(terms, encoding="utf-8")


def _license_of(card: str) -> str | None:
    """What the front matter of a card says, if it says anything."""
    try:
        said = front_matter(card).get("license")
    except ValueError:
        return None
    return said if isinstance(said, str) else None


# -------------------------------------------------------------------- pushing


def push_space(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    model_id: str | None = None,
    license: str | None = None,
    attempts: int = 5,
    timeout: float = 60.0,
    say: Callable[[str], None] = print,
) -> str:
    """Make a Space for a trained model on the Hub, or renew it, in one commit.

    Args:
        run, model_id, license: See `write_space`.
        repo_id: `namespace/name`, or a name in the token's own namespace; made if it does not exist.
        private: Whether only its owners may use it: a public Space is refused then.
        token: Instead of the one that `hf auth login` or HF_TOKEN left.
        attempts, timeout: See `hub.Push`.
        say: Takes lines for the user.

    Returns:
        The Space's address.

    Raises:
        PushError: It did not happen, in one sentence.
        OSError, ValueError: See `write_space`.
    """
    check_repo_id(repo_id)
    token = known_token(token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "space"
        write_space(run, folder, model_id=model_id, license=license, token=token)

        def attempt() -> str:
            get_session().timeout = timeout  # the client itself would wait for ever
            return _push_once(folder, repo_id, private, token, say)

        return retried(attempt, repo_id, attempts, say)


def _push_once(folder: Path, repo_id: str, private: bool, token: str, say: Callable[[str], None]) -> str:
    api = HfApi(token=token, library_name=_PACKAGE)
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        info = api.space_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        info = api.space_info(repo_id)
    there = {sibling.rfilename for sibling in info.siblings or ()}
    if there - _HARMLESS and _MARK not in there:
        raise PushError(f"{repo_id} is another Space, which a push would overwrite; name another repository")
    if private and info.private is not True:
        raise PushError(f"{repo_id} is public; add --private false to publish there, or name another repository")
    if not private and info.private:
        say(f"{repo_id} is private and stays so; its settings on the Hub can change that")
    address = f"{constants.ENDPOINT}/spaces/{repo_id}"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    stale = sorted(name for name in there - set(names) if name.split("/")[0] in (_PACKAGE, MODEL) and "/" in name)
    say(f"pushing {len(names)} files to {address} ({'private' if info.private else 'public'})")
    commit = api.create_commit(
        repo_id,
        [*(CommitOperationAdd(n, folder / n) for n in names), *(CommitOperationDelete(name) for name in stale)],
        repo_type="space",
        commit_message="Upload a demo of a DDPM",
        parent_commit=info.sha,  # refused if somebody committed since
        num_threads=2,
    )
    if commit.oid == info.sha:
        say(f"{repo_id} already has all of it")
    return address
