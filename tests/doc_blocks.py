"""The blocks of code in README.md, docs/ and the notebooks, and the little world in which all of them run.

`tests/test_docs.py` starts this file as a program, so that a Hub of its own and small networks surround no other test:

    python tests/doc_blocks.py RESULTS.json      # runs everything, prints a line per block

Every page has a folder of its own, in which its blocks run in order: Python in one namespace, as in a session, and
commands in this process, `ddpm-hf` through `cli.main` and scripts as `python` would run them. What is smaller than a
reader's run is in the tables below, and nothing else is: `SMALLER` (flags added to commands), `SMALLER_PYTHON`,
`small_presets`, `SmallInception`, `make_world`, and that launchers' own flags are read by the launchers' own parsers,
but start one process.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOKEN = "hf_test_token"

# Flags that are added to a command, and win over those in the text.
_TRAIN = (
    "--max_train_steps 2 --total_batch_size 4 --lr_warmup_steps 1 --checkpointing_steps 2 --num_sample_images 2 "
    "--ddpm_num_inference_steps 5 --eval_num_images 2 --eval_num_evaluations 2 --eval_num_samples 12"
)
SMALLER = {
    "train": _TRAIN,
    "sample": "--num_inference_steps 5",
    "evaluate": "--num_images 2 --num_samples 12 --num_inference_steps 5",
    "reproduce": f"{_TRAIN} --num_images 1 --num_samples 12 --num_inference_steps 5",
    "optimal_variance": "--num_images 2",
    "distill": "--max_train_steps 2 --num_trajectories 4 --num_sample_images 2 --steps 5 --teacher_steps 5",
    "ema": "--num_images 2 --num_samples 12 --num_inference_steps 5",
    "best_timesteps": "--num_images 2 --num_inference_steps 5 --num_samples 4 --num_trials 2",
}
# These only where the text has them, too: `--seeds 0-63` becomes `--seeds 0-3`.
SMALLER_IF_GIVEN = {"--seeds": "0-3", "--validation_steps": "2", "--save_images_steps": "2"}
SMALLER_PYTHON = {
    "num_inference_steps=1000": "num_inference_steps=5",
    "num_inference_steps=250": "num_inference_steps=10",
    "num_inference_steps=100": "num_inference_steps=5",
    "num_samples=1000": "num_samples=12",
    "max_train_steps=2500": "max_train_steps=4, total_batch_size=8, num_sample_images=2",
    "ddpm_num_inference_steps=100": "ddpm_num_inference_steps=5",
    "num_evaluations=50": "num_evaluations=2",
    '["_timesteps"]["20"]': '["_timesteps"]["5"]',
    "range(16)": "range(2)",
    "range(2 * 8))": "range(2 * 8), num_inference_steps=5)",
    # Stock takes 1000 steps if none are given, whatever the chain has.
    "pipe(batch_size=4, generator": "pipe(num_inference_steps=50, batch_size=4, generator",
}

# Commands that cannot run here, by how they begin: why, and what is checked instead.
NOT_RUN = {
    "make ": ("these set up whole environments and train; .ci/run runs them", "target"),
    "pip install": ("test_packaging.py builds and installs the package", "nothing"),
    "python3 -m venv": ("makes an environment", "nothing"),
    "uv run ": ("installs the released package; test_packaging.py checks what it asks for", "script"),
    "hf jobs ": ("needs an account of the Hub", "script"),
    "source ": ("activates an environment", "nothing"),
    "hf auth login": ("needs a person", "nothing"),
    "DDPM_HF_SPACE_MODELS=": ("serves until it is stopped; hub/test_space.py starts the same file", "script"),
    "ddpm-hf scale_epsilon": ("the quarter chain is not the network's; evaluation/test_epsilon_scaling.py", "flags"),
    "ddpm-hf convert": ("needs others' checkpoints and TensorFlow; convert/test_conversion.py converts", "flags"),
}
# Blocks that cannot run, by page and first line.
BLOCKS_NOT_RUN = {
    ("docs/images.md", "for key, value in lmdb.open("): "the package lmdb is not a dependency; the lines are compiled",
}
# Pages whose first step makes what the world has already.
MADE_BY_THE_PAGE = {"docs/first_model.md": "runs/digits"}
SHOWN = ("text", "bibtex")  # languages of blocks that are for reading


@dataclasses.dataclass
class Block:
    """One fenced block, or one cell of a notebook."""

    page: str
    line: int
    language: str
    text: str


def pages() -> list[str]:
    found = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    return found + [f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.ipynb"))]


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order.

    Raises:
        ValueError: A fence is not closed.
    """
    text = (ROOT / page).read_text()
    if page.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        code = [(i, "".join(cell["source"])) for i, cell in enumerate(cells) if cell["cell_type"] == "code"]
        return [Block(page, i, "python", source) for i, source in code]
    found: list[Block] = []
    start, lines = None, text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start, language = number, line.strip().removeprefix("```").strip()
        else:
            inside = lines[start : number - 1]
            indent = min((len(line) - len(line.lstrip()) for line in inside if line.strip()), default=0)
            found.append(Block(page, start, language, "\n".join(line[indent:] for line in inside)))
            start = None
    if start is not None:
        raise ValueError(f"{page}:{start}: the block is not closed")
    return found


