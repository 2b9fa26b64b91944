"""How a model gets to the Hub, in one commit.

    Push("runs/digits", "org/ddpm-digits").run()

Only what `files.published_files` lists is uploaded, from a snapshot taken first, so that a run which writes its next
model meanwhile cannot mix two of them. What was uploaded once is not uploaded again when a push is repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, get_session, get_token, validate_repo_id
from huggingface_hub.utils import logging as hub_logging

from ..evaluation.report import EvaluationReport
from ..utils import hub_errors
from ..utils.errors import UserError
from ..utils.files import write_text
from .files import (
    CARD,
    CURVE,
    INDEX,
    REPORT,
    SAMPLES,
    check_folder,
    check_opens,
    make_snapshot,
    read_card,
    take_report,
)
from .model_card import CardFacts, ModelFacts, check_license, generated_facts, make_card

_WEIGHT_FILES = re.compile(r"[^/]+/.*\.(safetensors|bin|ckpt|msgpack|h5|index(\.\w+)?\.json)")
# The card of a repository that was made on the Hub's page: the license that was chosen there, and nothing else.
_ONLY_LICENSE = re.compile(r"\s*---\s+license: ([\w.+-]+)\s+---\s*")
_WEIGHTS_OF_OTHERS = (".safetensors", ".bin", ".gguf", ".onnx", ".pt", ".ckpt")
# The cards that were pushed last from a folder, as SHA-256, so that an edit on the Hub can be told from one here.
_PUSHED_CARDS = ".hub.json"


class PushError(UserError):
    """A push did not happen; the message says why, and that nothing is lost."""


@dataclass(frozen=True)
class Push:
    """What to push where; raises a UserError for a name or license that the Hub does not take."""

    folder: str  # what a training run, `save_pretrained` or `convert` wrote; also a stopped run, or a checkpoint
    repo_id: str  # `namespace/name`, or a name in the token's own namespace; made if it does not exist
    private: bool = True  # as for `hub_errors.open_repository`
    token: str | None = field(default=None, repr=False)  # else the one that `hf auth login` or HF_TOKEN left
    license: str | None = None  # such as `apache-2.0`, for the card
    report: str | None = None  # a file or folder for `files.take_report`, instead of the folder's `evaluation.json`
    commit_message: str = "Upload a DDPM"
    attempts: int = 5  # where the network or the Hub fails; 1, 2, 4, ... seconds in between
    timeout: float = 60.0  # seconds without any answer that count as such a failure
    create_pr: bool = False  # propose the commit as a pull request instead of making it
    weights: str = "ema"  # `raw` for a checkpoint's weights in training

    def __post_init__(self) -> None:
        check_repo_id(self.repo_id)
        check_license(self.license)

    @property
    def command(self) -> str:
        """What a person types to do it; tokens are not for command lines."""
        words = ["ddpm-hf", "push", self.folder, "--repo_id", self.repo_id]
        words += [] if self.weights == "ema" else ["--weights", self.weights]
        words += [] if self.private else ["--private", "false"]
        for flag, value in {"--license": self.license, "--report": self.report}.items():
            words += [flag, value] if value is not None else []
        return shlex.join(words)

    def run(self, log: Callable[[str], None] = print) -> str:
        """Publish the folder on the Hub in one commit; `log` takes lines for the user.

        A generated card is renewed: its snippets name the repository, its numbers are those of `evaluation.json`. A
        card that a person has edited, here or on the Hub, stays as it is.

        Returns the address of the commit or the pull request. Raises PushError if it did not happen (everything is
        still on disk), OSError or UserError if there is no DDPM in the folder that opens.
        """
        check_folder(folder := Path(self.folder))
        token = known_token(self.token)
        snapshot = make_snapshot(folder, token, self.weights)
        try:
            check_opens(snapshot, folder)
            if self.report is not None:
                take_report(Path(self.report), snapshot, token)
            return dataclasses.replace(self, token=token).push_snapshot(snapshot, log)
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    def push_snapshot(self, snapshot: Path, log: Callable[[str], None]) -> str:
        """Do what `run` does, with a snapshot that was made and opened before; the token must be known."""
        return retried(lambda: self._commit(snapshot, log), self.repo_id, self.attempts, log)

    def _commit(self, snapshot: Path, log: Callable[[str], None]) -> str:
        to, on_hub = self.open()
        card = self._card(snapshot, to, self._remote_text(to, CARD) if CARD in on_hub else None, log)
        if card is not None:
            (snapshot / CARD).write_text(card, encoding="utf-8")
        files = files_in(snapshot)
        if card is None:
            files.pop(CARD, None)
        parts = {name.split("/")[0] for name in files if "/" in name}
        old = [name for name in on_hub if name.split("/")[0] in parts and _WEIGHT_FILES.fullmatch(name)]
        made = commit(to, files, old, log, self.token, commit_message=self.commit_message, create_pr=self.create_pr)
        if card is not None and not self.create_pr:
            pushed = self._pushed_cards() | {to.id: _sha256(card)}
            with suppress(OSError):  # without it, the next push takes what is on the Hub for edited there
                write_text(Path(self.folder) / _PUSHED_CARDS, json.dumps(pushed, indent=2) + "\n")
        return str(made.pr_url or made.commit_url)

    def open(self) -> tuple[ModelInfo, list[str]]:
        """Return the repository, which is made if it does not exist, and the names of its files, or raise a UserError.

        That is where it is public although `private=True`, or holds something else than a DDPM.
        """
        get_session().timeout = self.timeout  # the client itself would wait for ever
        to = hub_errors.open_repository(self.repo_id, self.private, self.token)
        return to, self._files_of_ddpm(to)

    def _files_of_ddpm(self, to: ModelInfo) -> list[str]:
        on_hub = [sibling.rfilename for sibling in to.siblings or ()]
        holds = next((name for name in on_hub if name.endswith(_WEIGHTS_OF_OTHERS)), "DDPMPipeline")
        if INDEX in on_hub:
            holds = json.loads(self._remote_text(to, INDEX)).get("_class_name")
        if holds not in ("DDPMPipeline", "DDIMPipeline"):
            raise PushError(f"{to.id} holds another model ({holds}), which a push would overwrite; name another one")
        return on_hub

    def describe_destination(self) -> str:
        """Return where it would go, or raise UserError: it would not be possible; nothing is changed on the Hub."""
        push = dataclasses.replace(self, token=known_token(self.token))
        get_session().timeout = self.timeout

        def find() -> str:
            name, to = hub_errors.find_repository(self.repo_id, self.private, push.token)
            if to is None:
                return f"{constants.ENDPOINT}/{name} ({'private' if self.private else 'public'}), which will be made"
            push._files_of_ddpm(to)
            return describe(to)

        try:
            return hub_errors.retried(find, self.repo_id)
        except OSError as error:
            raise PushError(f"cannot push to {self.repo_id}: {error}") from error

    def _card(self, snapshot: Path, to: ModelInfo, remote: str | None, log: Callable[[str], None]) -> str | None:
        """Return the card to publish; `None` where the one on the Hub stays, because it was edited there."""
        own = read_card(snapshot / CARD) if (snapshot / CARD).exists() else ""
        facts = generated_facts(own) if own else CardFacts("")
        unwritten = _ONLY_LICENSE.fullmatch(remote or "")
        if facts is None:
            log(f"{CARD} was edited, so it is published as it is: without new numbers, snippets or license")
            card = own
        else:
            samples = sorted(path.name for path in snapshot.glob("samples*"))
            report = EvaluationReport.load(snapshot / REPORT) if (snapshot / REPORT).exists() else None
            facts = dataclasses.replace(
                facts,
                name=to.id,
                report=None if report is None else dataclasses.asdict(report),
                sample=SAMPLES if SAMPLES in samples else next(reversed(samples), None),
                curve=CURVE if (snapshot / CURVE).exists() else None,
                license=self.license or facts.license or (unwritten and unwritten[1]),
            )
            card = make_card(ModelFacts.read(snapshot), facts)
        replaced = remote is None or remote == card or unwritten or generated_facts(remote) is not None
        if replaced or _sha256(remote or "") == self._pushed_cards().get(to.id):  # edited here, not there
            return card
        log(f"{CARD} was edited on the Hub and stays as it is there; yours stays here")
        return None

    def _remote_text(self, to: ModelInfo, name: str) -> str:
        """Return a file of the repository, kept out of the cache: there it would make half of a model."""
        with tempfile.TemporaryDirectory() as folder:
            path = HfApi(token=self.token).hf_hub_download(to.id, name, revision=to.sha, local_dir=folder)
            return Path(path).read_text(encoding="utf-8")

    def _pushed_cards(self) -> dict[str, str]:
        try:
            return dict(json.loads((Path(self.folder) / _PUSHED_CARDS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def files_in(folder: Path) -> dict[str, Path]:
    """Return the files of a folder and its subfolders by their names in a repository."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def describe(to: Any) -> str:
    """Return where a repository is that `hub_errors.open_repository` found, and who sees it."""
    prefix = "" if isinstance(to, ModelInfo) else "spaces/"
    return f"{constants.ENDPOINT}/{prefix}{to.id} ({'private' if to.private else 'public'})"


