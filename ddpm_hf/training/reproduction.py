"""An experiment of the paper from start to end: train, sample, measure, and the paper's numbers beside ours.

```
output_dir/              the training run, as `ddpm-hf train` leaves it
  reproduction.md        the paper's numbers and ours
  reproduction.json      the same as data
  reproduction/          report.json, report.md, pictures and work/, as `ddpm-hf evaluate` leaves them
    stages.json          what is finished, and with which settings
```

Killed anywhere, the same call goes on: training from its latest checkpoint, sampling and likelihood from their last
finished batches. What is finished is not made again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.datasets import Images, StreamedImages
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..evaluation.run import EvaluationReport, evaluate, load_splits
from ..evaluation.samples import PAPER_SAMPLES
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..presets import Preset, get_preset
from ..utils.digests import weights_digest
from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.processes import (
    end_with_the_launcher,
    from_first,
    gather,
    only_run_in,
    processes,
    say,
    set_cpu_threads,
    together,
)
from ..utils.text import finite, number, plain, public_name, table
from .configuration import ReproductionConfig, TrainingConfig
from .evaluation import check_sampling
from .run import image_arguments
from .trainer import Trainer

# Table 4, CIFAR-10 test set: reverse process steps (T - t + 1) to rate in bits/dim and distortion as RMSE of 0..255.
PAPER_TABLE_4: Mapping[int, tuple[float, float]] = {
    1000: (1.77581, 0.95136),
    900: (0.11994, 12.02277),
    800: (0.05415, 18.47482),
    700: (0.02866, 24.43656),
    600: (0.01507, 30.80948),
    500: (0.00716, 38.03236),
    400: (0.00282, 46.12765),
    300: (0.00081, 54.18826),
    200: (0.00013, 60.97170),
    100: (0.00000, 67.60125),
}

FOLDER, STAGES = "reproduction", "stages.json"
# Settings that change nothing of what is trained or published, or are set here.
_INCIDENTAL = (
    "output_dir",
    "resume_from_checkpoint",
    "num_cpu_threads",
    "dataloader_num_workers",
    "report_to",
    "logging_steps",
    "eval_batch_size",
)


@dataclass(frozen=True)
class Reproduction:
    """The paper's numbers and ours.

    Attributes:
        preset: The experiment.
        report: Our numbers.
        rows: One for each number that the paper or we have: `number`, `paper` (as `Preset.paper`, or `None`), `ours`
            (as in a report, or `None`), and a `note` on what was less than in the experiment.
        differences: Where training images and recipe were not the preset's.
        table_4: Reverse steps, and rate and distortion of both, of a CIFAR-10 model.
    """

    preset: Preset
    report: EvaluationReport
    rows: list[dict[str, Any]]
    differences: list[str]
    table_4: list[dict[str, float | None]]

    def as_markdown(self) -> str:
        """The page: the table, and what to know before comparing."""
        report = self.report
        parts = [
            f"# {self.preset.name} on {public_name(report.dataset)}",
            f"The experiment: {self.preset.source}.",
            self.table(),
            "± is one standard error; of Inception scores the standard deviation over ten parts, as the paper has it. "
            "The paper's bits/dim are upper bounds, as ours are.",
        ]
        if self.differences:
            parts += ["## Trained otherwise than the preset", "\n".join(f"- {line}" for line in self.differences)]
        if report.warnings:
            parts += ["## Before you compare", "\n".join(f"- {warning}" for warning in report.warnings)]
        if self.table_4:
            head = list(self.table_4[0])
            cells = [
                [f"{row[head[0]]:.0f}", *("-" if row[key] is None else f"{row[key]:.5f}" for key in head[1:])]
                for row in self.table_4
            ]
            parts += [f"## Progressive lossy code, {report.split} (Table 4)", table([head, *cells], texts=())]
        parts.append(f"More in [{FOLDER}/report.md]({FOLDER}/report.md).")
        return "\n\n".join(parts) + "\n"

    def table(self) -> str:
        """The paper's numbers and ours, for terminals too."""
        lines = [["number", "paper", "ours", "note"]]
        for row in self.rows:
            paper, ours = row["paper"], row["ours"]
            theirs = "" if paper is None else " ± ".join(f"{x:g}" for x in paper)
            error = math.nan if ours is None else ours.get("standard_deviation", ours["standard_error"])
            mine = "-" if ours is None else number(ours["value"], error)
            lines.append([row["number"], theirs, mine, row["note"]])
        return table(lines, texts=(0, 3))

    def as_json(self) -> str:
        """The same as data."""
        content = {
            "preset": self.preset.name,
            "source": self.preset.source,
            "dataset": public_name(self.report.dataset),
            "rows": self.rows,
            "differences": self.differences,
            "warnings": self.report.warnings,
            "table_4": self.table_4,
            "model": self.report.model,
            "versions": self.report.versions,
        }
        return json.dumps(finite(content), indent=2) + "\n"


