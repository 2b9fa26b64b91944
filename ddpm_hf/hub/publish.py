"""How a model gets to the Hub, in one commit.

    Push("runs/digits", "org/ddpm-digits").run()

Only what `files.published_files` lists is uploaded, from a snapshot taken first, so that a run which writes its next
model meanwhile cannot mix two of them. What was uploaded once is not uploaded again, so a push that was interrupted is
finished by calling it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, get_session, validate_repo_id
from huggingface_hub.utils import logging as hub_logging

from ..evaluation.report import EvaluationReport
from ..utils import hub_errors
from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.hub_errors import INDEX, is_passing, open_repository
from .files import CARD, REPORT, SAMPLES, check_opens, make_snapshot, read_card, take_report
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
    """What to push where.

    Attributes:
        folder: What a training run, `save_pretrained` or `convert` wrote; also a stopped run, or a checkpoint.
        repo_id: `namespace/name`, or a name in the token's own namespace; made if it does not exist.
        private: Whether only its owners may see what is pushed: a public repository is refused then. `False` makes a
            new repository public; an existing one stays what it is.
        token: Instead of the one that `hf auth login` or HF_TOKEN left.
        license: Such as `apache-2.0`, for the card.
        report: An evaluation to put on the card and beside it, instead of the folder's `evaluation.json`: a file, or a
            folder with `report.json`.
        commit_message: What the commit is called.
        attempts: How often to try where the network or the Hub fails; 1, 2, 4, ... seconds in between.
        timeout: Seconds without any answer that count as such a failure.
        create_pr: Propose the commit as a pull request instead of making it.
        weights: `raw` for a checkpoint's weights in training, instead of the EMA weights.

    Raises:
        ValueError: An argument cannot be taken.
    """

    folder: str
    repo_id: str
    private: bool = True
    token: str | None = field(default=None, repr=False)
    license: str | None = None
    report: str | None = None
    commit_message: str = "Upload a DDPM"
    attempts: int = 5
    timeout: float = 60.0
    create_pr: bool = False
    weights: str = "ema"

    def __post_init__(self) -> None:
        check_repo_id(self.repo_id)
        check_license(self.license)

    @property
    def command(self) -> str:
        """What a person types to do it; tokens are not for command lines."""
        words = ["ddpm-hf", "push", self.folder, "--repo_id", self.repo_id]
        words += [] if self.weights == "ema" else ["--weights", self.weights]
        words += [] if self.private else ["--private", "false"]
        words += ["--license", self.license] if self.license is not None else []
        words += ["--report", self.report] if self.report is not None else []
        return shlex.join(words)

    def run(self, log: Callable[[str], None] = print) -> str:
        """Publish the folder on the Hub in one commit; `log` takes lines for the user.

        A generated card is renewed: its snippets name the repository, its numbers are those of `evaluation.json`. A
        card that a person has edited, here or on the Hub, stays as it is.

        Returns:
            The address of the commit or the pull request.

        Raises:
            PushError: It did not happen, in one sentence; everything is still on disk.
            OSError, ValueError: There is no DDPM in the folder that opens, or an argument cannot be taken.
        """
        folder = Path(self.folder)
        if not folder.is_dir():
            raise OSError(f"there is no folder {self.folder!r}")
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
        where = _describe(to)
        size = sum(path.stat().st_size for path in snapshot.rglob("*") if path.is_file())
        log(f"pushing {size / 1e6:.1f} MB to {where}")
        if to.private and not self.private:
            log(f"{to.id} is private and stays so; its settings on the Hub can change that")
        card = self._card(snapshot, to, self._remote_text(to, CARD) if CARD in on_hub else None, log)
        if card is not None:
            (snapshot / CARD).write_text(card, encoding="utf-8")
        names = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
        parts = {name.split("/")[0] for name in names if "/" in name}
        stale = [name for name in on_hub if name.split("/")[0] in parts and _WEIGHT_FILES.fullmatch(name)]
        if stale := sorted({*stale} - {*names}):
            log(f"removing weights of an earlier model: {', '.join(stale)}")
        api = HfApi(token=self.token, library_name="ddpm_hf")
        adding = [CommitOperationAdd(name, snapshot / name) for name in names if name != CARD or card is not None]
        # One file at a time: several would be uploaded in threads, for which Python waits when it ends.
        for file in adding:
            if not file.path_in_repo.endswith((".json", ".md")):
                api.preupload_lfs_files(to.id, [file], create_pr=self.create_pr, free_memory=False)
        commit = api.create_commit(
            to.id,
            [*adding, *(CommitOperationDelete(name) for name in stale)],
            commit_message=self.commit_message,
            parent_commit=to.sha,  # refused if somebody committed since: then the card is looked at again
            create_pr=self.create_pr,
        )
        if self.create_pr:
            log(f"proposed to {where}: {commit.pr_url}")
            return str(commit.pr_url)
        if card is not None:
            pushed = self._pushed_cards() | {to.id: _sha256(card)}
            with suppress(OSError):  # without it, the next push takes what is on the Hub for edited there
                write_text(Path(self.folder) / _PUSHED_CARDS, json.dumps(pushed, indent=2) + "\n")
        log(f"{to.id} already has all of it" if commit.oid == to.sha else f"pushed to {where}")
        return f"{constants.ENDPOINT}/{to.id}/commit/{commit.oid}"

    def open(self) -> tuple[ModelInfo, list[str]]:
        """Return the repository, which is made if it does not exist, and the names of its files.

        Raises:
            UserError: It is public although `private=True`, or holds something else than a DDPM.
        """
        get_session().timeout = self.timeout  # the client itself would wait for ever
        to = open_repository(self.repo_id, self.private, self.token)
        on_hub = [sibling.rfilename for sibling in to.siblings or ()]
        holds = next((name for name in on_hub if name.endswith(_WEIGHTS_OF_OTHERS)), "DDPMPipeline")
        if INDEX in on_hub:
            holds = json.loads(self._remote_text(to, INDEX)).get("_class_name")
        if holds not in ("DDPMPipeline", "DDIMPipeline"):
            raise PushError(
                f"{to.id} holds another model ({holds}), which a push would overwrite; name another repository"
            )
        return to, on_hub

    def _card(self, snapshot: Path, to: ModelInfo, remote: str | None, log: Callable[[str], None]) -> str | None:
        """Return the card to publish; `None` where the one on the Hub stays, because it was edited there."""
        own = read_card(snapshot / CARD) if (snapshot / CARD).exists() else ""
        facts = generated_facts(own) if own else CardFacts("")
        form = _ONLY_LICENSE.fullmatch(remote or "")
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
                license=self.license or facts.license or (form and form[1]),
            )
            card = make_card(ModelFacts.read(snapshot), facts)
        if remote is None or remote == card or form or generated_facts(remote) is not None:
            return card
        if _sha256(remote) == self._pushed_cards().get(to.id):  # edited here, not there
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


def _describe(to: ModelInfo) -> str:
    return f"{constants.ENDPOINT}/{to.id} ({'private' if to.private else 'public'})"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_repo_id(repo_id: str) -> None:
    """Check a repository's name as the Hub does.

    Raises:
        ValueError: The Hub takes no such name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(
            f"{repo_id!r} is no repository name; write org/name, of letters, digits, '-', '_', '.'"
        ) from None


