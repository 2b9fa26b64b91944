"""How a model gets to the Hub, in one commit.

    push("runs/digits", "org/ddpm-digits")

Only what `hub_files.published_files` lists is uploaded, from a snapshot taken first, so that a run which writes its
next model meanwhile cannot mix two of them. What was uploaded once is not uploaded again, so a push that broke off is
finished by calling it again.

As a program (`python -m ddpm_hf.hub`, a job as JSON on its standard input) it pushes on behalf of a training run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, get_session, validate_repo_id
from huggingface_hub.utils import logging as hub_logging

from ..evaluation.report import EvaluationReport
from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.hub_errors import is_passing, sentence
from .files import CARD, INDEX, REPORT, SAMPLES, check_opens, make_snapshot, read_card, take_report
from .model_card import CardFacts, ModelFacts, check_license, make_card, merge_cards, text_outside

_WEIGHT_FILES = re.compile(r"[^/]+/.*\.(safetensors|bin|ckpt|msgpack|h5|index(\.\w+)?\.json)")
# What a card was when it was pushed last from here, so that an edit on the Hub can be told from one here.
_RECORD = ".hub.json"


class PushError(UserError):
    """A push did not happen; the message says why, and that nothing is lost."""


# -------------------------------------------------------------------- the destination


@dataclass(frozen=True)
class Destination:
    """A repository that exists and may be written to.

    Attributes:
        repo_id: `namespace/name`.
        private: Whether only its owners see it.
        head: Its last commit.
        files: What is in it.
    """

    repo_id: str
    private: bool
    head: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        kind = "private" if self.private else "public"
        return f"{constants.ENDPOINT}/{self.repo_id} ({kind})"


def check_repo_id(repo_id: str) -> None:
    """A repository's name, as the Hub takes it.

    Raises:
        ValueError: It is something else.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(
            f"{repo_id!r} is no repository name; write org/name, of letters, digits, '-', '_', '.'"
        ) from None


def known_token(token: str | None) -> str:
    """The token that was given, or the one that `hf auth login` or HF_TOKEN left.

    Raises:
        PushError: There is none, or the network is switched off.
    """
    if constants.HF_HUB_OFFLINE:
        raise PushError("nothing can be pushed while HF_HUB_OFFLINE is set")
    token = token or get_token()
    if token is None:
        raise PushError("pushing needs a token with write access: 'hf auth login', or set HF_TOKEN")
    return token


def open_destination(repo_id: str, private: bool, token: str) -> Destination:
    """The repository to push to, made if it does not exist.

    Args:
        repo_id: `namespace/name`, or a name in the token's own namespace.
        private: Whether only its owners may see what is pushed. `False` makes a new repository public; an existing one
            stays what it is.
        token: With write access.

    Raises:
        PushError: It is public although `private=True`, or holds something else.
    """
    api = HfApi(token=token, library_name="ddpm_hf")
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
    if private and info.private is not True:
        raise PushError(
            f"{repo_id} is public; add --private false (in training --hub_private_repo false), in Python "
            "private=False, to publish there, or name another repository"
        )
    files = tuple(sibling.rfilename for sibling in info.siblings or ())
    to = Destination(repo_id, bool(info.private), str(info.sha), files)
    weights = [name for name in files if name.endswith((".safetensors", ".bin", ".gguf", ".onnx", ".pt", ".ckpt"))]
    if INDEX in files:
        holds = json.loads(_remote_text(to, INDEX, token)).get("_class_name")
    else:
        holds = weights[0] if weights else "DDPMPipeline"
    if holds not in ("DDPMPipeline", "DDIMPipeline"):
        raise PushError(
            f"{repo_id} holds another model ({holds}), which a push would overwrite; name another repository"
        )
    return to


def check_destination(push: Push, say: Callable[[str], None] = print, timeout: float = 10.0) -> Push:
    """Before a long run: whether its pushes will be possible. The repository is made, and nothing is put into it.

    Returns:
        The push, with its token and the repository's full name.

    Raises:
        PushError: They will not be. A Hub that does not answer now is no such reason.
    """
    push = dataclasses.replace(push, token=known_token(push.token))
    assert push.token is not None
    session = get_session()
    before, session.timeout = session.timeout, timeout
    try:
        to = open_destination(push.repo_id, push.private, push.token)
    except PushError:
        raise
    except Exception as error:  # whatever the client's libraries raise
        why = _why(error, push.repo_id)
        if not is_passing(error):
            raise PushError(f"cannot push to {push.repo_id}: {why}") from error
        say(f"cannot reach {push.repo_id} ({why}); the run goes on, and pushes when the Hub answers")
        return push
    finally:
        session.timeout = before
    say(f"will push to {to}")
    return dataclasses.replace(push, repo_id=to.repo_id)


