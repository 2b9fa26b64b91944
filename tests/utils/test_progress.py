"""The progress bar, read back from what it prints."""

import io
import warnings

import pytest

from ddpm_hf.utils.progress import in_parts, progress_bar, showing_progress


def printed(total, updates, **options) -> str:
    file = io.StringIO()
    with progress_bar(total, "sampling", file=file, mininterval=0, **options) as bar:
        for n in updates:
            bar.update(n)
    return file.getvalue()


def test_parts_of_images_add_up_to_whole_ones_with_their_rate_and_the_time_left():
    text = printed(4, [0.25] * 16)
    assert "sampling: 100%" in text
    assert "| 4/4 [" in text
    assert "| 2/4 [" in text
    assert "." not in text.split("| ")[2].split(" [")[0]
    assert "image" in text.rsplit("[", 1)[1]
    assert "<" in text.rsplit("[", 1)[1]


@pytest.mark.parametrize(("total", "parts"), [(64, 20), (16, 1000), (3, 7)])
def test_parts_that_do_not_sum_exactly_end_at_the_end(total, parts):
    assert sum([total / parts] * parts) != total
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # tqdm warns of a bar that is longer than 1
        text = printed(total, [total / parts] * parts)
    assert f"| {total}/{total} [" in text
    assert "<-" not in text  # no time is owed


def test_a_bar_that_is_not_shown_and_one_that_would_be_gone_in_an_instant():
    assert printed(4, [4], show=False) == ""
    assert printed(4, [4], delay=60) == ""
    assert "8/" in printed(4, [8])  # more than was announced
    assert printed(4, [4], leave=False).endswith("\r")


@pytest.mark.parametrize(("show", "seconds", "seen"), [(True, 3.0, True), (True, 0.1, False), (False, 3.0, False)])
def test_long_computations_have_a_bar_where_it_is_wanted(show, seconds, seen, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    found = []
    with showing_progress(show):
        for part in in_parts([range(3), range(3), range(1)], "covariance"):
            found.append(len(part))
            clock[0] += seconds
    assert found == [3, 3, 1]
    text = capsys.readouterr().err
    assert ("covariance" in text and "7/7" in text) is seen
    assert seen or not text.strip()
    assert list(in_parts([range(2)], "elsewhere")) == [range(2)]  # outside of it, nothing is shown
    assert "elsewhere" not in capsys.readouterr().err