def reproduce(config: TrainingConfig, options: ReproductionConfig) -> Reproduction | None:
    """Train, sample, measure, compare; every process of a launch takes part and returns the same.

    Args:
        config: The training run; it goes on from its latest checkpoint by itself.
        options: How to measure.

    Returns:
        The comparison, which is also in the output folder; `None` where training was asked to stop.

    Raises:
        ValueError: Anything that does not fit together, before anything takes long.
    """
    if config.resume_from_checkpoint not in (None, "latest"):
        raise UserError("reproduce goes on from the latest checkpoint by itself; leave out --resume_from_checkpoint")
    config = dataclasses.replace(config, resume_from_checkpoint="latest")
    end_with_the_launcher()
    folder, here = Path(config.output_dir), processes()
    pipe = _trained(config)
    if pipe is None:
        if not _train(config, options):
            return None
        with together():  # what is measured is what is on disk, now and when this goes on in another process
            pipe = DDPMPipeline.from_pretrained(folder).to(here.device)
    report, sizes = _measured(config, options, pipe)
    found = compare_with_paper(config, options, report, sizes)
    with together():
        if here.is_main_process:
            write_text(folder / "reproduction.md", found.as_markdown())
            write_text(folder / "reproduction.json", found.as_json())
    return found


# ---------------------------------------------------------------------- stages


def _stages(folder: Path) -> dict[str, Any]:
    """What is finished; the same in every process."""
    found: Any = {}
    if processes().is_main_process:
        with suppress(OSError, ValueError):
            found = json.loads((folder / FOLDER / STAGES).read_text(encoding="utf-8"))
    return from_first(found if isinstance(found, dict) else {})


def _finish(folder: Path, stage: str, content: dict[str, Any]) -> None:
    stages = {**_stages(folder), stage: content}
    with together():
        if processes().is_main_process:
            write_text(folder / FOLDER / STAGES, json.dumps(stages, indent=1) + "\n")


def _training_settings(config: TrainingConfig) -> dict[str, Any]:
    return plain({key: value for key, value in config.public_values().items() if key not in _INCIDENTAL})


def _trained(config: TrainingConfig) -> DDPMPipeline | None:
    """The model, if its training is finished and the folder still holds what came out of it."""
    folder = Path(config.output_dir)
    stage = _stages(folder).get("training")
    if stage is None or stage["settings"] != _training_settings(config):
        return None
    pipe = None
    with together(), suppress(OSError, ValueError):  # what is damaged is made again, from the last checkpoint
        pipe = DDPMPipeline.from_pretrained(folder)
    if not all(gather(pipe is not None and weights_digest(pipe.unet) == stage["weights"])) or pipe is None:
        return None
    here = processes()
    set_cpu_threads(config.num_cpu_threads, here.num_processes)
    say(f"training is finished: {stage['updates']} updates")
    return pipe.to(here.device)


def _train(config: TrainingConfig, options: ReproductionConfig) -> bool:
    """Train to the end; `False` where it was asked to stop."""
    trainer = Trainer(config)
    with together():  # what can be known of the evaluation, before days of training
        sets = _load_sets(config)
        check_sampling(
            DDPMPipeline(trainer.unet, DDPMScheduler(**trainer.recipe.scheduler)),
            sets,
            options.metrics(),
            **_sampling(config, options),
        )
    del sets
    pipe = trainer.train(end_processes=False)
    if pipe is not None:
        _finish(
            Path(config.output_dir),
            "training",
            {
                "settings": _training_settings(config),
                "updates": trainer.step,
                "weights": weights_digest(pipe.unet),
            },
        )
    return pipe is not None


def _sampling(config: TrainingConfig, options: ReproductionConfig) -> dict[str, Any]:
    return {
        "num_samples": options.num_samples,
        "features": options.feature_names(),
        "inception_weights": options.inception_weights,
        "sampler": config.sampler,
        "num_inference_steps": options.num_inference_steps,
    }


def _load_sets(config: TrainingConfig) -> dict[str, Images]:
    """The training images and the held-out ones, as they are: cropped in the middle, not flipped."""
    arguments = image_arguments(config, center=True)
    if arguments.pop("streaming", False):
        raise UserError("reproduce compares samples with whole datasets; leave out --streaming")
    return load_splits(None, True, **arguments)


