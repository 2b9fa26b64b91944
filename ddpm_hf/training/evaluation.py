"""What a training run measures of its EMA weights, and the best model so far.

`curve.json` holds the numbers after each measured update, `curve.png` shows them, `best/` is the best pipeline by
`--best_metric` with its report. A resumed run has the same weights after each update, and so measures the same numbers
and best model again.
"""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..data.datasets import Images
from ..evaluation.features import FeatureExtractor
from ..evaluation.options import EvaluationOptions
from ..evaluation.plots import curve_figure, save_figure
from ..evaluation.report import EvaluationReport
from ..evaluation.run import check_evaluation, evaluate, first_images, parse_metrics
from ..evaluation.samples import SAMPLE_METRICS, higher_is_better, number_name
from ..hub.files import CURVE, REPORT
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..utils.errors import UserError
from ..utils.files import write_directory, write_text
from ..utils.processes import from_first, log, processes, raise_on_all_ranks
from ..utils.text import finite, nearest, number, plain
from .configuration import TrainingConfig, due
from .run import load_split

BEST, HISTORY = "best", "curve.json"
IN_LOOP_METRICS = ("nll", *(name for name, metric in SAMPLE_METRICS.items() if metric.numbers))


def names_of_numbers(metrics: list[str], extractors: list[FeatureExtractor], splits: list[str]) -> list[str]:
    """Return what an evaluation's numbers will be called, of those of which one is better than another."""
    names = ["bits_per_dim"] if "nll" in metrics else []
    for extractor, metric in ((e, SAMPLE_METRICS[m]) for e in extractors for m in metrics if m in SAMPLE_METRICS):
        if metric.of_real or extractor.name == "inception":  # the Inception score is that of a classifier
            kinds = [kind for kind in metric.kinds if kind == "uint8" or extractor.takes_floats]
            compared = splits if metric.of_real else [None]
            pairs = [(split, kind) for split in compared for kind in kinds]
            names += [number_name(what, extractor.name, *pair) for what in metric.numbers for pair in pairs]
    return names


