"""Write a Space, a web page on the Hub that shows a trained model, into a folder, or push it.

my-space/
  README.md           front matter: which gradio, which app, license
  app.py              starts the page (`space_app.py`) with its models and limits: python my-space/app.py
  requirements.txt    what this package needs
  ddpm_hf/            a copy of this package, which is on no index that a Space could install it from
  model/              what `ddpm-hf push` would publish of the run; missing where the model comes from the Hub
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, SpaceCardData, constants
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import get_session

from ..utils.errors import UserError
from ..utils.files import write_directory
from .files import CARD, check_opens, make_snapshot
from .model_card import check_license
from .publish import PushError, check_repo_id, known_token, retried

GRADIO = "6.31.0"  # constraints.txt pins the same
PACKAGE, MODEL = "ddpm_hf", "model"
_LARGEST_MODEL = 1_000_000_000  # bytes; the storage of a Space is small
_APP = '''\
"""A demo of denoising diffusion models: watch them sample, interpolate, measure bits/dim. See README.md."""

from ddpm_hf.hub.space_app import serve

MODELS = "{models}"  # folders (here or in the working directory) or names on the Hub, with commas between them
MAX_IMAGES = 16  # that one visitor can ask for at once
MAX_STEPS = 1000  # of the sampler
MAX_WAITING = 20  # visitors in the queue; the next one is told to come later

if __name__ == "__main__":
    serve(__file__, MODELS, MAX_IMAGES, MAX_STEPS, MAX_WAITING)
'''


def space_texts(models: str, title: str, license: str | None = None, model_id: str | None = None) -> dict[str, str]:
    """Return `app.py`, `README.md` and `requirements.txt`; the page links to `model_id` on the Hub."""
    data = SpaceCardData(title=title, license=license, models=[model_id] if model_id else None)
    card = SpaceCard.from_template(data, str(Path(__file__).with_name("space_card.md")), gradio=GRADIO)
    needs = (need for need in distribution("ddpm-hf").requires or () if "extra ==" not in need)
    return {
        "app.py": _APP.format(models=models),
        "README.md": f"{card}\n",
        "requirements.txt": "\n".join(sorted(needs)) + "\n",
    }


def write_space(
    run: str | Path,
    output: str | Path,
    model_id: str | None = None,
    license: str | None = None,
    token: str | None = None,
    weights: str = "ema",
) -> None:
    """Write a Space for a trained model into a new folder, which appears complete or not at all.

    Args:
        run: The model's folder, which is copied as far as `ddpm-hf push` would publish it; also a stopped run, or a
            checkpoint.
        output: The folder to make.
        model_id: The model's name on the Hub, from where the Space then loads it instead of holding a copy.
        license: The model's license; by default what the run's card says.
        token: An access token, which must not be in any of the files.
        weights: `raw` for a checkpoint's weights in training, instead of the EMA weights.

    Raises:
        OSError, UserError: There is no DDPM in `run` that opens, it is too large, or `output` is not empty.
    """
    run, output = Path(run), Path(output)
    if not run.is_dir():
        raise OSError(f"there is no folder {str(run)!r}")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"--output {str(output)!r} is not empty; name another folder, or remove it first")
    check_repo_id(model_id or MODEL)
    check_license(license)
    snapshot = make_snapshot(run, token, weights)

    def fill(folder: Path) -> None:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "py.typed")
        shutil.copytree(Path(__file__).parents[1], folder / PACKAGE, ignore=ignored)
        terms = distribution("ddpm-hf").read_text("licenses/LICENSE")
        (folder / PACKAGE / "LICENSE").write_text(terms or "", encoding="utf-8")
        if model_id is None:
            shutil.copytree(snapshot, folder / MODEL)

    try:
        size = sum(path.stat().st_size for path in snapshot.rglob("*")) / 1e9
        if model_id is None and size > _LARGEST_MODEL / 1e9:
            how = "push it with ddpm-hf push, and name it with --model_id"
            raise UserError(f"{str(run)!r} has {size:.1f} GB, too much for a Space: {how}")
        check_opens(snapshot, run)
        title = f"DDPM: {model_id or run.resolve().name}"
        texts = space_texts(model_id or MODEL, title, license or _license_of(snapshot / CARD), model_id)
        write_directory(output, fill)
    finally:
        shutil.rmtree(snapshot, ignore_errors=True)


def _license_of(card: Path) -> str | None:
    try:
        license = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):  # no card, or one whose front matter cannot be read
        return None
    return license if isinstance(license, str) else None


def push_space(run: str | Path, repo_id: str, private: bool = True, token: str | None = None, **options: Any) -> str:
    """Make a Space for a trained model on the Hub, or renew it, in one commit; return its address.

    Args:
        run, options: See `write_space`.
        repo_id: `namespace/name`, or a name in the token's own namespace; made if it does not exist.
        private: Whether only its owners may see it: a public Space is refused then.
        token: Instead of the one that `hf auth login` or HF_TOKEN left.

    Raises:
        OSError, UserError: It did not happen, in one sentence.
    """
    check_repo_id(repo_id)
    token = known_token(token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "space"
        write_space(run, folder, token=token, **options)
        return retried(lambda: _commit(folder, repo_id, private, token), repo_id, 5, print)


def _commit(folder: Path, repo_id: str, private: bool, token: str) -> str:
    get_session().timeout = 60.0  # the client itself would wait for ever
    api = HfApi(token=token, library_name=PACKAGE)
    repo_id = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True).repo_id
    info = api.space_info(repo_id)
    on_hub = {sibling.rfilename for sibling in info.siblings or ()}
    # The Hub puts two files into a new Space; every Space of ours has a copy of the package.
    if on_hub - {".gitattributes", "README.md"} and f"{PACKAGE}/__init__.py" not in on_hub:
        raise PushError(f"{repo_id} is another Space, which a push would overwrite; name another repository")
    if private and info.private is not True:
        raise PushError(f"{repo_id} is public; add --private false to publish there, or name another repository")
    address = f"{constants.ENDPOINT}/spaces/{repo_id}"
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = [name for name in sorted(on_hub - set(files)) if name.startswith((f"{PACKAGE}/", f"{MODEL}/"))]
    print(f"pushing {len(files)} files to {address} ({'private' if info.private else 'public'})")
    commit = api.create_commit(
        repo_id,
        [*(CommitOperationAdd(*file) for file in files.items()), *(CommitOperationDelete(name) for name in stale)],
        repo_type="space",
        commit_message="Upload a demo of a DDPM",
        parent_commit=info.sha,  # refused if somebody has committed since
    )
    if commit.oid == info.sha:
        print(f"{repo_id} already has all of it")
    return address
