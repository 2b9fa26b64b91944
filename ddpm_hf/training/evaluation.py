"""What a training run measures of its averaged weights, and the best model so far.

```
output_dir/
  evaluations.json     update to numbers by name, as they were measured
  best/                the pipeline that is best by --best_metric, with its report evaluation.json
  .evaluation/         finished batches of an evaluation that is not finished
```

What an update's weights are is exact on resuming, and so are their numbers. So the best model needs no place in the
checkpoints: it is the same one as soon as every update that was to be measured has been.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..data.datasets import Images
from ..evaluation.features import FeatureExtractor
from ..evaluation.run import (
    METRICS,
    SAMPLE_METRICS,
    EvaluationReport,
    checked_extractors,
    evaluate,
    evaluate_likelihood,
    first_images,
)
from ..hub.files import REPORT
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..sampling.generation import check_sampler, with_sampler
from ..utils.errors import UserError
from ..utils.files import default_cache_dir, writable_folder, write_directory, write_text
from ..utils.processes import from_first, processes, say, together
from ..utils.text import finite, nearest, number, plain
from .configuration import TrainingConfig, due
from .run import load_split

BEST, HISTORY = "best", "evaluations.json"
_WORK = ".evaluation"
IN_LOOP_METRICS = ("nll", "fid", "is", "kid", "prc")
_HIGHER_IS_BETTER = ("is_", "precision_", "recall_")


def check_sampling(
    pipe: DDPMPipeline,
    sets: dict[str, Images],
    metrics: Sequence[str],
    *,
    num_samples: int,
    features: Sequence[str],
    inception_weights: str | None,
    sampler: str,
    num_inference_steps: int | None,
) -> list[FeatureExtractor]:
    """Whether samples can be drawn, and `evaluation.evaluate` will have all that it needs: before a training.

    Returns:
        What it will compare images by.

    Raises:
        ValueError: It will not.
    """
    check_sampler(with_sampler(pipe, sampler), num_inference_steps=num_inference_steps)
    wanted = [metric for metric in metrics if metric in SAMPLE_METRICS]
    extractors = checked_extractors(pipe, sets, wanted, num_samples, features, inception_weights)
    if wanted:  # where features of real images are kept
        writable_folder(default_cache_dir(), "$DDPM_HF_CACHE")
    return extractors


def names_of_numbers(
    metrics: Sequence[str], extractors: Iterable[FeatureExtractor], splits: Sequence[str]
) -> list[str]:
    """What an evaluation's numbers will be called, of those of which one is better than another."""
    names = ["bits_per_dim"] if "nll" in metrics else []
    for extractor in extractors:
        kinds = ("uint8", "float") if extractor.takes_floats else ("uint8",)
        inception = extractor.name == "inception"
        for metric, heads, among in (
            ("fid", ["fid" if inception else "fd"], kinds),
            ("kid", ["kid" if inception else "kd"], ("uint8",)),
            ("prc", ["precision", "recall"], ("uint8",)),
        ):
            if metric in metrics:
                names += [f"{h}_{extractor.name}_{split}_{kind}" for h in heads for split in splits for kind in among]
        if "is" in metrics and inception:
            names += [f"is_inception_{kind}" for kind in kinds]
    return names


def is_better(name: str, value: float, than: float) -> bool:
    """Whether one value of a number is better than another; NaN never is."""
    if math.isnan(value) or math.isnan(than):
        return not math.isnan(value)
    return value > than if name.startswith(_HIGHER_IS_BETTER) else value < than


