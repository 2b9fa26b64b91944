"""What every access to the Hub shares: one sentence per error, retries, private repositories, is it a DDPM?"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, model_info
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from .errors import UserError, in_one_line

T = TypeVar("T")

INDEX = "model_index.json"
# Time-outs, too many requests, and a commit by someone else in between; every 5xx besides.
_PASSING = (408, 412, 429)


class PrivateByDefault:
    """A part of a pipeline, or a pipeline, whose pushes nobody else sees unless `private=False`."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        **options: Any,
    ) -> str:
        """Publish as stock does, but privately; a pipeline with a card, as `ddpm-hf push` does.

        Args:
            repo_id: `namespace/name`, or a name in the token's own namespace; made if it does not exist.
            commit_message, create_pr, options: As stock's.
            private: Only `False` makes a new repository public, or publishes in a public one.
            token: Instead of the one that `hf auth login` or HF_TOKEN left.
            safe_serialization, variant: As stock's; pickles are not published, nor a pipeline as a variant only.

        Returns:
            The commit's (or the pull request's) address.

        Raises:
            UserError: It did not happen; the sentence says why.
        """
        if not safe_serialization:
            raise UserError("safe_serialization=False would publish a pickle; leave it out for safetensors")
        options |= {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        return self._push_to_hub(repo_id, variant, options)

    def _push_to_hub(self, repo_id: str, variant: str | None, options: dict[str, Any]) -> str:
        open_repository(repo_id, options["private"], options["token"])
        return super().push_to_hub(repo_id, variant=variant, **options)  # type: ignore[misc]

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any) -> None:
        """Save the configuration as stock does; see `push_to_hub`."""
        if push_to_hub:
            options = private_options(save_directory, options)
        super().save_config(save_directory, push_to_hub, **options)  # type: ignore[misc]