def _why(error: BaseException, repo_id: str) -> str:
    hidden = isinstance(error, RepositoryNotFoundError)
    return "this token does not see that repository" if hidden else sentence(error, repo_id)


# -------------------------------------------------------------------- the push


@dataclass(frozen=True)
class Push:
    """What to push where.

    Attributes:
        folder: What a training run, `save_pretrained` or `convert` wrote.
        repo_id: `namespace/name`, or a name in the token's own namespace; made if it does not exist.
        private: Whether only its owners may see what is pushed: a public repository is refused then.
        token: Instead of the one that `hf auth login` or HF_TOKEN left.
        license: Such as `apache-2.0`, for the card.
        report: An evaluation to put on the card and beside it, instead of the folder's `evaluation.json`: a file, or a
            folder with `report.json`.
        commit_message: What the commit is called.
        attempts: How often to try where the network or the Hub fails; 1, 2, 4, ... seconds in between.
        timeout: Seconds without any answer that count as such a failure.
        create_pr: Propose the commit as a pull request instead of making it.

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

    def __post_init__(self) -> None:
        check_repo_id(self.repo_id)
        check_license(self.license)

    @property
    def command(self) -> str:
        """What a person types to do it; tokens are not for command lines."""
        words = ["ddpm-hf", "push", self.folder, "--repo_id", self.repo_id]
        words += [] if self.private else ["--private", "false"]
        words += ["--license", self.license] if self.license is not None else []
        words += ["--report", self.report] if self.report is not None else []
        return shlex.join(words)

    def run(self, say: Callable[[str], None] = print) -> str:
        """See `push`."""
        if not Path(self.folder).is_dir():
            raise OSError(f"there is no folder {self.folder!r}")
        with_token = dataclasses.replace(self, token=known_token(self.token))
        staging = make_snapshot(Path(self.folder), with_token.token)
        try:
            check_opens(staging, Path(self.folder))
            if self.report is not None:
                take_report(Path(self.report), staging, with_token.token)
            return with_token.run_from(staging, say)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def run_from(self, staging: Path, say: Callable[[str], None]) -> str:
        """`run`, of a snapshot of the folder that was made, and opened, before; the token must be known."""
        card = read_card(staging / CARD) if (staging / CARD).exists() else None
        report = EvaluationReport.load(staging / REPORT) if (staging / REPORT).exists() else None
        numbers = None if report is None else dataclasses.asdict(report)
        say_once = _SayOnce(say)

        def attempt() -> str:
            get_session().timeout = self.timeout  # the client itself would wait for ever
            return self._attempt(staging, card, numbers, say_once)

        return retried(attempt, self.repo_id, self.attempts, say)

    def _attempt(
        self, staging: Path, own_card: str | None, report: dict[str, Any] | None, say: Callable[[str], None]
    ) -> str:
        assert self.token is not None
        to = open_destination(self.repo_id, self.private, self.token)
        say(f"pushing {_megabytes(staging)} to {to}")
        if not self.private and to.private:
            say(f"{to.repo_id} is private and stays so; its settings on the Hub can change that")
        card, is_own = self._card(staging, own_card, report, to, say)
        (staging / CARD).write_text(card, encoding="utf-8")
        names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        parts = {name.split("/")[0] for name in names if "/" in name}
        stale = [
            name
            for name in to.files
            if name not in names and name.split("/")[0] in parts and _WEIGHT_FILES.fullmatch(name)
        ]
        if stale:
            say(f"removing weights of an earlier model: {', '.join(stale)}")
        commit = HfApi(token=self.token, library_name="ddpm_hf").create_commit(
            to.repo_id,
            [
                *(CommitOperationAdd(name, staging / name) for name in names),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=self.commit_message,
            parent_commit=to.head,  # refused if somebody committed since: then the card is looked at again
            num_threads=2,
            create_pr=self.create_pr,
        )
        if self.create_pr:
            say(f"proposed to {to}: {commit.pr_url}")
            return str(commit.pr_url)
        _record_card(Path(self.folder), to.repo_id, _sha256(card) if is_own else None)
        if commit.oid == to.head:
            say(f"{to.repo_id} already has all of it")
        else:
            say(f"pushed to {to}")
        return f"{constants.ENDPOINT}/{to.repo_id}/commit/{commit.oid}"

    def _card(
        self,
        staging: Path,
        own: str | None,
        report: dict[str, Any] | None,
        to: Destination,
        say: Callable[[str], None],
    ) -> tuple[str, bool]:
        """The card to publish, and whether it is the folder's own, rather than one that was edited on the Hub."""
        samples = sorted(path.name for path in staging.glob("samples*"))
        sample = SAMPLES if SAMPLES in samples else next(reversed(samples), None)
        facts = CardFacts(to.repo_id, report=report, sample=sample, license=self.license)
        card = make_card(ModelFacts.read(staging), facts)
        if own is not None:  # which knows of the training; the folder no longer does
            known = {"use": True, "license": True, "evaluation": report, "samples": sample}
            card, kept = merge_cards(own, card, [name for name, value in known.items() if value], self.license)
            if kept:
                say(f"left as edited in {CARD}: {', '.join(kept)}")
        if CARD not in to.files:
            return card, True
        remote = _remote_text(to, CARD, self.token)
        if _sha256(remote) == _pushed_card(Path(self.folder), to.repo_id):
            return card, True
        merged, kept = merge_cards(remote, card, license=self.license)
        if kept:
            say(f"left as edited on the Hub, in {CARD}: {', '.join(kept)}")
        same = text_outside(merged) == text_outside(card)
        if not same:
            say(f"left the text of {CARD} on the Hub as it is, beside the generated sections; yours stays here")
        return merged, same and not kept


