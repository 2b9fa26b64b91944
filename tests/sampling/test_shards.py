"""Rows that are kept: interrupted, damaged, in other batches, more of them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_hf.sampling.shards import all_rows, in_order, write_tensors
from ddpm_hf.utils.digests import digest, weights_digest
from ddpm_hf.utils.errors import NotFiniteError, UserError


class Maker:
    """Squares, and a note of what was asked for; fails at one id."""

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def __call__(self, ids):
        if self.fails_at in ids:
            raise KeyboardInterrupt
        self.asked += ids
        return {"square": torch.tensor([float(i * i) for i in ids])}


SQUARES = torch.arange(10.0) ** 2


def test_in_memory_and_on_disk(tmp_path):
    for folder in (None, tmp_path / "rows"):
        assert torch.equal(all_rows(10, Maker(), batch_size=4, folder=folder)["square"], SQUARES)


def test_an_interrupted_run_resumes_with_what_is_missing(tmp_path):
    first = Maker(fails_at=6)
    with pytest.raises(KeyboardInterrupt):
        all_rows(10, first, batch_size=2, folder=tmp_path)
    assert first.asked == [0, 1, 2, 3, 4, 5]
    second = Maker()
    assert torch.equal(all_rows(10, second, batch_size=3, folder=tmp_path)["square"], SQUARES)  # in other batches
    assert second.asked == [6, 7, 8, 9]
    third = Maker()
    more = all_rows(12, third, batch_size=100, folder=tmp_path)["square"]
    assert third.asked == [10, 11]
    assert torch.equal(more, torch.arange(12.0) ** 2)
    assert torch.equal(all_rows(3, Maker(fails_at=0), batch_size=1, folder=tmp_path)["square"], SQUARES[:3])
    assert not list(tmp_path.glob(".*"))  # no leftovers


def test_damaged_batches_are_made_again(tmp_path):
    all_rows(6, Maker(), batch_size=2, folder=tmp_path)
    (tmp_path / "00000002.safetensors").write_bytes(b"not safetensors")
    for other in ({"square": torch.ones(2)}, {"ids": torch.arange(2), "square": torch.ones(1)}):
        save_file(other, tmp_path / f"other{len(other)}.safetensors")  # no batches of ours
    again = Maker()
    assert torch.equal(all_rows(6, again, batch_size=2, folder=tmp_path)["square"], SQUARES[:6])
    assert again.asked == [2, 3]
    assert load_file(tmp_path / "00000002.safetensors")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="taken"):
        write_tensors(tmp_path / "taken" / "x.safetensors", {"x": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_digests_tell_contents_apart():
    x = torch.arange(6, dtype=torch.uint8)
    others = [x.float(), x.view(2, 3), x.flip(0), x[:5]]
    assert digest(x) == digest(x.clone())
    assert len({digest(y) for y in [x, *others]}) == 5
    assert digest("a", "b") != digest("ab")
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert weights_digest(a) != weights_digest(b)
    b.load_state_dict(a.state_dict())
    assert weights_digest(a) == weights_digest(b)


def test_rows_that_are_not_finite_are_not_kept(tmp_path):
    def rows(ids):
        return {"features": torch.tensor([[1.0, float("inf") if i == 3 else 2.0] for i in ids])}

    with pytest.raises(NotFiniteError, match=r"pixels: features of image 3 is not finite"):
        all_rows(6, rows, batch_size=2, folder=tmp_path, desc="pixels")
    assert [path.name for path in tmp_path.iterdir()] == ["00000000.safetensors"]


def test_every_row_that_is_asked_for_is_filled():
    def parts():
        return [{"ids": torch.tensor([i, i + 1]), "square": torch.tensor([i, i + 1]) ** 2} for i in (4, 0, 2)]

    for ids in ([5, 0, 3], [3, 0, 3], [], range(6)):  # also one twice
        assert in_order(parts(), ids)["square"].tolist() == [i * i for i in ids]
    other = {"ids": torch.tensor([6]), "cube": torch.tensor([216])}  # features of another name
    with pytest.raises(UserError, match=r"rows holds batches of different kinds, cube, ids; ids, square; remove it"):
        in_order([*parts(), other], range(7), "rows")
