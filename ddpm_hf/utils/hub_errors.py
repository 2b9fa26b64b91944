"""What goes wrong between here and the Hub, each in one sentence, and whether trying again can help.

Also what keeps the parts of a pipeline from becoming public unasked.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, hf_hub_download, model_info, whoami
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import UserError

T = TypeVar("T")

_INDEX = "model_index.json"
_HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled)
# Time-outs, too many requests, and a commit by someone else in between; every 5xx besides.
_PASSING = (408, 412, 429)


class PrivateByDefault:
    """A part of a pipeline that is pushed by itself: stock's way, but nobody else sees it unless `private=False`."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        **options: Any,
    ) -> str:
        """As stock's, into a repository that is private unless `private=False`.

        Raises:
            UserError: It exists and is public, or `safe_serialization=False` asks for a pickle.
        """
        if not safe_serialization:
            raise UserError("safe_serialization=False would publish a pickle; leave it out for safetensors")
        options |= {"commit_message": commit_message, "token": token, "create_pr": create_pr}
        options["private"] = checked_privacy(repo_id, private, token)
        return super().push_to_hub(repo_id, **options)  # type: ignore[misc]

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any) -> None:
        """As stock's; see `push_to_hub`."""
        if push_to_hub:
            options = private_options(save_directory, options)
        super().save_config(save_directory, push_to_hub, **options)  # type: ignore[misc]


def private_options(save_directory: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """What `save_pretrained(..., push_to_hub=True)` was given, with `private` as `PrivateByDefault` has it."""
    repo_id = options.get("repo_id") or Path(save_directory).name
    return {**options, "private": checked_privacy(repo_id, options.get("private"), options.get("token"))}


def checked_privacy(repo_id: str, private: bool | None, token: str | None) -> bool:
    """What to make a repository with: private, unless it was asked for otherwise.

    Raises:
        UserError: It exists and is public, and that was not asked for.
    """
    if private is False:
        return False
    name = repo_id if "/" in repo_id else f"{whoami(token)['name']}/{repo_id}"
    with suppress(RepositoryNotFoundError):
        if model_info(name, token=token).private is not True:
            raise UserError(f"{name} is public; pass private=False to publish there, or name another repository")
    return True


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_passing(error: BaseException) -> bool:
    """Whether the network or the server failed in a way that may be over soon."""
    for cause in chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            return status in _PASSING or status >= 500
        # The client's own network errors, by the name that its HTTP libraries share, whichever of them it uses.
        if any(base.__name__ == "TransportError" for base in type(cause).__mro__):
            return True
        if isinstance(cause, (ConnectionError, TimeoutError)):
            return True
    return False


def sentence(error: BaseException, name: str, revision: str | None = None) -> str:
    """One sentence on why a repository cannot be read or written, without addresses, ids or tracebacks."""
    causes = list(chain(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name!r} is gated: ask for access on its page on the Hub, then log in with 'hf auth login'"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f"there is no folder {name!r} here, and no repository of that name on the Hub that can be read; if it is "
            "private, log in with 'hf auth login' or give a token"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{name!r} has no revision {revision!r}"
    if any(isinstance(cause, HFValidationError) for cause in causes):
        return f"{name!r} is neither a folder here nor a repository's name, such as org/name"
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            if isinstance(cause, DisabledRepoError):
                return f"the repository {name!r} was disabled by the Hub"
            if cause.response.status_code == 401:
                return "the Hub does not know this token; log in with 'hf auth login', or set HF_TOKEN"
            if cause.response.status_code == 403:
                return f"this token may not write to {name!r}, or not read it; it needs the permission there"
            said = (cause.server_message or "").strip().splitlines()
            return f"the Hub answered {cause.response.status_code}" + (f": {said[0]}" if said else "")
    # The first cause: what is behind it only repeats it in other libraries' words.
    for cause in causes:
        if is_passing(cause):
            words = " ".join(str(cause).split()) or type(cause).__name__
            return f"no answer from the Hub ({words})"
    if any(isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)) for cause in causes):
        how = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "local_files_only=True"
        return f"there is no folder {name!r} here, nor is it in the cache, and the network is switched off ({how})"
    return " ".join(str(error).split())


