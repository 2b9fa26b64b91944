"""An experiment of the paper from start to end: train, sample, measure, and the paper's numbers beside ours.

```
output_dir/              the training run, as `ddpm-hf train` leaves it
  reproduction.md        the paper's numbers and ours
  reproduction.json      the same as data
  reproduction/          report.json, report.md, pictures and work/, as `ddpm-hf evaluate` leaves them
    stages.json          what is finished, and with which settings
```

Killed anywhere, the same call resumes: training from its latest checkpoint, sampling and likelihood from their last
finished batches. What is finished is not made again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.datasets import Images
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..evaluation.options import SAMPLE_METRICS, EvaluationOptions
from ..evaluation.report import EvaluationReport
from ..evaluation.run import check_evaluation, evaluate, load_splits
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
    log,
    only_run_in,
    processes,
    raise_on_all_ranks,
    set_cpu_threads,
)
from ..utils.text import finite, number, plain, public_name, table
from .configuration import ReproductionConfig, TrainingConfig
from .run import image_arguments
from .trainer import Trainer

# Table 4, CIFAR-10 test set: reverse process steps (T - t + 1), to rate in bits/dim and distortion as RMSE of 0..255.
_STEPS = range(1000, 0, -100)
_RATES = (1.77581, 0.11994, 0.05415, 0.02866, 0.01507, 0.00716, 0.00282, 0.00081, 0.00013, 0.00000)
_RMSES = (0.95136, 12.02277, 18.47482, 24.43656, 30.80948, 38.03236, 46.12765, 54.18826, 60.97170, 67.60125)
PAPER_TABLE_4 = dict(zip(_STEPS, zip(_RATES, _RMSES, strict=True), strict=True))

FOLDER, STAGES = "reproduction", "stages.json"


@dataclass(frozen=True)
class Reproduction:
    """The paper's numbers and ours."""

    preset: Preset  # the experiment
    report: EvaluationReport  # our numbers
    rows: list[dict[str, Any]]  # `number`, `paper` (as in `Preset`, or `None`), `ours` (as in a report), `note`
    differences: list[str]  # where training images and recipe were not the preset's
    table_4: list[dict[str, float | None]]  # reverse steps, and rate and distortion of both, of a CIFAR-10 model

    def as_markdown(self) -> str:
        """Return the page: the table, and what to know before comparing."""
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
            lines = [list(self.table_4[0])]
            for steps, *numbers in (row.values() for row in self.table_4):
                lines.append([f"{steps:.0f}", *("-" if x is None else f"{x:.5f}" for x in numbers)])
            parts += [f"## Progressive lossy code, {report.split} (Table 4)", table(lines, texts=())]
        parts.append(f"More in [{FOLDER}/report.md]({FOLDER}/report.md).")
        return "\n\n".join(parts) + "\n"

    def table(self) -> str:
        """Return the paper's numbers and ours, for terminals too."""
        lines = [["number", "paper", "ours", "note"]]
        for row in self.rows:
            ours, mine = row["ours"], "-"
            if ours is not None:
                mine = number(ours["value"], ours.get("standard_deviation", ours["standard_error"]))
            lines.append([row["number"], " ± ".join(f"{x:g}" for x in row["paper"] or []), mine, row["note"]])
        return table(lines, texts=(0, 3))

    def as_json(self) -> str:
        """Return the same as data."""
        preset, report = self.preset, self.report
        content: dict[str, Any] = {"preset": preset.name, "source": preset.source}
        content["dataset"] = public_name(report.dataset)
        content |= {"rows": self.rows, "differences": self.differences, "warnings": report.warnings}
        content |= {"table_4": self.table_4, "model": report.model, "versions": report.versions}
        return json.dumps(finite(content), indent=2) + "\n"


def reproduce(config: TrainingConfig, options: ReproductionConfig) -> Reproduction | None:
    """Train, sample, measure, compare; every process of a launch takes part and returns the same.

    Returns:
        The comparison, which is also in the output folder; `None` where training was asked to stop.

    Raises:
        UserError: Anything that does not fit together, before anything takes long.
    """
    if config.resume_from_checkpoint not in (None, "latest"):
        raise UserError("reproduce resumes from the latest checkpoint by itself; leave out --resume_from_checkpoint")
    if config.init_from is not None:
        raise UserError("reproduce trains the paper's networks from their initialisation; leave out --init_from")
    config = dataclasses.replace(config, resume_from_checkpoint="latest")
    end_with_the_launcher()
    folder = Path(config.output_dir)
    pipe = _load_trained(config)
    if pipe is None:
        if not _train(config, options):
            return None
        with raise_on_all_ranks():  # what is measured is what is on disk, now and when another process resumes this
            pipe = DDPMPipeline.from_pretrained(folder).to(processes().device)
    report, sizes = _measure(config, options, pipe)
    found = compare_with_paper(config, report, sizes)
    with raise_on_all_ranks():
        if processes().is_main_process:
            write_text(folder / "reproduction.md", found.as_markdown())
            write_text(folder / "reproduction.json", found.as_json())
    return found


