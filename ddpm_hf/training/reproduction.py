"""An experiment of the paper from start to end: train, sample, measure, and the paper's numbers beside ours.

The output folder is that of `ddpm-hf train`, with `reproduction.md` and `reproduction.json` (the paper's numbers and
ours) and `reproduction/`, the folder of `ddpm-hf evaluate`, whose `training.json` says what was trained and how.
"""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..evaluation.options import EvaluationOptions
from ..evaluation.report import EvaluationReport, warnings_section
from ..evaluation.run import check_evaluation, evaluate, load_splits
from ..evaluation.samples import PAPER_SAMPLES, SAMPLE_METRICS
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..presets import Preset, get_preset
from ..utils.digests import weights_digest
from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.processes import end_with_the_launcher, gather, log, processes, raise_on_all_ranks, set_cpu_threads
from ..utils.text import finite, number, plain, public_name, table
from .configuration import ReproductionConfig, TrainingConfig
from .run import image_arguments
from .trainer import Trainer

# Table 4, CIFAR-10 test set: reverse process steps (T - t + 1), to rate in bits/dim and distortion as RMSE of 0..255.
_STEPS = range(1000, 0, -100)
_RATES = (1.77581, 0.11994, 0.05415, 0.02866, 0.01507, 0.00716, 0.00282, 0.00081, 0.00013, 0.00000)
_RMSES = (0.95136, 12.02277, 18.47482, 24.43656, 30.80948, 38.03236, 46.12765, 54.18826, 60.97170, 67.60125)
PAPER_TABLE_4 = dict(zip(_STEPS, zip(_RATES, _RMSES, strict=True), strict=True))

FOLDER = "reproduction"


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
        parts = [
            f"# {self.preset.name} on {public_name(self.report.dataset)}",
            f"The experiment: {self.preset.source}.",
            self.table(),
            "± is one standard error; of Inception scores the standard deviation over ten parts, as the paper has it. "
            "The paper's bits/dim are upper bounds, as ours are.",
        ]
        if self.differences:
            parts += ["## Trained otherwise than the preset", "\n".join(f"- {line}" for line in self.differences)]
        parts += warnings_section(self.report)
        if self.table_4:
            lines = [list(self.table_4[0])]
            for steps, *numbers in (row.values() for row in self.table_4):
                lines.append([f"{steps:.0f}", *("-" if x is None else f"{x:.5f}" for x in numbers)])
            parts += [f"## Progressive lossy code, {self.report.split} (Table 4)", table(lines, texts=())]
        return "\n\n".join([*parts, f"More in [{FOLDER}/report.md]({FOLDER}/report.md)."]) + "\n"

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
        of_report = {name: getattr(report, name) for name in ("warnings", "model", "versions")}
        content = {**vars(self), **of_report, "preset": preset.name, "dataset": public_name(report.dataset)}
        del content["report"]
        return json.dumps(finite({**content, "source": preset.source}), indent=2) + "\n"


def reproduce(config: TrainingConfig, options: ReproductionConfig) -> Reproduction | None:
    """Train, sample, measure, compare; every process of a launch takes part and returns the same.

    Returns the comparison, which is also in the output folder, or `None` where training was asked to stop. Killed
    anywhere, the same call resumes: training from its latest checkpoint, the rest from its last finished batches.
    Raises a UserError for anything that does not fit together, before anything takes long.
    """
    for flag, other in (("resume_from_checkpoint", "latest"), ("init_from", None)):
        if getattr(config, flag) not in (None, other):
            what = "reproduce starts from the paper's initialisation, or resumes by itself"
            raise UserError(f"{what}; leave out --{flag}")
    config = dataclasses.replace(config, resume_from_checkpoint="latest")
    end_with_the_launcher()
    folder, here = Path(config.output_dir), processes()
    pipe = None if config.dry_run else _load_trained(config)
    pipe = pipe or _train(config, options)
    if pipe is None:
        return None
    with raise_on_all_ranks():
        sets = load_splits(None, True, **image_arguments(config, config.resolved_preset().unet, center=True))
    evaluation = _evaluation_options(config, options)
    report = evaluate(pipe.to(here.device), sets, options.metrics(), evaluation, output=folder / FOLDER)
    sizes = {split: len(images) for split, images in sets.items()}  # type: ignore[arg-type]  # none is a stream
    found = compare_with_paper(config, report, sizes)
    with raise_on_all_ranks():
        if here.is_main_process:
            write_text(folder / "reproduction.md", found.as_markdown())
            write_text(folder / "reproduction.json", found.as_json())
    return found


