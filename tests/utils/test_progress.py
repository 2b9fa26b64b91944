"""The progress bar, read back from what it prints."""

import io
import warnings

import pytest

from ddpm_hf.utils.progress import progress_bar


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


@pytest.mark.parametrize("steps", [3, 7, 10, 49, 1000])
def test_parts_that_do_not_add_up_exactly_end_in_the_whole(steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # tqdm's, of a share above 1
        text = printed(64, [32 / steps] * (2 * steps))
    assert "| 64/64 [" in text
    assert "<-" not in text


def test_a_bar_that_is_not_shown_and_one_that_would_be_gone_in_an_instant():
    assert printed(4, [4], show=False) == ""
    assert printed(4, [4], delay=60) == ""
    assert "8/" in printed(4, [8])  # more than was announced
    assert printed(4, [4], leave=False).endswith("\r")