def _finished(folder: Path) -> dict[str, Any]:
    """Return what was recorded of finished stages; the same in every process."""
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError):
        found = {**json.loads((folder / FOLDER / STAGES).read_text(encoding="utf-8"))}
    return from_first(found)


def _record(folder: Path, stage: str, content: dict[str, Any]) -> None:
    stages = {**_finished(folder), stage: content}
    with raise_on_all_ranks():
        if processes().is_main_process:
            write_text(folder / FOLDER / STAGES, json.dumps(stages, indent=1) + "\n")


def _training_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return all settings but those that change nothing of what is trained or published, or are set here."""
    others = "output_dir resume_from_checkpoint num_cpu_threads dataloader_num_workers report_to logging_steps"
    return plain({k: v for k, v in config.public_values().items() if k not in (*others.split(), "eval_batch_size")})


def _load_trained(config: TrainingConfig) -> DDPMPipeline | None:
    """Load the model, if its training is finished and the folder still holds what came out of it."""
    folder, here = Path(config.output_dir), processes()
    stage = _finished(folder).get("training")
    if stage is None or stage["settings"] != _training_settings(config):
        return None
    pipe = None
    with (
        raise_on_all_ranks(),
        suppress(OSError, ValueError),
    ):  # what is damaged is made again, from the last checkpoint
        pipe = DDPMPipeline.from_pretrained(folder)
    if not all(gather(pipe is not None and weights_digest(pipe.unet) == stage["weights"])) or pipe is None:
        return None
    set_cpu_threads(config.num_cpu_threads, here.num_processes)
    log(f"training is finished: {stage['updates']} updates")
    return pipe.to(here.device)


def _train(config: TrainingConfig, options: ReproductionConfig) -> bool:
    """Train to the end; return `False` where it was asked to stop."""
    trainer = Trainer(config)
    with raise_on_all_ranks():  # what can be known of the evaluation, before days of training
        pipe = DDPMPipeline(trainer.unet, DDPMScheduler(**trainer.recipe.scheduler))
        for_samples = [metric for metric in options.metrics() if metric in SAMPLE_METRICS]
        check_evaluation(pipe, _load_sets(config), for_samples, _options(config, options))
    trained = trainer.train(end_processes=False)
    if trained is None:
        return False
    content = {
        "settings": _training_settings(config),
        "updates": trainer.step,
        "weights": weights_digest(trained.unet),
    }
    _record(Path(config.output_dir), "training", content)
    return True


def _options(config: TrainingConfig, options: ReproductionConfig) -> EvaluationOptions:
    return EvaluationOptions(
        num_images=options.num_images,
        num_samples=options.num_samples,
        batch_size=options.batch_size
        or config.evaluation_batch(config.resolved_preset().unet, processes().num_processes),
        sampler=config.sampler,
        num_inference_steps=options.num_inference_steps,
        features=options.feature_names(),
        inception_weights=options.inception_weights,
        model_name=config.output_dir,
        progress=True,
    )


def _load_sets(config: TrainingConfig) -> dict[str, Images]:
    """Load the training images and the held-out ones, as they are: cropped in the middle, not flipped."""
    arguments = image_arguments(config, config.resolved_preset().unet, center=True)
    if arguments.pop("streaming", False):
        raise UserError("reproduce compares samples with whole datasets; leave out --streaming")
    return load_splits(None, True, **arguments)


def _measure(config: TrainingConfig, options: ReproductionConfig, pipe: DDPMPipeline) -> tuple[EvaluationReport, Any]:
    """Return our numbers, and how many images each split has."""
    folder = Path(config.output_dir)
    images = [config.images_given(), config.image_options(), config.validation_split]
    made_of = {"weights": weights_digest(pipe.unet), "images": images, "sampler": config.sampler}
    settings = plain({**made_of, **dataclasses.asdict(options), "batch_size": None})
    stage = _finished(folder).get("evaluation", {})
    if stage.get("settings") == settings and from_first((folder / FOLDER / "report.json").is_file()):
        log("the evaluation is finished")
        with raise_on_all_ranks():
            return EvaluationReport.load(folder / FOLDER), stage["sizes"]
    with raise_on_all_ranks():
        sets = _load_sets(config)
    with ExitStack() as held:
        with raise_on_all_ranks():
            if processes().is_main_process:
                held.enter_context(only_run_in(folder))
        report = evaluate(pipe, sets, options.metrics(), _options(config, options), output=folder / FOLDER)
        sizes = {split: len(images) for split, images in sets.items()}  # type: ignore[arg-type]  # none is a stream
        _record(folder, "evaluation", {"settings": settings, "sizes": sizes})
    return report, sizes


def compare_with_paper(config: TrainingConfig, report: EvaluationReport, sizes: Mapping[str, int]) -> Reproduction:
    """Put numbers beside the paper's, with notes on what was less than there; `sizes` are the images of each split."""
    preset, recipe = get_preset(config.preset), config.resolved_preset()
    done, planned = recipe.max_train_steps, preset.max_train_steps
    updates = [f"{done:,} of {planned:,} updates"] if done < planned else []
    differences = _differences(preset, recipe)
    # Of a name on the Hub or a path: cifar10, uoft-cs/cifar10 and /data/CIFAR10 are the same images, cifar100 is not.
    # LSUN and CelebA-HQ have no such name: their presets say nothing of a dataset, and nothing is said of theirs.
    images = public_name(report.dataset).lower().split("/")[-1]
    if preset.dataset not in (None, images):
        differences.insert(0, f"images of {public_name(report.dataset)} instead of {preset.dataset}")
    rows = []
    for name in dict.fromkeys([*preset.paper, *report.values]):
        paper, ours = preset.paper.get(name), report.values.get(name)
        note = ["not measured here"] if ours is None else [*_less_than_paper(report, name, sizes), *updates]
        rows.append({"number": name, "paper": paper and list(paper), "ours": ours, "note": ", ".join(note)})
    return Reproduction(preset, report, rows, differences, _table_4(preset, report))