def _training_record(config: TrainingConfig, pipe: DDPMPipeline) -> dict[str, Any]:
    """Return what is written down of a finished training: the weights, and the settings that they depend on."""
    # neither what changes nothing of what is trained or published, nor what is set here
    others = "output_dir resume_from_checkpoint num_cpu_threads dataloader_num_workers report_to logging_steps"
    skipped = [*others.split(), "eval_batch_size"]
    settings = {name: value for name, value in config.public_values().items() if name not in skipped}
    return plain({"settings": settings, "weights": weights_digest(pipe.unet)})


def _load_trained(config: TrainingConfig) -> DDPMPipeline | None:
    """Load the model, if its training is finished and the folder still holds what came out of it."""
    folder, pipe, finished = Path(config.output_dir), None, False
    # what is missing or damaged is made again, from the last checkpoint
    with raise_on_all_ranks(), suppress(OSError, ValueError):
        record = json.loads((folder / FOLDER / "training.json").read_text(encoding="utf-8"))
        pipe = DDPMPipeline.from_pretrained(folder)
        finished = record == _training_record(config, pipe)
    if not all(gather(finished)):
        return None
    set_cpu_threads(config.num_cpu_threads, processes().num_processes)
    log("training is finished")
    return pipe


def _train(config: TrainingConfig, options: ReproductionConfig) -> DDPMPipeline | None:
    """Train to the end; return `None` where it was asked to stop."""
    trainer, folder = Trainer(config), Path(config.output_dir)
    with raise_on_all_ranks():  # what can be known of the evaluation, before days of training
        pipe = DDPMPipeline(trainer.unet, DDPMScheduler(**trainer.recipe.scheduler))
        for_samples = [metric for metric in options.metrics() if metric in SAMPLE_METRICS]
        sets = load_splits(None, True, **image_arguments(config, config.resolved_preset().unet, center=True))
        check_evaluation(pipe, sets, for_samples, _evaluation_options(config, options))
    if trainer.train(end_processes=False) is None:
        return None
    with raise_on_all_ranks():  # what is measured is what is on disk, now and when another process resumes this
        pipe = DDPMPipeline.from_pretrained(folder)
        if processes().is_main_process:
            write_text(folder / FOLDER / "training.json", json.dumps(_training_record(config, pipe), indent=1) + "\n")
    return pipe


def _evaluation_options(config: TrainingConfig, options: ReproductionConfig) -> EvaluationOptions:
    batch = options.batch_size or config.evaluation_batch(config.resolved_preset().unet, processes().num_processes)
    found = {**vars(options), "batch_size": batch, "sampler": config.sampler, "model_name": config.output_dir}
    return EvaluationOptions(**found, progress=True)


def compare_with_paper(config: TrainingConfig, report: EvaluationReport, sizes: Mapping[str, int]) -> Reproduction:
    """Put numbers beside the paper's, with notes on what was less than there; `sizes` are the images of each split."""
    preset, recipe = get_preset(config.preset), config.resolved_preset()
    done, planned = recipe.max_train_steps, preset.max_train_steps
    updates = [f"{done:,} of {planned:,} updates"] if done < planned else []
    if config.max_train_minutes is not None:
        updates = [f"{config.max_train_minutes:g} minutes of training"]
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
    measured = report.tables.get(f"Progressive lossy code, {report.split} (Table 4)", [])
    ours_at = {row["reverse steps"]: (row["rate (bits/dim)"], row["distortion (RMSE)"]) for row in measured}
    columns = ("reverse steps", "rate (bits/dim), paper", "rate (bits/dim), ours", "RMSE, paper", "RMSE, ours")
    table_4 = []
    for steps, (rate, rmse) in PAPER_TABLE_4.items() if preset.name == "cifar10" else ():
        our_rate, our_rmse = ours_at.get(steps, (None, None))
        table_4.append(dict(zip(columns, (steps, rate, our_rate, rmse, our_rmse), strict=True)))
    return Reproduction(preset, report, rows, differences, table_4)


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
        different = [key for key in {**planned, **done} if planned.get(key) != done.get(key)]
        lines += [f"{key} {done.get(key)} instead of {planned.get(key)}" for key in different]
    return lines