def _measured(
    config: TrainingConfig, options: ReproductionConfig, pipe: DDPMPipeline
) -> tuple[EvaluationReport, dict[str, int]]:
    """Our numbers, and how many images each split has."""
    folder, here = Path(config.output_dir), processes()
    settings = plain(
        {
            "weights": weights_digest(pipe.unet),
            "images": [config.images_given(), config.image_options(), config.validation_split],
            "sampler": config.sampler,
            **dataclasses.asdict(options),
            "batch_size": None,
        }
    )
    stage = _stages(folder).get("evaluation")
    if stage is not None and stage["settings"] == settings and from_first((folder / FOLDER / "report.json").is_file()):
        say("the evaluation is finished")
        with together():
            return EvaluationReport.load(folder / FOLDER), stage["sizes"]
    with together():
        sets = _load_sets(config)
    with ExitStack() as held:
        with together():
            if here.is_main_process:
                held.enter_context(only_run_in(folder))
        report = evaluate(
            pipe,
            sets,
            options.metrics(),
            num_images=options.num_images,
            batch_size=options.batch_size or config.evaluation_batch(here.num_processes),
            output=folder / FOLDER,
            model_name=config.output_dir,
            progress=True,
            **_sampling(config, options),
        )
        sizes = {split: len(images) for split, images in sets.items() if not isinstance(images, StreamedImages)}
        _finish(folder, "evaluation", {"settings": settings, "sizes": sizes})
    return report, sizes


# ---------------------------------------------------------------------- comparison


def compare_with_paper(
    config: TrainingConfig, options: ReproductionConfig, report: EvaluationReport, sizes: Mapping[str, int]
) -> Reproduction:
    """Numbers beside the paper's, each with what was less than in the experiment.

    Args:
        config, options: How it was trained and measured.
        report: Our numbers.
        sizes: How many images each split has.
    """
    preset, recipe = get_preset(config.preset), config.resolved_preset()
    updates = []
    if recipe.max_train_steps < preset.max_train_steps:
        updates = [f"{recipe.max_train_steps:,} of {preset.max_train_steps:,} updates"]
    differences = _differences(preset, recipe)
    # Of a name on the Hub or a path: cifar10, uoft-cs/cifar10 and /data/CIFAR10 are the same images, cifar100 is not.
    # LSUN and CelebA-HQ have no such name: their presets say nothing of a dataset, and nothing is said of theirs.
    images = public_name(report.dataset).lower().split("/")[-1]
    if preset.dataset not in (None, images):
        differences.insert(0, f"images of {public_name(report.dataset)} instead of {preset.dataset}")
    rows = []
    for name in [*preset.paper, *(key for key in report.values if key not in preset.paper)]:
        ours = report.values.get(name)
        note = ["not measured here"] if ours is None else [*_less(report, name, sizes), *updates]
        rows.append({"number": name, "paper": _list(preset.paper.get(name)), "ours": ours, "note": ", ".join(note)})
    return Reproduction(preset, report, rows, differences, _table_4(preset, report))


def _list(values: tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else list(values)


def _less(report: EvaluationReport, name: str, sizes: Mapping[str, int]) -> list[str]:
    """What a number was made with less of."""
    settings = report.settings.get(name, {})
    if "num_samples" not in settings:
        count, whole = settings["num_images"], sizes.get(settings["split"], settings["num_images"])
        return [f"{count:,} of {whole:,} {settings['split']} images"] if count < whole else []
    less = []
    if settings["num_samples"] < PAPER_SAMPLES:
        less.append(f"{settings['num_samples']:,} of {PAPER_SAMPLES:,} samples")
    sampling = report.settings["sampling"]
    if sampling["sampler"] != "DDPMScheduler":
        less.append(sampling["sampler"])
    steps, T = sampling["num_inference_steps"], sampling["scheduler"]["num_train_timesteps"]
    return less + ([f"{steps} of {T} steps"] if steps < T else [])


def _differences(preset: Preset, recipe: Preset) -> list[str]:
    """Where a recipe is not the preset's."""
    lines = []
    for field in dataclasses.fields(Preset):
        planned, done = getattr(preset, field.name), getattr(recipe, field.name)
        if isinstance(planned, Mapping):
            for key in {**planned, **done}:
                if planned.get(key) != done.get(key):
                    lines.append(f"{key} {done.get(key)} instead of {planned.get(key)}")
        elif planned != done:
            lines.append(f"{field.name} {done} instead of {planned}")
    return lines


def _table_4(preset: Preset, report: EvaluationReport) -> list[dict[str, float | None]]:
    """Table 4's columns of both, where the experiment is the paper's."""
    if preset.name != "cifar10":
        return []
    rows = report.tables.get(f"Progressive lossy code, {report.split} (Table 4)", [])
    ours = {row["reverse steps"]: row for row in rows}
    return [
        {
            "reverse steps": steps,
            "rate (bits/dim), paper": rate,
            "rate (bits/dim), ours": ours[steps]["rate (bits/dim)"] if steps in ours else None,
            "RMSE, paper": rmse,
            "RMSE, ours": ours[steps]["distortion (RMSE)"] if steps in ours else None,
        }
        for steps, (rate, rmse) in PAPER_TABLE_4.items()
    ]