def _less_than_paper(report: EvaluationReport, name: str, sizes: Mapping[str, int]) -> list[str]:
    """Return which images, samples or steps a number was computed with fewer of."""
    settings = report.settings.get(name, {})
    if "num_samples" not in settings:
        count, whole = settings["num_images"], sizes.get(settings["split"], settings["num_images"])
        return [f"{count:,} of {whole:,} {settings['split']} images"] if count < whole else []
    count, sampling = settings["num_samples"], report.settings["sampling"]
    steps, T = sampling["num_inference_steps"], sampling["scheduler"]["num_train_timesteps"]
    less = [f"{count:,} of {PAPER_SAMPLES:,} samples"] if count < PAPER_SAMPLES else []
    less += [sampling["sampler"]] if sampling["sampler"] != "DDPMScheduler" else []
    return less + ([f"{steps} of {T} steps"] if steps < T else [])


def _differences(preset: Preset, recipe: Preset) -> list[str]:
    """Return where a recipe is not the preset's."""
    lines = []
    for name, planned in vars(preset).items():
        done = getattr(recipe, name)
        if not isinstance(planned, Mapping):
            planned, done = {name: planned}, {name: done}
        for key in {**planned, **done}:
            if planned.get(key) != done.get(key):
                lines.append(f"{key} {done.get(key)} instead of {planned.get(key)}")
    return lines


def _table_4(preset: Preset, report: EvaluationReport) -> list[dict[str, float | None]]:
    """Return Table 4's columns of both, where the experiment is the paper's."""
    if preset.name != "cifar10":
        return []
    rows = report.tables.get(f"Progressive lossy code, {report.split} (Table 4)", [])
    measured = {row["reverse steps"]: row for row in rows}
    return [
        {
            "reverse steps": steps,
            "rate (bits/dim), paper": rate,
            "rate (bits/dim), ours": measured.get(steps, {}).get("rate (bits/dim)"),
            "RMSE, paper": rmse,
            "RMSE, ours": measured.get(steps, {}).get("distortion (RMSE)"),
        }
        for steps, (rate, rmse) in PAPER_TABLE_4.items()
    ]
