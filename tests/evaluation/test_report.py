"""Reports: JSON that every reader takes, the page, reports side by side."""

import errno
import json
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpm_hf.evaluation import report as reports
from ddpm_hf.evaluation.report import EvaluationReport, as_markdown, compare
from ddpm_hf.utils.errors import NotFiniteError
from ddpm_hf.utils.files import flush, write_text, write_whole
from ddpm_hf.utils.text import finite, number, plain, table


def make(fid=3.17, error=0.02, **settings):
    report = EvaluationReport("cifar10", "test", 10_000)
    report.model = {"name": "org/model", "weights_sha256": "ab" * 32}
    report.add("bits_per_dim", 3.75, 0.01, {"estimator": "full sum", "seconds": 5})
    how = {"estimator": "50000 samples", "num_samples": 50_000, "seconds": 3, **settings}
    report.add("fid_inception_train_float", fid, error, how, estimated_bias=0.01)
    return report


def test_saved_and_read_back(tmp_path):
    report = make()
    report.tables["Table 4"] = [{"reverse steps": 1000, "rate (bits/dim)": 1.77581}]
    report.warnings.append("few samples")
    report.save(tmp_path / "report.json")
    assert EvaluationReport.load(tmp_path / "report.json") == report
    assert EvaluationReport.load(tmp_path) == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_not_a_number_is_null_in_the_file(tmp_path):
    make(error=math.nan).save(tmp_path / "r.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert content["values"]["fid_inception_train_float"]["standard_error"] is None
    assert math.isnan(EvaluationReport.load(tmp_path / "r.json").values["fid_inception_train_float"]["standard_error"])


def test_plain_values_of_json():
    content = {1: (1.5, math.inf, [math.nan, {"a": -math.inf}]), "b": None, "c": True}
    assert finite(content) == {1: [1.5, None, [None, {"a": None}]], "b": None, "c": True}
    assert plain({1: (2, Path("x"))}) == {"1": [2, "x"]}


def test_reports_of_older_versions_are_read(tmp_path):
    old = {"dataset": "d", "split": "s", "num_images": 1, "values": {}, "settings": {}, "versions": {"python": "3"}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert EvaluationReport.load(tmp_path / "old.json").versions == {"python": "3"}


def test_errors_that_a_report_lacks_are_not_known(tmp_path):
    (tmp_path / "r.json").write_text(entire('{"a": {"value": 3}, "b": {"value": null}}'))
    report = EvaluationReport.load(tmp_path / "r.json")
    assert "| a " in compare({"one": report, "other": report})
    assert "| `a` " in as_markdown(report)
    assert math.isnan(report.values["b"]["value"])


def entire(values: str, settings: str = "{}") -> str:
    """A report of which only these parts may be wrong."""
    return f'{{"dataset": "d", "split": "s", "num_images": 1, "values": {values}, "settings": {settings}}}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no report"),
        ("{", "not JSON"),
        ("[1]", "not a report"),
        ('{"values": {}}', "not a report"),
        (entire('{"a": 1}'), "'a' must have a number or null as its 'value'"),
        (entire('{"a": {}}'), "'a' must have a number or null"),
        (entire('{"a": {"value": "3.1"}}'), "'a' must have a number or null"),
        (entire('{"a": {"value": 3, "standard_error": [1]}}'), "'a' must have a number or null"),
        (entire("[1]"), "must have names"),
        (entire('{"a": {"value": 3}}', "[]"), "must have names"),
        (entire('{"a": {"value": 3}}', '{"a": 1}'), "settings of 'a'"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        EvaluationReport.load(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (3.14159, 0.0123, "3.142 ± 0.012"),
        (3.14159, math.nan, "3.1416"),
        (12.3, 4.0, "12.3 ± 4.0"),
        (2e-5, 3e-7, "2.000e-05 ± 3.0e-07"),
        (math.nan, 0.1, "-"),
        (2.0, 0.0, "2"),
    ],
)
def test_numbers_have_the_digits_that_their_errors_allow(value, error, text):
    assert number(value, error) == text


def test_page():
    report = make()
    report.tables["Table 4"] = [{"reverse steps": 1000, "rate (bits/dim)": 1.77581}]
    report.warnings.append("few samples")
    report.pictures.append("samples.png")
    page = as_markdown(report)
    for words in ("org/model", "3.170 ± 0.020", "50000 samples", "- few samples", "1.7758", "![samples.png]", "abab"):
        assert words in page
    assert page.index("few samples") < page.index("Table 4") < page.index("samples.png")


def test_table_is_valid_markdown():
    lines = table([["a", "b", "c"], ["x", "1", "long text"]], texts=(0, 2)).splitlines()
    assert [line.count("|") for line in lines] == [4, 4, 4]
    assert set(lines[1]) <= set("|-: ")


def test_side_by_side():
    text = compare({"a.json": make(), "b.json": make(fid=3.27)})
    (row,) = [line for line in text.splitlines() if "fid_" in line]
    assert "+0.1" in row
    assert "+3.5" in row  # 0.1 / (0.02 sqrt 2)
    assert "*" not in text
    bits = next(line for line in text.splitlines() if "bits_per_dim" in line)
    assert "+0 " in bits
    other = make(fid=3.27, num_samples=10_000, seconds=9)
    other.values.pop("bits_per_dim")
    text = compare({"a.json": make(), "b.json": other})
    assert "fid_inception_train_float*" in text
    assert "* fid_inception_train_float: num_samples differs: 50000 | 10000" in text
    assert "seconds" not in text
    bits = next(line for line in text.splitlines() if "bits_per_dim" in line)
    assert bits.count(" - ") == 3


# ---------------------------------------------------------------------- files


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
    monkeypatch.setattr(reports.os, "fsync", lambda fd: order.append(os.readlink(f"/proc/self/fd/{fd}")))
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


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path):
    names = [f".a.txt.{digit * 32}.partial" for digit in "ab"] + [".mine.partial"]
    for name in names:
        (tmp_path / name).touch()
    for name in names[1:]:
        os.utime(tmp_path / name, (0, 0))
    write_text(tmp_path / "b.txt", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[0], names[2], "b.txt"])


def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch):
    """As on Windows, where `os.open` of a folder is refused, and on network file systems; a file's failure counts."""

    def refuse(number):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(reports.os, "fsync", refuse)
    flush(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        flush(tmp_path / "a")
    monkeypatch.setattr(reports, "os", type("Windows", (), {"name": "nt"}))  # no os.open: it must not be asked
    flush(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_enters_no_report(value):
    report = EvaluationReport("digits", "validation", 1)
    with pytest.raises(NotFiniteError, match=r"bits_per_dim is -?(nan|inf), which is no result"):
        report.add("bits_per_dim", value, 0.1, {})
    assert report.values == {}
    report.add("bits_per_dim", 3.0, math.nan, {})  # of one image: its error is not known
    assert finite(report.values) == {"bits_per_dim": {"value": 3.0, "standard_error": None}}
