"""Weights from files: what PyTorch and safetensors wrote, nothing that runs, and no other place that opens pickles."""

import ast
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ddpm_hf
from ddpm_hf.utils.weight_files import read_weights

PACKAGE = Path(ddpm_hf.__file__).parent


class Malicious:
    """Pickled, it would write a file when loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_tensors_come_back_and_what_lies_beside_them(tmp_path):
    tensors = {"a.weight": torch.randn(3, 2), "b": torch.arange(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save({"model": tensors, "step": 7}, tmp_path / "x.pt")
    torch.save({"model": tensors, "step": 7}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "x.pt")["step"] == 7
    for found in (
        read_weights(tmp_path / "x.safetensors"),
        read_weights(tmp_path / "x.pt")["model"],
        read_weights(tmp_path / "old.pt")["model"],
    ):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("ending", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
def test_nothing_is_executed(tmp_path, ending, how):
    content, path = {"a": Malicious(tmp_path / "executed")}, tmp_path / f"evil{ending}"
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ValueError, match=rf"evil{ending}' cannot be read as weights: it (holds more|is not a)"):
        read_weights(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # of what is no pickle
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_damaged_files_end_in_a_sentence(tmp_path, ending):
    path = tmp_path / f"weights{ending}"
    with pytest.raises(ValueError, match=rf"there is no file .*weights{ending}"):
        read_weights(path)
    if ending == ".pt":
        torch.save({"a": torch.zeros(100)}, path)
    else:
        save_file({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    # Pieces of files, and every single byte as the beginning of a pickle.
    pieces = [whole[: len(whole) * i // 8] for i in range(8)] + [bytes([i]) + b"hello" for i in range(256)]
    for content in [b"", b"hello", *pieces]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as weights") as raised:
            read_weights(path)
        assert "\n" not in str(raised.value)


def calls(source: str) -> list[str]:
    """Every `module.function(...)` of a source file, with the names of its keywords that are literally true."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            true = [k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True]
            found.append(" ".join([ast.unparse(node.func), *map(str, true)]))
    return found


def test_no_other_module_opens_pickles():
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for call in calls(source):
            assert "allow_pickle" not in call, path.name
            assert not call.startswith(("pickle.load", "pickle.Unpickler", "joblib.", "torch.hub.load")), path.name
            if call.startswith("torch.load"):
                assert (path.name, call) == ("weight_files.py", "torch.load weights_only")
        if path.name != "weight_files.py":
            assert "from torch import load" not in source
    assert calls("torch.load(x, weights_only=True)\ntorch.load(y, weights_only=False)") == [
        "torch.load weights_only",
        "torch.load",
    ]