def known_token(token: str | None) -> str:
    """Return the token that was given, or the one that `hf auth login` or HF_TOKEN left.

    Raises:
        PushError: There is none, or the network is switched off.
    """
    if constants.HF_HUB_OFFLINE:
        raise PushError("nothing can be pushed while HF_HUB_OFFLINE is set")
    if not (token := token or get_token()):
        raise PushError("pushing needs a token with write access: 'hf auth login', or set HF_TOKEN")
    return token


def check_destination(push: Push, log: Callable[[str], None] = print) -> Push:
    """Check before a long run that its pushes will be possible; the repository is made if it does not exist.

    Returns:
        The push, with its token and the repository's full name.

    Raises:
        UserError: They will not be. A Hub that does not answer now is no such reason.
    """
    push = dataclasses.replace(push, token=known_token(push.token))
    try:
        to, _ = hub_errors.retried(push.open, push.repo_id, waits=())
    except OSError as error:
        if not is_passing(error):
            raise PushError(f"cannot push to {push.repo_id}: {error}") from error
        log(f"cannot reach {push.repo_id} ({error}); training starts, and pushes when the Hub answers")
        return push
    log(f"will push to {_describe(to)}")
    return dataclasses.replace(push, repo_id=to.id)


def retried(attempt: Callable[[], str], repo_id: str, attempts: int, log: Callable[[str], None]) -> str:
    """Return what `attempt` returns, after failures of the network and the Hub were waited out: 1, 2, 4, ... s.

    Raises:
        PushError: It failed for another reason, or too often.
    """
    try:
        return hub_errors.retried(attempt, repo_id, [2**number for number in range(attempts - 1)], log)
    except OSError as error:
        tried = f", tried {attempts} times" if is_passing(error) else ""
        raise PushError(f"could not push to {repo_id}{tried}: {error}") from error


def quiet_client() -> None:
    """Switch off the client's own progress bars and warnings, whose addresses may be signed."""
    disable_progress_bars()
    hub_logging.set_verbosity_error()
