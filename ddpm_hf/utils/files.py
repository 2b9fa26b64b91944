"""Write files and folders whole or not at all."""

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError


def write_directory(target: Path, fill: Callable[[Path], Any]) -> None:
    """Make the directory `target` from what `fill(folder)` writes, or raise OSError and leave what was there."""
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        for path in (*partial.rglob("*"), partial):
            flush(path)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # its own error for a full disk
            raise OSError(f"cannot write {target}: {error}") from error
        raise


def remove_directory(path: Path) -> None:
    """Remove a directory so that a kill does not leave half of it under its name."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what killed writes and removals have left, and bring back what an interrupted exchange took away.

    What a push has taken of a folder (`hub.files.make_snapshot`) stays: the push may still run.
    """
    for old in output_dir.glob(".*.old"):  # the one before, where a kill came between two renames
        target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not target.exists():
            old.rename(target)
    for path in (path for kind in ("partial", "old", "removed") for path in output_dir.glob(f".*.{kind}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def default_cache_dir() -> Path:
    """Return where results that take long are kept: `$DDPM_HF_CACHE`, or `~/.cache/ddpm_hf`."""
    return Path(os.environ.get("DDPM_HF_CACHE") or Path.home() / ".cache" / "ddpm_hf")


def writable_folder(folder: Path, flag: str) -> None:
    """Make the folder that a flag names; raise UserError, before hours of work, if files cannot be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # asking for permissions would believe those that root has in /proc
            pass
    except OSError as error:
        raise UserError(f"cannot write to {flag} {folder}: {error.strerror}") from None


def check_new_folder(output: str | Path) -> None:
    """Raise UserError where `--output`, a folder to be made, is a file or holds files."""
    folder = Path(output)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"--output {str(output)!r} holds something else; name a new folder")


def write_whole(path: Path, write: Callable[[Path], Any], durable: bool = True) -> None:
    """Write a file completely or not at all: `write` a partial one, flush it to the disk, rename it.

    Each writer has a partial file of its own; the last one counts. `durable=False` leaves the flushing, of
    milliseconds, to the system: for many small files that can be made again. Raises OSError and leaves what was there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        if durable:
            flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, as `write_whole` does."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk; Windows and some file systems flush no folders."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what may be written
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
