"""The layers of the design: a package imports from packages below its own only, and importing ddpm_hf is cheap."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_hf

# From the bottom up; `docs/design.md` says what each one is about.
LAYERS = (
    "utils",
    "presets",
    "data",
    "diffusion",
    "models",
    "pipelines",
    "sampling",
    "evaluation",
    "hub",
    "training",
    "convert",
    "cli",
)
# Layers that know nothing of these, although they lie above them.
APART = {"data": {"presets"}, "diffusion": {"data"}, "models": {"data", "diffusion"}}
PACKAGE = Path(ddpm_hf.__file__).parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path, source: str) -> set[str]:
    """First names after `ddpm_hf.` of all that a source file imports, wherever in the file."""
    package = ["ddpm_hf", *path.relative_to(PACKAGE).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("ddpm_hf.")} - {"__version__"}


def violations(path: Path, source: str) -> list[str]:
    own = layer_of(path)
    below = set(LAYERS[: LAYERS.index(own) + 1]) - APART.get(own, set())
    return [f"{own} imports {other}" for other in sorted(imported_layers(path, source) - below)]


def test_the_listing_is_the_table_of_contents():
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {*LAYERS, "__init__", "py.typed"}
    assert len(entries) <= 14


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path):
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from ..training.trainer import Trainer",
        "from .. import training",
        "from ddpm_hf.training.trainer import Trainer",
        "from ddpm_hf import training",
        "import ddpm_hf.training",
        "def f():\n    from ..evaluation import evaluate",
        "from ..unheard_of import x",
    ],
)
def test_an_upward_import_is_found(line):
    assert violations(PACKAGE / "sampling" / "generation.py", line)


def test_what_lies_apart_is_found():
    assert violations(PACKAGE / "diffusion" / "likelihood.py", "from ..data import load_images")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


# In one new process, as importing all takes longest. Old paths are imported by `import`, by `from` and as an
# attribute, before their modules are; reloading a module needs its own spec.
IMPORTS = """
import importlib, json, sys

def heavy():
    return [m for m in ("torch", "diffusers", "accelerate", "datasets", "transformers", "PIL") if m in sys.modules]

import ddpm_hf
found = {"ddpm_hf": heavy()}
import ddpm_hf.cli
found["ddpm_hf.cli"] = heavy()
ddpm_hf.DDPMScheduler
found["ddpm_hf.DDPMScheduler"] = heavy()

assert not {"ddpm_hf.diffusion.likelihood", "ddpm_hf.sampling.generation"} & set(sys.modules)
import ddpm_hf.likelihood, ddpm_hf.diffusion.likelihood as new
from ddpm_hf.generation import with_sampler
from ddpm_hf.data import load_images
from ddpm_hf.evaluation import evaluate
from ddpm_hf.convert import convert
assert ddpm_hf.likelihood is new and new.__spec__.name == new.__name__
importlib.reload(new)
moved = ddpm_hf._MOVED.items()
found["moved"] = [importlib.import_module(f"ddpm_hf.{old}").__name__ == f"ddpm_hf.{path}" for old, path in moved]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imports() -> dict[str, list]:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_loads_nothing_heavy_until_a_name_is_used(imports):
    assert imports["ddpm_hf"] == imports["ddpm_hf.cli"] == []
    assert "torch" in imports["ddpm_hf.DDPMScheduler"]


def test_every_public_name_exists():
    for name in ddpm_hf.__all__:
        assert getattr(ddpm_hf, name) is not None
    assert set(ddpm_hf.__all__) <= set(dir(ddpm_hf))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ddpm_hf.no_such_name


def test_import_paths_of_0_1_0_are_the_same_modules(imports):
    assert len(imports["moved"]) > 1
    assert all(imports["moved"])