def private_options(save_directory: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `save_pretrained(..., push_to_hub=True)` was given, after its repository was made private."""
    repo_id = options.get("repo_id") or Path(save_directory).name
    open_repository(repo_id, options.get("private"), options.get("token"))
    return {**options, "private": options.get("private") is not False}


def open_repository(repo_id: str, private: bool | None, token: str | None) -> ModelInfo:
    """Return what the Hub knows of a model's repository, which is made if it does not exist.

    Args:
        repo_id, token: As for `PrivateByDefault.push_to_hub`.
        private: Only `False` makes a new repository public, or takes a public one; an existing one stays what it is.

    Raises:
        UserError: It is public, and that was not asked for.
    """
    api = HfApi(token=token, library_name="ddpm_hf")
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private is not False, exist_ok=True)
        info = api.model_info(repo_id)
    if private is not False and info.private is not True:
        raise UserError(
            f"{repo_id} is public; add --private false (in training --hub_private_repo false), in Python "
            "private=False, to publish there, or name another repository"
        )
    return info


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_passing(error: BaseException) -> bool:
    """Return whether the network or the server failed in a way that may be over soon."""
    for cause in chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in _PASSING or cause.response.status_code >= 500
        # The client's own network errors, by the name that its HTTP libraries share, whichever of them it uses.
        transport = any(base.__name__ == "TransportError" for base in type(cause).__mro__)
        if transport or isinstance(cause, (ConnectionError, TimeoutError)):
            return True
    return False


def sentence(error: BaseException, name: str) -> str | None:
    """Return why a repository cannot be read or written, in one sentence without addresses and request ids.

    It is the Hub's own message, except where that misleads. `None` for an error of another kind.
    """
    causes = list(chain(error))

    def find(*kinds: type[BaseException]) -> Any:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if find(IncompleteSnapshotError) or ("no file named" in str(error) and not Path(name).is_dir()):
        return f"the copy of {name!r} in the cache is incomplete: its download was interrupted; load it once online"
    if re.search(r"Could not find the necessary `safetensors`|no file named \S+\.safetensors", str(error)):
        return f"{name!r} has no safetensors weights, and no others are read here"
    if find(HFValidationError):
        return f"{name!r} is neither a folder here nor a repository's name, such as org/name"
    if find(RepositoryNotFoundError) and not find(GatedRepoError):  # the same for what is missing and what is hidden
        return (
            f"there is no folder {name!r} here, and no repository of that name on the Hub that can be read; if it is "
            "private, log in with 'hf auth login' or give a token"
        )
    if answer := find(HfHubHTTPError):
        if answer.response.status_code == 401:
            return "the Hub does not know this token; log in with 'hf auth login', or set HF_TOKEN"
        message = (answer.server_message or "").strip().partition("\n")[0]
        return f"the Hub answered {answer.response.status_code} for {name!r}" + (f": {message}" if message else "")
    for cause in causes:  # the first one: what is behind it only repeats it in other libraries' words
        if is_passing(cause):
            return f"no answer from the Hub ({in_one_line(cause)})"
    if find(LocalEntryNotFoundError, OfflineModeIsEnabled):
        how = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "local_files_only=True"
        return f"there is no folder {name!r} here, nor is it in the cache, and the network is switched off ({how})"
    return None


def retried(
    call: Callable[[], T],
    name: str | os.PathLike[str],
    waits: Sequence[float] = (1, 2),
    log: Callable[[str], None] | None = None,
) -> T:
    """Return what `call` returns; where the network or the Hub fails in passing, it is called again.

    Args:
        call: Reads or writes on the Hub.
        name: The repository or folder, for messages.
        waits: Seconds before each further try.
        log: Takes a line before each further try. Without it, nothing is tried again where there is no connection at
            all: that is rarely over in seconds.

    Raises:
        OSError: In one sentence, where it fails for reasons of network, rights or cache; other errors pass unchanged.
    """
    name = os.fspath(name)
    for wait in (*waits, None):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            if (text := sentence(error, name)) is None:
                raise
            connected = all(type(cause).__name__ != "ConnectError" for cause in chain(error))
            if wait is None or not is_passing(error) or not (connected or log):
                raise OSError(text) from error
        if log is not None:
            log(f"{text}; trying again in {wait} s")
        time.sleep(wait)
    raise AssertionError("unreachable: the last try returns or raises")


def check_pipeline(name: str | os.PathLike[str], **options: Any) -> None:
    """Check that a folder or repository holds a DDPM, before any weights are downloaded.

    Args:
        name: A folder, or a repository on the Hub.
        options: As for `from_pretrained`; components that are given there are not expected in the repository.

    Raises:
        OSError: It is not there, may not be read, or is not in the cache and the network is out of reach.
        ValueError: It is something else.
    """
    name = os.fspath(name)
    if not Path(name).is_dir():
        path = _download_index(name, options)
    elif not (path := Path(name) / INDEX).is_file():
        raise OSError(f"{name!r} holds no pipeline: there is no {INDEX} in it")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        index = None
    if not isinstance(index, dict):
        raise UserError(f"the {INDEX} of {name!r} is not a JSON object; download or save it again")
    lists = {key: value for key, value in index.items() if isinstance(value, list) and value}
    parts = {key: value[-1] for key, value in lists.items() if not key.startswith("_") and key not in options}
    parts = {key: value for key, value in parts.items() if value is not None}
    missing = {"unet", "scheduler"} - {*parts, *options}
    if missing or not {*parts} <= {"unet", "scheduler"} or parts.get("unet", "UNet2DModel") != "UNet2DModel":
        what = ", ".join(f"{key}: {value}" for key, value in parts.items()) or "nothing"
        raise UserError(
            f"{name!r} holds a {index.get('_class_name')} ({what}), not a DDPM, which is a UNet2DModel and a scheduler"
        )


def _download_index(name: str, options: Mapping[str, Any]) -> Path:
    """Return the index of a repository, from the Hub or, where nobody answers, from the cache."""
    where: dict[str, Any] = {key: options[key] for key in ("cache_dir", "revision", "token") if key in options}
    cached = bool(options.get("local_files_only")) or constants.HF_HUB_OFFLINE
    unreachable: OSError | None = None
    if not cached:
        try:  # unlike a download, this is not tried for half a minute by the client itself
            asked: dict[str, Any] = {"revision": where.get("revision"), "token": where.get("token")}
            info = retried(lambda: model_info(name, timeout=10, **asked), name)
            if INDEX not in {sibling.rfilename for sibling in info.siblings or ()}:
                raise UserError(f"{name!r} holds no diffusers pipeline: there is no {INDEX} in it")
        except OSError as error:
            if not is_passing(error):
                raise
            cached, unreachable = True, error
    try:
        return Path(retried(lambda: hf_hub_download(name, INDEX, local_files_only=cached, **where), name, waits=()))
    except OSError as error:
        raise (unreachable or error) from None