def commands(text: str) -> list[str]:
    """The commands of a bash block: continued lines joined, comments gone."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [shlex.join(words) for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def reason_not_to_run(command: str) -> tuple[str, str] | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


def smaller(name: str, arguments: list[str]) -> list[str]:
    """The arguments of `ddpm-hf NAME`, with those that make it small."""
    if "--compare" in arguments or (name == "ema" and "--sweep" not in arguments):
        return arguments
    added = SMALLER.get(name, "").split()
    metrics = arguments[arguments.index("--metrics") + 1] if "--metrics" in arguments else "nll"
    if name == "evaluate" and not {"nll", "rate_distortion"} & set(metrics.split(",")):
        added = added[2:]
    if "--gradient_accumulation_steps" in arguments or "--train_batch_size" in arguments:
        raise ValueError("add the batch size of this command to SMALLER")
    for flag, value in SMALLER_IF_GIVEN.items():
        if flag in arguments and "--figure" not in arguments:
            added += [flag, value]
    return [*arguments, *added]


# ---------------------------------------------------------------- the world


def small_presets() -> None:
    """Every preset with narrow, shallow networks and a short chain: the same blocks, flags and files."""
    from ddpm_hf import presets

    small = {}
    for name, preset in presets.PRESETS.items():
        widths = (8,) * len(preset.unet["block_out_channels"])
        unet = {**preset.unet, "block_out_channels": widths, "norm_num_groups": 4, "layers_per_block": 1}
        scheduler = {**preset.scheduler, "num_train_timesteps": 50}
        small[name] = dataclasses.replace(preset, unet=unet, scheduler=scheduler)
    presets.PRESETS = small


class SmallInception:
    """In place of the Inception network, which is slow and whose weights are not here: a random linear map."""

    name, takes_floats, fingerprint, description = "inception", True, "small", "a random linear map"

    def __init__(self, weights: Any = None, device: Any = "cpu"):
        import torch

        self.map = torch.randn(48, 12, generator=torch.Generator().manual_seed(0)) / 100

    def __call__(self, images: Any) -> dict[str, Any]:
        import torch

        colour = images.float().expand(-1, 3, -1, -1)
        features = torch.nn.functional.adaptive_avg_pool2d(colour, 4).flatten(1) @ self.map
        return {"features": features, "logits": features[:, :10] / 10}


def make_world(folder: Path) -> None:
    """What the pages speak of: a trained model, pictures, datasets, two reports."""
    import numpy as np
    from datasets import Dataset, Features, Image
    from PIL import Image as Pictures

    from ddpm_hf import EvaluationReport

    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "ddpm_hf/models/digits", folder / "runs/digits")
    config = folder / "runs/digits/scheduler/scheduler_config.json"
    quarter = {"num_train_timesteps": 250, "beta_end": 0.08}  # a chain of a quarter, which ends in noise as well
    config.write_text(json.dumps({**json.loads(config.read_text()), **quarter}))
    shutil.copytree(folder / "runs/digits", folder / "runs/digits-small")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "my-images").mkdir()
    random = np.random.default_rng(0)

    def picture(height: int, width: int, channels: int = 3) -> Any:
        pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
        return Pictures.fromarray(pixels[..., 0] if channels == 1 else pixels)

    for i in range(60):
        picture(64 + i % 20, 80 - i % 20, (3, 1, 4)[i % 3]).save(folder / f"my-images/{i}.png")
    for name in ("a", "b", "c", "d", "photo", "mask"):
        picture(20, 16, 1).save(folder / f"{name}.png")
    make_stock_model(folder / "ddpm-model-64")
    shutil.copytree(folder / "ddpm-model-64", folder / "from-openai")
    (folder / "named-images").mkdir()
    for name in ("cat_1", "cat_2", "dog_1"):
        picture(20, 16).save(folder / f"named-images/{name}.png")
    features = Features({"img": Image()})
    for name in ("cifar10", "uoft-cs/cifar10"):
        for split, count in (("train", 24), ("test", 14)):
            (folder / name / "data").mkdir(parents=True, exist_ok=True)
            table = Dataset.from_dict({"img": [picture(32, 32) for _ in range(count)]}, features)
            table.to_parquet(folder / name / "data" / f"{split}-00000-of-00001.parquet")
    for name in ("first", "second"):
        report = EvaluationReport("digits", "validation", 2)
        report.add("bits_per_dim", 4.4, 0.1, {"split": "validation", "num_images": 2})
        (folder / name).mkdir()
        report.save(folder / name / "report.json")


def make_stock_model(folder: Path) -> None:
    """What diffusers' unconditional example leaves, with the EMA weights of a checkpoint."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    unet = UNet2DModel(64, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config)
    ema.save_pretrained(folder / "checkpoint-500" / "unet_ema")