class TrainingEvaluation:
    """Measures a run's EMA weights; knows its configuration, the network's arguments and its training images."""

    def __init__(self, config: TrainingConfig, network: Mapping[str, Any], train: Images):
        self.config, self.network, self.folder = config, network, Path(config.output_dir)
        self.metrics = parse_metrics(config.eval_metrics, IN_LOOP_METRICS, "--eval_metrics")
        self._of_samples = [metric for metric in self.metrics if metric in SAMPLE_METRICS]
        held_out = self._load_held_out()
        self.sets = {"train": train} | ({} if held_out is None else {"validation": held_out})
        if held_out is None or not config.eval_num_images:
            self.metrics = self._of_samples
        if config.validation_steps and not self.metrics:
            raise UserError("--validation_steps has nothing to measure with --eval_metrics nll --eval_num_images 0")

    def _load_held_out(self) -> Images | None:
        config = self.config
        if not config.validation_split and "dataset" not in config.images_given():
            if config.validation_steps and "nll" in self.metrics:
                advice = "add --validation_split 0.05, or measure something else than bits/dim: --eval_metrics fid"
                raise UserError(f"--validation_steps needs images that are held out; {advice}")
            return None
        if self._of_samples:
            return load_split(config, self.network, "validation")
        if not config.eval_num_images:
            return None
        held_out = first_images(load_split(config, self.network, "validation"), config.eval_num_images)
        if not len(held_out):
            what = f"--validation_split {config.validation_split} of {held_out.name!r} holds out no image"
            raise UserError(f"{what}; use a larger share, or --eval_num_images 0")
        return held_out

    def check(self, pipe: DDPMPipeline) -> None:
        """Raise now what would be wrong with the evaluations to come."""
        config = self.config
        try:
            _, extractors = check_evaluation(pipe, self.sets, self._of_samples, self._options(pipe))
        except UserError as error:  # evaluate's flags have other names here
            raise UserError(
                re.sub("--(num_samples|features|inception_weights)", r"--eval_\1", error.args[0])
            ) from error
        best, names = config.best_metric, names_of_numbers(self.metrics, extractors, list(self.sets))
        if best is not None and best not in names:
            what = f"none of the numbers that --eval_metrics {config.eval_metrics} gives{nearest(best, names)}"
            raise UserError(f"--best_metric {best!r} is {what}: {', '.join(names)}")

    def _options(self, pipe: DDPMPipeline) -> EvaluationOptions:
        config = self.config
        same_name = ("num_evaluations", "num_samples", "features", "inception_weights")
        return EvaluationOptions(
            **{name: getattr(config, f"eval_{name}") for name in same_name},
            num_images=config.eval_num_images or None,  # of 0 there is no likelihood
            batch_size=config.evaluation_batch(self.network, processes().num_processes),
            **vars(config.sampling(pipe)),
            progress=True,
        )

    def network_evaluations(self, steps: int) -> int:
        """Return how many evaluations of the network `measure` needs, for samples of `steps` steps."""
        config = self.config
        images = config.eval_num_images if "nll" in self.metrics else 0
        samples = config.eval_num_samples if self._of_samples else 0
        return images * config.eval_num_evaluations + samples * steps

    def measure(self, pipe: DDPMPipeline) -> EvaluationReport | None:
        """Compute the numbers of a model, the same in every process; `None` where there is nothing to measure."""
        if not self.metrics:
            return None
        work = self.folder / ".evaluation"
        report = evaluate(pipe, self.sets, self.metrics, self._options(pipe), output=work)
        report.pictures = []
        if processes().is_main_process:
            shutil.rmtree(work, ignore_errors=True)
        log("\n".join(report.lines()))
        return report

    def discard_after(self, step: int) -> None:
        """Remove what a run that resumes after update `step`, or begins, will measure again. For the main process."""
        if not step:  # a new run has no best model yet
            shutil.rmtree(self.folder / BEST, ignore_errors=True)
            for name in (HISTORY, CURVE):
                (self.folder / name).unlink(missing_ok=True)
        elif curve := self._curve():
            self._write_curve([entry for entry in curve if entry["update"] <= step])

    def is_missing(self, step: int) -> bool:
        """Return whether update `step` was to be measured, and the run ended before; the same in every process."""
        return due(step, self.config.validation_steps) and from_first(
            step not in [entry["update"] for entry in self._curve()]
        )

    def record(self, pipe: DDPMPipeline, report: EvaluationReport, step: int, images: int, seconds: float) -> None:
        """Record what was measured after update `step`, and keep the model if it is the best so far.

        `images` have been seen until then, some more than once, in so many `seconds` of the run.
        """
        with raise_on_all_ranks():
            if self.config.validation_steps is not None and processes().is_main_process:
                if self.config.best_metric is not None:
                    self._keep_best(pipe, report, step, self.config.best_metric)
                numbers = {name: entry["value"] for name, entry in report.values.items()}
                curve = {entry["update"]: entry for entry in self._curve()}
                seconds = curve.get(step, {}).get("seconds", round(seconds, 1))  # not when it is measured again
                curve[step] = {"update": step, "images": images, "seconds": seconds, **numbers}
                self._write_curve(list(curve.values()))

    def _keep_best(self, pipe: DDPMPipeline, report: EvaluationReport, step: int, name: str) -> None:
        folder, value, before = self.folder / BEST, report.values[name]["value"], math.nan
        with suppress(UserError):  # no best model yet
            best = EvaluationReport.load(folder / REPORT)
            if name in best.values and _how_made(best, name) == _how_made(report, name):
                before = best.values[name]["value"]
            else:
                log(f"{folder} was chosen by another number than {name} as it is measured now, and is chosen again")
        if math.isnan(value) or (value <= before if higher_is_better(name) else value >= before):
            return
        report = dataclasses.replace(report, model={**report.model, "update": step, "best_metric": name})

        def fill(target: Path) -> None:
            pipe.save_pretrained(target)
            report.save(target / REPORT)

        write_directory(folder, fill)
        log(f"the best model so far, {name} {number(value)} after update {step}, is in {folder}")

    def _curve(self) -> list[dict[str, Any]]:
        with suppress(OSError, ValueError, TypeError, AttributeError):  # what is not there is measured again
            content = json.loads((self.folder / HISTORY).read_text(encoding="utf-8"))
            return [entry for entry in content if isinstance(entry.get("update"), int)]
        return []

    def _write_curve(self, curve: list[dict[str, Any]]) -> None:
        curve = sorted(curve, key=lambda entry: entry["update"])
        write_text(self.folder / HISTORY, json.dumps(finite(curve), indent=1) + "\n")
        try:
            save_figure(curve_figure(curve), self.folder / CURVE)
        except UserError as error:  # matplotlib is not installed
            log(f"no {CURVE}: {error}")


def _how_made(report: EvaluationReport, name: str) -> Any:
    """Return how a number was made, down to the samples' seeds: only then it compares with others."""
    settings = report.settings.get(name, {})
    how = {key: value for key, value in settings.items() if key not in ("seconds", "statistics")}
    return plain(how | ({"sampling": report.settings.get("sampling")} if "num_samples" in settings else {}))
