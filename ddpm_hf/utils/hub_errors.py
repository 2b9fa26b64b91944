"""What every access to the Hub shares: one sentence per error, retries, private repositories, is it a DDPM?"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, errors, hf_hub_download, model_info

from .errors import UserError, in_one_line

T = TypeVar("T")

INDEX = "model_index.json"


class PrivateByDefault:
    """A part of a pipeline, or a pipeline, whose pushes nobody else sees unless `private=False`."""

    def push_to_hub(
        self, repo_id: str, commit_message: str | None = None, private: bool | None = None, **options: Any
    ) -> str:
        """Publish as stock does, but privately; a pipeline with a card, as `ddpm-hf push` does.

        `repo_id` is `namespace/name`, or a name in the token's own namespace; it is made if it does not exist. Only
        `private=False` makes it public, or publishes in a public one. `options` are stock's. Returns the address of
        the commit or the pull request. Raises UserError, also for a pickle, and for a pipeline as a variant only.
        """
        if not options.pop("safe_serialization", True):
            raise UserError("safe_serialization=False would publish a pickle; leave it out for safetensors")
        options = {"token": None, "commit_message": commit_message, "private": private, **options}
        return self._push_to_hub(repo_id, options.pop("variant", None), options)

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
    open_repository(options.get("repo_id") or Path(save_directory).name, options.get("private"), options.get("token"))
    return {**options, "private": options.get("private") is not False}


def open_repository(repo_id: str, private: bool | None, token: str | None, repo_type: str = "model") -> Any:
    """Return what the Hub knows of a repository, which is made if it does not exist (`HfApi.repo_info`).

    Only `private=False` makes a new one public, or takes a public one, which is a UserError otherwise.
    """
    api = HfApi(token=token, library_name="ddpm_hf")
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except errors.RepositoryNotFoundError:
        sdk = "gradio" if repo_type == "space" else None
        api.create_repo(repo_id, private=private is not False, repo_type=repo_type, space_sdk=sdk, exist_ok=True)
        info = api.repo_info(repo_id, repo_type=repo_type)
    _check_private(info, private)
    return info


def _check_private(info: Any, private: bool | None) -> None:
    if private is not False and info.private is not True:
        how = "add --private false (in training --hub_private_repo false)"
        raise UserError(f"{info.id} is public; {how}, to publish there, or name another repository")


def find_repository(repo_id: str, private: bool | None, token: str | None) -> tuple[str, Any]:
    """Return the full name of a model's repository that may be written, and what the Hub knows of it; changes nothing.

    That is `None` where `open_repository` would make it. Raises UserError, or the client's errors, where it could not.
    """
    api = HfApi(token=token, library_name="ddpm_hf")
    user = api.whoami()
    repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    try:
        info = api.repo_info(repo_id)
    except errors.RepositoryNotFoundError:
        writing = [org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") not in (None, "read")]
        if (namespace := repo_id.partition("/")[0]) not in (names := [user["name"], *writing]):
            known = f"this token, of {user['name']}, can make repositories in {', '.join(names)}"
            raise UserError(f"{repo_id} does not exist, or is hidden, and {known}, not in {namespace}") from None
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"the token may only read; {repo_id} needs one with write access") from None
        return repo_id, None
    api.auth_check(repo_id, write=True)
    _check_private(info, private)
    return repo_id, info


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_passing(error: BaseException) -> bool:
    """Return whether the network or the server failed in a way that may be over soon."""
    for cause in _causes(error):
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return False
        if isinstance(cause, errors.HfHubHTTPError):  # time-outs, too many requests, a commit by someone else between
            return cause.response.status_code in (408, 412, 429) or cause.response.status_code >= 500
        # The client's own network errors, by the name that its HTTP libraries share, whichever of them it uses.
        transport = any(base.__name__ == "TransportError" for base in type(cause).__mro__)
        if transport or isinstance(cause, (ConnectionError, TimeoutError)):
            return True
    return False


def _sentence(error: BaseException, name: str) -> str | None:
    """Return why a repository cannot be read or written: the Hub's own words, except where they mislead."""
    causes = list(_causes(error))

    def find(*kinds: type[BaseException]) -> Any:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if find(errors.IncompleteSnapshotError) or ("no file named" in str(error) and not Path(name).is_dir()):
        return f"the copy of {name!r} in the cache is incomplete: its download was interrupted; load it once online"
    if re.search(r"Could not find the necessary `safetensors`|no file named \S+\.safetensors", str(error)):
        return f"{name!r} has no safetensors weights under their usual names, and no others are read here"
    # The Hub's answer is the same for what is missing and for what is hidden.
    if find(errors.HFValidationError, errors.RepositoryNotFoundError) and not find(errors.GatedRepoError):
        how = "names are like org/name, and a private one needs 'hf auth login' or a token"
        return f"there is no folder {name!r} here, and no repository of that name on the Hub that can be read; {how}"
    if answer := find(errors.HfHubHTTPError):
        if answer.response.status_code == 401:
            return "the Hub does not know this token; log in with 'hf auth login', or set HF_TOKEN"
        message = (answer.server_message or "").strip().partition("\n")[0]
        return f"the Hub answered {answer.response.status_code} for {name!r}" + (f": {message}" if message else "")
    for cause in causes:  # the first one: what is behind it only repeats it in other libraries' words
        if is_passing(cause):
            return f"no answer from the Hub ({in_one_line(cause)})"
    if find(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        how = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "local_files_only=True"
        return f"there is no folder {name!r} here, nor is it in the cache, and the network is switched off ({how})"
    return None


def retried(
    call: Callable[[], T], name: Any, waits: Sequence[float] = (1, 2), log: Callable[[str], None] | None = None
) -> T:
    """Return what `call` returns; where the network or the Hub fails in passing, wait `waits` seconds and call again.

    `log` takes a line before each further try. Without it nothing is tried again where there is no connection at all,
    which is rarely over in seconds. Raises OSError, in one sentence, where it fails for reasons of network, rights or
    cache; other errors pass unchanged.
    """
    for wait in (*waits, None):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            if (text := _sentence(error, os.fspath(name))) is None:
                raise
            unconnected = any(type(cause).__name__ == "ConnectError" for cause in _causes(error))
            if wait is None or not is_passing(error) or (unconnected and log is None):
                raise OSError(text) from error
        if log is not None:
            log(f"{text}; trying again in {wait} s")
        time.sleep(wait)
    raise AssertionError("unreachable: the last try returns or raises")


def check_pipeline(name: str | os.PathLike[str], **options: Any) -> None:
    """Check that a folder or a repository on the Hub holds a DDPM, before any weights are downloaded.

    `options` are those of `from_pretrained`; components that are given there are not expected in the repository.
    Raises OSError where it cannot be read, and UserError where it is something else.
    """
    name = os.fspath(name)
    path = Path(name) / INDEX if Path(name).is_dir() else Path(retried(lambda: _download_index(name, options), name))
    if not path.is_file():
        raise OSError(f"{name!r} holds no pipeline: there is no {INDEX} in it")
    try:
        index = {**json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError):
        raise UserError(f"the {INDEX} of {name!r} is not a JSON object; download or save it again") from None
    lists = {key: value[-1] for key, value in index.items() if isinstance(value, list) and value}
    parts = {key: value for key, value in lists.items() if value is not None and key[0] != "_" and key not in options}
    if {"unet", "scheduler"} - {*options} != {*parts} or parts.get("unet", "UNet2DModel") != "UNet2DModel":
        what = ", ".join(f"{key}: {value}" for key, value in parts.items()) or "nothing"
        found = f"{name!r} holds a {index.get('_class_name')} ({what})"
        raise UserError(f"{found}, not a DDPM, which is a UNet2DModel and a scheduler")


def _download_index(name: str, options: Mapping[str, Any]) -> str:
    """Return the path of a repository's index in the cache."""
    where: dict[str, Any] = {key: options[key] for key in ("cache_dir", "revision", "token") if key in options}
    try:
        return hf_hub_download(name, INDEX, local_files_only=True, **where)
    except errors.LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE or options.get("local_files_only"):
            raise
    # Unlike a download, this is not tried for half a minute by the client itself.
    info = model_info(name, revision=where.get("revision"), token=where.get("token"), timeout=10)
    if INDEX not in {sibling.rfilename for sibling in info.siblings or ()}:
        raise UserError(f"{name!r} holds no diffusers pipeline: there is no {INDEX} in it")
    return hf_hub_download(name, INDEX, **where)