def commit(
    to: Any, files: dict[str, Path], old: Iterable[str], log: Callable[[str], None], token: str | None, **options: Any
) -> CommitInfo:
    """Upload files, by their names there, in one commit that also removes the `old` ones that are not among them.

    `to` is what `hub_errors.open_repository` returned: where somebody has committed since, this fails in passing.
    `options` are those of `HfApi.create_commit`.
    """
    api, kind = HfApi(token=token, library_name="ddpm_hf"), "model" if isinstance(to, ModelInfo) else "space"
    log(f"pushing {sum(path.stat().st_size for path in files.values()) / 1e6:.1f} MB to {describe(to)}")
    if stale := sorted({*old} - {*files}):
        log(f"removing files of an earlier push: {', '.join(stale)}")
    adding = [CommitOperationAdd(*file) for file in files.items()]
    # One file at a time: several would be uploaded in threads, for which Python waits when it ends.
    for file in adding:
        if not file.path_in_repo.endswith((".json", ".md", ".py", ".txt")):
            pull = options.get("create_pr", False)
            api.preupload_lfs_files(to.id, [file], repo_type=kind, create_pr=pull, free_memory=False)
    removing = [CommitOperationDelete(name) for name in stale]
    made = api.create_commit(to.id, [*adding, *removing], repo_type=kind, parent_commit=to.sha, **options)
    log(f"{to.id} already has all of it" if made.oid == to.sha else f"pushed to {made.pr_url or describe(to)}")
    return made