def check_pipeline(name: str | os.PathLike[str], **options: Any) -> None:
    """What `name` holds is a DDPM, told before any weights are downloaded.

    Args:
        name: A folder, or a repository on the Hub.
        options: As for `from_pretrained`; components that are given there are not expected in the repository.

    Raises:
        OSError: It is not there, may not be read, or is not in the cache and the network is out of reach.
        ValueError: It is something else.
    """
    name = os.fspath(name)
    if Path(name).is_dir():
        path = Path(name) / _INDEX
        if not path.is_file():
            raise OSError(f"{name!r} holds no pipeline: there is no {_INDEX} in it")
    else:
        path = _index_of(name, options)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        index = None
    if not isinstance(index, dict):
        raise UserError(f"the {_INDEX} of {name!r} is not a JSON object; download or save it again")
    parts = {key: value for key, value in index.items() if isinstance(value, list) and not key.startswith("_")}
    parts = {key: value for key, value in parts.items() if value and value[-1] is not None and key not in options}
    unet = parts.get("unet", [None, "UNet2DModel"])[-1]
    missing = {"unet", "scheduler"} - {*parts, *options}
    if missing or not {*parts} <= {"unet", "scheduler"} or unet != "UNet2DModel":
        what = ", ".join(f"{key}: {value[-1]}" for key, value in parts.items()) or "nothing"
        raise UserError(
            f"{name!r} holds a {index.get('_class_name')} ({what}), not a DDPM, which is a UNet2DModel and a scheduler"
        )


def _index_of(name: str, options: Mapping[str, Any]) -> Path:
    """The index of a repository, from the Hub or, where nobody answers, from the cache."""
    revision, token = options.get("revision"), options.get("token")
    where = {key: options[key] for key in ("cache_dir", "revision", "token") if key in options}
    unreachable: OSError | None = None
    if not options.get("local_files_only") and not constants.HF_HUB_OFFLINE:
        try:  # unlike a download, this is not tried for half a minute by the client itself
            info = patiently(lambda: model_info(name, revision=revision, token=token, timeout=10), name, revision)
        except OSError as error:
            if not is_passing(error):
                raise
            unreachable = error
        else:
            if _INDEX not in {sibling.rfilename for sibling in info.siblings or ()}:
                raise UserError(f"{name!r} holds no diffusers pipeline: there is no {_INDEX} in it")
            return Path(patiently(lambda: hf_hub_download(name, _INDEX, **where), name, revision, waits=()))
    try:
        where["local_files_only"] = True
        return Path(patiently(lambda: hf_hub_download(name, _INDEX, **where), name, revision, waits=()))
    except OSError:
        if unreachable is not None:
            raise unreachable from None
        raise


def patiently(
    call: Callable[[], T],
    name: str | os.PathLike[str],
    revision: str | None = None,
    waits: Sequence[float] = (1, 2),
) -> T:
    """What `call` returns. Where the network or the Hub fails in passing it is tried again, after `waits` seconds; not
    where there is no connection at all, which is rarely over in seconds.

    Raises:
        OSError: In one sentence, where it fails for reasons of network, rights or cache; other errors pass unchanged.
    """
    name = os.fspath(name)
    for wait in (*waits, None):
        try:
            return call()
        except Exception as error:
            causes = list(chain(error))
            no_connection = any(type(cause).__name__ == "ConnectError" for cause in causes)
            if wait is not None and is_passing(error) and not no_connection:
                time.sleep(wait)
                continue
            if any(isinstance(cause, IncompleteSnapshotError) for cause in causes) or (
                "no file named" in str(error) and not Path(name).is_dir()
            ):
                text = f"the copy of {name!r} in the cache is incomplete: its download broke off; load it once online"
            elif re.search(r"Could not find the necessary `safetensors`|no file named \S+\.safetensors", str(error)):
                text = f"{name!r} has no safetensors weights, and no others are read here"
            elif is_passing(error) or any(isinstance(cause, _HUB_ERRORS) for cause in causes):
                text = sentence(error, name, revision)
            else:
                raise
            raise OSError(text) from error
    raise AssertionError