def make_hub_model(hub: Any) -> None:
    """`org/ddpm-cifar10`, as somebody pushed it."""
    from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel

    folder = hub.root / "made"
    DDPMPipeline(UNet2DModel.from_preset("cifar10"), DDPMScheduler.from_preset("cifar10")).save_pretrained(folder)
    hub.create("models", "org/ddpm-cifar10", private=False)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.commit("models", "org/ddpm-cifar10", "a model", files)


# ---------------------------------------------------------------- running


def run_script(path: str, arguments: list[str]) -> None:
    """`python PATH ARGUMENTS`, in this process."""
    kept, sys.argv = sys.argv, [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"{path} ended with {end.code}") from None
    finally:
        sys.argv = kept


def run_program(words: list[str]) -> None:
    """A script or module, as what a launcher starts: `examples/train.py ...` or `-m ddpm_hf.cli NAME ...`."""
    from accelerate.state import AcceleratorState

    from ddpm_hf import cli

    AcceleratorState._reset_state()  # it keeps one precision per process, and each command stands for one
    if words[:2] == ["-m", "ddpm_hf.cli"]:
        name, arguments = words[2], words[3:]
        if cli.main([name, *smaller(name, arguments)]) != 0:
            raise RuntimeError(f"ddpm-hf {name} failed")
    elif words[0] == "examples/train.py":
        run_script(words[0], smaller("train", words[1:]))
    else:
        run_script(words[0], words[1:])


def run_command(command: str) -> str:
    """Run one command, or check it. Returns what was done."""
    if reason := reason_not_to_run(command):
        check_command(command, reason[1])
        return f"not run: {reason[0]}"
    words = shlex.split(command)
    if words[0] == "ddpm-hf":
        run_program(["-m", "ddpm_hf.cli", *words[1:]])
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.config.config_args import load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        own = launch_command_parser().parse_args(words[2:])
        if own.config_file is not None:
            load_config_from_file(own.config_file)
        run_program([*(["-m"] if own.module else []), own.training_script, *own.training_script_args])
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        own = get_args_parser().parse_args(words[1:])
        run_program([*(["-m"] if own.module else []), own.training_script, *own.training_script_args])
    elif words[0] == "python":
        run_program(words[1:])
    else:
        raise RuntimeError(f"neither run nor in NOT_RUN: {command}")
    return "run"


