"""Files that appear whole or not at all, whoever else writes them."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpm_hf.utils import files
from ddpm_hf.utils.files import flush, write_text, write_whole


def test_four_threads_write_one_file_1200_times_and_it_is_always_whole(tmp_path):
    file, done, seen = tmp_path / "report.json", threading.Event(), set()
    texts = [f"{writer}" * (4000 + writer) for writer in range(4)]

    def read():
        while not done.is_set():
            if file.exists():
                seen.add(file.read_text())

    def write(writer):
        for _ in range(300):
            write_text(file, texts[writer])

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        try:
            list(pool.map(write, range(4)))  # raises what a writer raised
        finally:
            done.set()
        reader.result()
    assert seen <= set(texts)
    assert file.read_text() in texts
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_flushed_before_it_has_its_name_and_its_folder_after(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(files.os, "fsync", lambda fd: order.append(os.readlink(f"/proc/self/fd/{fd}")))
    write_text(tmp_path / "a.txt", "whole")
    assert [Path(order[0]).suffix, *order[1:]] == [".partial", str(tmp_path)]


def test_what_fails_leaves_the_file_before_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "before")

    def fail(partial):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.txt", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]


def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch):
    """As on Windows, where `os.open` of a folder is refused, and on network file systems; a file's failure counts."""

    def refuse(number):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", refuse)
    flush(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        flush(tmp_path / "a")
    monkeypatch.setattr(files, "os", type("Windows", (), {"name": "nt"}))  # no os.open: it must not be asked
    flush(tmp_path)