class TrainingEvaluation:
    """Measures a run's averaged weights.

    Args:
        config: The run's.
        train: Its training images.

    Raises:
        ValueError: A metric that is unknown, or that is for finished models; something is to be measured on held-out
            images, and nothing is held out.
    """

    def __init__(self, config: TrainingConfig, train: Images):
        self.config = config
        self.folder = Path(config.output_dir)
        self.metrics = _parse(config.eval_metrics)
        self._samples = [metric for metric in self.metrics if metric in SAMPLE_METRICS]
        self.held_out = self._load_held_out()
        if self.held_out is None or not config.eval_num_images:
            self.metrics = [metric for metric in self.metrics if metric != "nll"]
        if config.validation_steps and not self.metrics:
            raise UserError("--validation_steps has nothing to measure with --eval_metrics nll --eval_num_images 0")
        self.sets = {"train": train} | ({} if self.held_out is None else {"validation": self.held_out})

    def _load_held_out(self) -> Images | None:
        config = self.config
        if not config.validation_split and "dataset" not in config.images_given():
            if config.validation_steps and "nll" in self.metrics:
                raise UserError(
                    "--validation_steps needs images that are held out; add --validation_split 0.05, or measure "
                    "something else than bits/dim: --eval_metrics fid"
                )
            return None
        if not config.eval_num_images and not self._samples:
            return None
        held_out = load_split(config, "validation")
        if not self._samples:
            held_out = first_images(held_out, config.eval_num_images)
            if not len(held_out):
                raise UserError(
                    f"--validation_split {config.validation_split} of {held_out.name!r} holds out no image; use a "
                    "larger share, or --eval_num_images 0"
                )
        return held_out

    def check(self, pipe: DDPMPipeline) -> None:
        """Everything that can be known of the evaluations to come.

        Raises:
            ValueError: They will fail, or have no number called `best_metric`.
        """
        config = self.config
        try:
            extractors = check_sampling(
                pipe, self.sets, self.metrics, num_samples=config.eval_num_samples, **self._sampling(pipe)
            )
        except UserError as error:  # evaluate's flags have other names here
            text = re.sub(r"--(num_samples|features|inception_weights)", r"--eval_\1", str(error))
            raise UserError(text) from error
        if (best := config.best_metric) is not None:
            names = names_of_numbers(self.metrics, extractors, list(self.sets))
            if best not in names:
                raise UserError(
                    f"--best_metric {best!r} is none of the numbers that --eval_metrics {config.eval_metrics} gives"
                    f"{nearest(best, names)}: {', '.join(names)}"
                )

    def _sampling(self, pipe: DDPMPipeline) -> dict[str, Any]:
        config = self.config
        return {
            "features": [part.strip() for part in config.eval_features.split(",")],
            "inception_weights": config.eval_inception_weights,
            "sampler": config.sampler,
            "num_inference_steps": config.inference_steps(pipe.scheduler.config.num_train_timesteps),
        }

    def due(self, step: int) -> bool:
        """Whether update `step` is to be measured."""
        return due(step, self.config.validation_steps)

    def measure(self, pipe: DDPMPipeline) -> EvaluationReport | None:
        """The numbers of a model, the same in every process; `None` where there is nothing to measure."""
        config = self.config
        if not self.metrics:
            return None
        batch_size = config.evaluation_batch(processes().num_processes)
        if not self._samples:
            data = first_images(self.sets["validation"], config.eval_num_images)
            report = evaluate_likelihood(
                pipe, data, "validation", num_evaluations=config.eval_num_evaluations, batch_size=batch_size
            )
        else:
            work = self.folder / _WORK
            report = evaluate(
                pipe,
                self.sets,
                self.metrics,
                num_images=config.eval_num_images,
                num_evaluations=config.eval_num_evaluations,
                num_samples=config.eval_num_samples,
                batch_size=batch_size,
                output=work,
                **self._sampling(pipe),
            )
            report.pictures = []
            if processes().is_main_process:
                shutil.rmtree(work, ignore_errors=True)
        for name, entry in report.values.items():
            if name == "bits_per_dim":
                value, error = entry["value"], entry["standard_error"]
                known = f" +- {error:.3f}" if math.isfinite(error) else ""
                say(f"bits/dim on {report.num_images} held-out images: {value:.3f}{known}")
            else:
                say(f"{name}: {number(entry['value'], entry['standard_error'])}")
        return report

    # ------------------------------------------------------------------ what is kept

    def begin(self, step: int) -> None:
        """Put the folder in order for a run that goes on after update `step`. For the main process."""
        if not step:  # a new run has no best model yet
            shutil.rmtree(self.folder / BEST, ignore_errors=True)
            (self.folder / HISTORY).unlink(missing_ok=True)
        else:
            history = self._history()
            if later := [key for key in history if int(key) > step]:
                self._write_history({key: value for key, value in history.items() if key not in later})

    def missed(self, step: int) -> bool:
        """Whether update `step` was to be measured, and the run ended before; the same answer in every process."""
        if not self.due(step):
            return False
        return from_first(str(step) not in self._history() if processes().is_main_process else None)

    def keep(self, pipe: DDPMPipeline, report: EvaluationReport, step: int) -> None:
        """Note what was measured after update `step`, and keep the model if it is the best so far.

        Raises:
            OSError: The disk refuses; the best one before is intact.
        """
        if self.config.validation_steps is None:
            return
        with together():
            if processes().is_main_process:
                if self.config.best_metric is not None:
                    self._keep_best(pipe, report, step, self.config.best_metric)
                self._write_history({**self._history(), str(step): {k: v["value"] for k, v in report.values.items()}})

    def _keep_best(self, pipe: DDPMPipeline, report: EvaluationReport, step: int, name: str) -> None:
        folder, value = self.folder / BEST, report.values[name]["value"]
        try:
            best: EvaluationReport | None = EvaluationReport.load(folder / REPORT)
        except UserError:
            best = None
        if best is not None and not _comparable(best, report, name):
            say(f"{folder} was chosen by another number than {name} as it is measured now, and is chosen anew")
            best = None
        if math.isnan(value) or (best is not None and not is_better(name, value, best.values[name]["value"])):
            return
        report = dataclasses.replace(report, model={**report.model, "update": step, "best_metric": name})

        def fill(target: Path) -> None:
            pipe.save_pretrained(target)
            report.save(target / REPORT)

        write_directory(folder, fill)
        say(f"the best model so far, {name} {number(value)} after update {step}, is in {folder}")

    def _history(self) -> dict[str, dict[str, float | None]]:
        try:
            content = json.loads((self.folder / HISTORY).read_text(encoding="utf-8"))
            return {key: value for key, value in content.items() if key.isdecimal()}
        except (OSError, ValueError, AttributeError):  # what is not there is measured again
            return {}

    def _write_history(self, history: dict[str, Any]) -> None:
        in_order = {key: history[key] for key in sorted(history, key=int)}
        write_text(self.folder / HISTORY, json.dumps(finite(in_order), indent=1) + "\n")


def _parse(text: str) -> list[str]:
    """`"nll,fid"` to `["nll", "fid"]`."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    known = ", ".join(IN_LOOP_METRICS)
    for name in names:
        if name not in IN_LOOP_METRICS:
            what = (
                f"; {name} is for finished models: ddpm-hf evaluate"
                if name in METRICS
                else nearest(name, IN_LOOP_METRICS)
            )
            raise UserError(f"--eval_metrics knows {known}, got {name!r}{what}")
    if not names:
        raise UserError(f"--eval_metrics names no metric; it knows {known}")
    return list(dict.fromkeys(names))


def _comparable(one: EvaluationReport, other: EvaluationReport, name: str) -> bool:
    """Whether a number was made in the same way in both, down to the samples' seeds."""

    def made(report: EvaluationReport) -> Any:
        settings = report.settings.get(name, {})
        how = {key: value for key, value in settings.items() if key not in ("seconds", "statistics")}
        if "num_samples" in settings:
            how["sampling"] = report.settings.get("sampling")
        return plain(how)

    return name in one.values and made(one) == made(other)