def check_command(command: str, what: str) -> None:
    """What can be said of a command without running it.

    Raises:
        ValueError: It is wrong.
    """
    words = shlex.split(command)
    if what == "target":
        makefile = (ROOT / "Makefile").read_text()
        for target in [word for word in words[1:] if "=" not in word]:
            if not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE):
                raise ValueError(f"the Makefile has no target {target}")
    elif what == "script":
        for word in words:
            if word.endswith(".py") and not (ROOT / word).is_file():
                raise ValueError(f"there is no file {word}")
    elif what == "flags":
        from ddpm_hf import cli

        cli.PARSERS[words[1]](f"ddpm-hf {words[1]}").parse_args(words[2:])  # the real parser, and no more


def run_python(block: Block, namespace: dict[str, Any]) -> str:
    """Run a block as a session would: the value of its last line is shown, too."""
    for (page, first), reason in BLOCKS_NOT_RUN.items():
        if block.page == page and block.text.startswith(first):
            compile(block.text, block.page, "exec")
            return f"not run: {reason}"
    text = block.text
    for long, short in SMALLER_PYTHON.items():
        text = text.replace(long, short)
    tree = ast.parse(text)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"{block.page}:{block.line}", "exec"), namespace)
    if isinstance(last, ast.Expr):
        repr(eval(compile(ast.Expression(last.value), f"{block.page}:{block.line}", "eval"), namespace))
    return "run"


def run_block(block: Block, namespace: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, outcome) for each command of a block, or for the block."""
    first = block.text.strip().splitlines()[0] if block.text.strip() else ""
    if block.language == "python":
        return [(first, run_python(block, namespace))]
    if block.language == "bash":
        return [(command, run_command(command)) for command in commands(block.text)]
    if block.language == "yaml" and (named := re.match(r"# ([\w.-]+\.yaml)$", first)):
        Path(named[1]).write_text(block.text)  # a file that a later block reads
        return [(first, "written, and read by a later command")]
    if block.language in SHOWN:
        return [(first, "for reading")]
    raise RuntimeError(f"blocks are python, bash, yaml that begins with '# NAME.yaml', or {SHOWN}")


def run_page(page: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Run a page's blocks in a world of their own; one result per command or block."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    make_world(folder)
    if page in MADE_BY_THE_PAGE:
        shutil.rmtree(folder / MADE_BY_THE_PAGE[page])
    os.chdir(folder)
    for block in blocks(page):
        start, said = time.monotonic(), io.StringIO()
        result = {"page": page, "line": block.line, "language": block.language}
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                done = run_block(block, namespace)
        except BaseException as error:
            text = "".join(traceback.format_exception(error)) + said.getvalue()
            yield {**result, "what": block.text.splitlines()[0], "outcome": "failed", "error": text[-6000:]}
            continue
        seconds = round(time.monotonic() - start, 2)
        yield from ({**result, "what": what, "outcome": outcome, "seconds": seconds} for what, outcome in done)


def main(output: Path, work: Path, only: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(work / "torch"), "DDPM_HF_CACHE": str(work / "cache")}
    os.environ |= {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    from hub.server import HubServer

    results: list[dict[str, Any]] = []
    with HubServer(work / "hub", tokens={TOKEN: "org"}) as hub:
        os.environ |= hub.environment(work / "home", token=TOKEN)
        from ddpm_hf.evaluation import features

        small_presets()
        features.Inception = SmallInception  # type: ignore[misc, assignment]
        make_hub_model(hub)
        for page in only or pages():
            for result in run_page(page, work / "pages" / page.replace("/", "-")):
                results.append(result)
                print(f"{result['page']}:{result['line']}: {result['outcome']}: {result['what'][:90]}", flush=True)
                if "error" in result:
                    print(result["error"], flush=True)
        os.chdir(ROOT)
    output.write_text(json.dumps(results))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as work:
        main(Path(sys.argv[1]).absolute(), Path(work), sys.argv[2:])
