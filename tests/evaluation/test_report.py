"""Reports: JSON that every reader takes, the page, reports side by side."""

import json
import math
from pathlib import Path

import pytest

from ddpm_hf.evaluation.report import EvaluationReport, as_markdown, compare
from ddpm_hf.utils.errors import NotFiniteError
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
        (entire('{"a": 1}'), "a number or null as each 'value'"),
        (entire('{"a": {}}'), "a number or null as each"),
        (entire('{"a": {"value": "3.1"}}'), "a number or null as each"),
        (entire('{"a": {"value": 3, "standard_error": [1]}}'), "a number or null as each"),
        (entire("[1]"), "an object with dataset, split, num_images and values"),
        (entire('{"a": {"value": 3}}', "[]"), "a report of ddpm-hf evaluate"),
        (entire('{"a": {"value": 3}}', '{"a": 1}'), "a report of ddpm-hf evaluate"),
        (entire('{"a": {"value": 3}}', '{"sampling": "x"}'), "a report of ddpm-hf evaluate"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        EvaluationReport.load(tmp_path / "x.json")
    with pytest.raises(ValueError, match="there is no report"):
        EvaluationReport.load(tmp_path / "x.json" / "y.json")


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_enters_no_report(value):
    report = EvaluationReport("digits", "validation", 1)
    with pytest.raises(NotFiniteError, match=r"bits_per_dim is -?(nan|inf), which is no result"):
        report.add("bits_per_dim", value, 0.1, {})
    assert report.values == {}
    report.add("bits_per_dim", 3.0, math.nan, {})  # of one image: its error is not known
    assert finite(report.values) == {"bits_per_dim": {"value": 3.0, "standard_error": None}}


def test_models_are_compared_by_several_sets():
    reports = {}
    for name, values in (("a", [1.0, 2.0]), ("b", [1.5, 2.5])):
        sets = [EvaluationReport("digits", "train", 9) for _ in values]
        for one, value in zip(sets, values, strict=True):
            one.add("fd", value, 0.1, {"estimator": "20 samples", "seconds": value})
        reports[name] = EvaluationReport("digits", "train", 9)
        reports[name].add_sets(sets)
    text = compare(reports)
    assert "| +0.5 | +0.7 |" in " ".join(text.split())  # in errors of 0.5 each
    assert "*" not in text  # other numbers are no other settings