def push(folder: str | Path, repo_id: str, say: Callable[[str], None] = print, **options: Any) -> str:
    """Publish a model's folder on the Hub, in one commit.

    The card is renewed on the way: its snippets name the repository, its numbers are those of `evaluation.json`. An
    edit that a person made to the card, here or on the Hub, is kept.

    Args:
        folder, repo_id, options: See `Push`.
        say: Takes lines for the user.

    Returns:
        The commit's address.

    Raises:
        PushError: It did not happen, in one sentence; everything is still on disk.
        OSError, ValueError: There is no DDPM in the folder that opens, or an argument cannot be taken.
    """
    return Push(str(folder), repo_id, **options).run(say)


class _SayOnce:
    """Says every line once, however often it is tried."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.said = say, set[str]()

    def __call__(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.say(line)


def retried(attempt: Callable[[], str], repo_id: str, attempts: int, say: Callable[[str], None]) -> str:
    """What `attempt` returns, after failures of the network and the server were waited out.

    Raises:
        PushError: It failed for another reason, or too often.
    """
    for number in range(1, attempts + 1):
        try:
            return attempt()
        except PushError:
            raise
        except Exception as error:  # whatever the client's libraries raise
            why = _why(error, repo_id)
            if not is_passing(error):
                raise PushError(f"could not push to {repo_id}: {why}") from error
            if number == attempts:
                raise PushError(f"could not push to {repo_id}, tried {attempts} times: {why}") from error
            say(f"{why}; trying again in {2 ** (number - 1)} s")
            time.sleep(2 ** (number - 1))
    raise UserError(f"attempts must be at least 1, got {attempts}")


def _remote_text(to: Destination, name: str, token: str | None) -> str:
    """A file of the repository, kept out of the cache: there it would make half of a model."""
    with tempfile.TemporaryDirectory() as folder:
        path = hf_hub_download(to.repo_id, name, revision=to.head, token=token, local_dir=folder)
        return Path(path).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _pushed_card(folder: Path, repo_id: str) -> str | None:
    try:
        return json.loads((folder / _RECORD).read_text(encoding="utf-8")).get(repo_id)
    except (OSError, ValueError, AttributeError):
        return None


def _record_card(folder: Path, repo_id: str, digest: str | None) -> None:
    try:
        have = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        have = {}
    with suppress(OSError):  # without it, the next push takes what is on the Hub for edited there
        write_text(folder / _RECORD, json.dumps({**have, repo_id: digest}, indent=2) + "\n")


def _megabytes(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB"


# -------------------------------------------------------------------- on behalf of a training run


def quiet_client() -> None:
    """No bars and no warnings of the client's own, whose addresses may be signed."""
    disable_progress_bars()
    hub_logging.set_verbosity_error()


def main() -> int:
    """Push a snapshot as the job on standard input says; the answer is one JSON object on standard output."""
    job = json.loads(sys.stdin.read())
    staging = Path(job.pop("staging"))
    quiet_client()
    lines: list[str] = []
    try:
        Push(**job).run_from(staging, lines.append)
        answer = {"pushed": True, "lines": lines}
    except (ValueError, OSError) as error:
        answer = {"pushed": False, "lines": lines, "why": " ".join(str(error).split())}
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
