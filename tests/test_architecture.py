"""The floors of the design: a module imports from floors below its own only, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_hf

FLOORS = (
    ("errors",),
    (
        "presets",
        "distributions",
        "noise_schedule",
        "processes",
        "randomness",
        "weight_names",
        "weight_files",
        "image_files",
        "image_folders",
        "hub_errors",
        "reports",
        "command_line",
        "command_completion",
        "winograd",
        "machine",
        "class_labels",
    ),
    (
        "scheduling_ddpm",
        "unet_2d",
        "image_tensors",
        "image_decoding",
        "image_tables",
        "visualize",
        "configuration",
        "model_card",
        "pipeline_inputs",
        "shards",
    ),
    (
        "likelihood",
        "pipeline_ddpm",
        "checkpointing",
        "image_sources",
        "streamed_images",
        "metrics",
        "features",
        "evaluation_plots",
    ),
    (
        "data",
        "objectives",
        "generation",
        "figures",
        "hub_files",
        "convert",
        "likelihood_evaluation",
        "sample_evaluation",
        "inference",
    ),
    ("evaluation", "training_batches", "hub", "space_demo", "optimal_variance"),
    ("hub_background", "training_evaluation", "space", "space_page"),
    ("publishing", "run_identity", "training_update"),
    ("training",),
    ("reproduction",),
    ("command_train", "command_model", "command_convert", "command_publish"),
    ("command_figure", "command_evaluate"),
    ("command_sample",),
    ("cli",),
)
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
PACKAGE = Path(ddpm_hf.__file__).parent


def imported_modules(source: str) -> set[str]:
    """Modules of this package that a source file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 1:
                found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
            elif module.split(".")[0] == "ddpm_hf":
                found |= {module.split(".")[1]} if "." in module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.split(".")[1] for a in node.names if (name := a.name).startswith("ddpm_hf.")}
    return found - {"__version__"}


def violations(module: str, source: str) -> list[str]:
    return [
        f"{module} (floor {FLOOR_OF[module]}) imports {other} (floor {FLOOR_OF.get(other)})"
        for other in sorted(imported_modules(source))
        if other not in FLOOR_OF or FLOOR_OF[other] >= FLOOR_OF[module]
    ]


def test_every_module_has_a_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(FLOOR_OF)
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("module", FLOOR_OF)
def test_imports_go_down(module):
    assert violations(module, (PACKAGE / f"{module}.py").read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from .training import Trainer",
        "from . import training",
        "from ddpm_hf.training import Trainer",
        "import ddpm_hf.training",
        "def f():\n    from .evaluation import EvaluationReport",
        "from .unheard_of import x",
    ],
)
def test_an_upward_or_sideways_import_is_found(line):
    assert violations("generation", line)


@pytest.mark.parametrize("module", FLOOR_OF)
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text()))


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_loads_nothing_heavy_until_a_name_is_used():
    heavy = "[m for m in ('torch', 'diffusers', 'accelerate', 'datasets', 'transformers', 'PIL') if m in sys.modules]"
    assert run_python(f"import sys, ddpm_hf; print({heavy})") == "[]"
    assert run_python(f"import sys, ddpm_hf.cli; print({heavy})") == "[]"
    assert "torch" in run_python(f"import sys, ddpm_hf; ddpm_hf.DDPMScheduler; print({heavy})")


def test_every_public_name_exists():
    for name in ddpm_hf.__all__:
        assert getattr(ddpm_hf, name) is not None
    assert set(ddpm_hf.__all__) <= set(dir(ddpm_hf))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ddpm_hf.no_such_name