def check_repo_id(repo_id: str) -> None:
    """Raise a UserError for a name that the Hub gives to no repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        why = "write org/name, of letters, digits, '-', '_', '.'"
        raise UserError(f"{repo_id!r} is no repository name; {why}") from error


def known_token(token: str | None) -> str:
    """Return the token that was given, or the one that `hf auth login` or HF_TOKEN left, or raise a PushError."""
    if constants.HF_HUB_OFFLINE:
        raise PushError("nothing can be pushed while HF_HUB_OFFLINE is set")
    if not (token := token or get_token()):
        raise PushError("pushing needs a token with write access: 'hf auth login', or set HF_TOKEN")
    return token


def check_destination(push: Push, log: Callable[[str], None] = print) -> Push:
    """Check before a long run that its pushes will be possible, as far as the Hub answers; make the repository.

    Returns the push, with its token and the repository's full name. Raises UserError where they will not be.
    """
    push = dataclasses.replace(push, token=known_token(push.token))
    try:
        to, _ = hub_errors.retried(push.open, push.repo_id, waits=())
    except OSError as error:
        if not hub_errors.is_passing(error):
            raise PushError(f"cannot push to {push.repo_id}: {error}") from error
        log(f"cannot reach {push.repo_id} ({error}); training starts, and pushes when the Hub answers")
        return push
    log(f"will push to {describe(to)}")
    return dataclasses.replace(push, repo_id=to.id)


def retried(attempt: Callable[[], str], repo_id: str, attempts: int, log: Callable[[str], None]) -> str:
    """Return what `attempt` returns, waiting out failures of network and Hub for 1, 2, 4, ... s; else a PushError."""
    try:
        return hub_errors.retried(attempt, repo_id, [2**number for number in range(attempts - 1)], log)
    except OSError as error:
        tried = f", tried {attempts} times" if hub_errors.is_passing(error) else ""
        raise PushError(f"could not push to {repo_id}{tried}: {error}") from error


def quiet_client() -> None:
    """Switch off the client's own progress bars and warnings, whose addresses may be signed."""
    disable_progress_bars()
    hub_logging.set_verbosity_error()
