"""What a training run shows: the pipeline of EMA weights, sample grids, held-out numbers, the card.

All processes take part. Nothing here touches the network in training or its random numbers.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from PIL import Image
from torch import Tensor

from ..data.class_labels import ClassIndex
from ..evaluation.report import EvaluationReport
from ..hub.background import BackgroundPush
from ..hub.files import CARD, CURVE, INDEX, REPORT, SAMPLES, write_card, write_pipeline
from ..hub.model_card import check_license, training_facts
from ..hub.publish import Push, check_destination
from ..models.unet_2d import UNet2DModel, check_weights
from ..pipelines.checkpoints import CONFIG, RAW, Checkpoint, make_model
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..sampling.generation import generate
from ..utils.errors import NotFiniteError
from ..utils.files import check_new_folder
from ..utils.processes import from_first, gather, log, only_run_in, processes, raise_on_all_ranks
from ..utils.visualize import image_grid, save_picture
from .configuration import TrainingConfig, TrainingError
from .evaluation import TrainingEvaluation
from .run import load_split
from .tracking import Tracking


@contextmanager
def _memory_advice(step: int) -> Iterator[None]:
    """Name the flag that helps where the device runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"too little memory on the device for the samples and numbers after update {step}"
        how = "give a smaller --eval_batch_size, and resume with --resume_from_checkpoint latest"
        raise TrainingError(f"{what}; {how}") from error


class Publisher:
    """Writes what a run shows into its output folder, or raises UserError: a license or name cannot be taken.

    `settings` are what its checkpoints record (`checkpointing.settings_of`). With `raw` the weights to come are not
    the EMA weights, as the card then says.
    """

    def __init__(
        self,
        config: TrainingConfig,
        settings: dict[str, Any],
        evaluation: TrainingEvaluation | None,
        tracking: Tracking | None = None,
        raw: bool = False,
    ):
        self.config, self.settings, self.evaluation, self.raw = config, settings, evaluation, raw
        self.tracking = tracking
        self.folder = Path(config.output_dir)
        self.pushes: BackgroundPush | None = None
        check_license(config.license)
        self._push = None
        if config.push_to_hub:
            name = config.hub_model_id or self.folder.resolve().name
            self._push = Push(config.output_dir, name, config.hub_private_repo, config.hub_token, config.license)

    def open_hub(self) -> None:
        """Check where the run's pushes will go, if it has any, or raise UserError; only the main process pushes."""
        with raise_on_all_ranks():
            if self._push is not None and processes().is_main_process:
                self.pushes = BackgroundPush(check_destination(self._push, log), log)

    def describe_hub(self) -> str:
        """Return where the run's pushes will go, or raise UserError: they will not be possible; nothing is changed."""
        return "no push (--push_to_hub)" if self._push is None else self._push.describe_destination()

    def push(self, ema_weights: dict[str, Tensor], step: int) -> None:
        """Put the model as it is after update `step` into the output folder, and on its way to the Hub."""
        pipe = self.pipeline(ema_weights)
        with raise_on_all_ranks():
            if self.pushes is None:
                return
            try:
                self._write_pipeline(pipe)
                self._write_card(step, None)
            except (OSError, ValueError) as error:  # a full disk, or a card that cannot be read: training continues
                log(f"not published after update {step}: {error}")
            else:
                self.pushes.offer(f"After update {step}")

    def show(self, what: str, ema_weights: dict[str, Tensor], step: int, seconds: float) -> None:
        """Make the sample `grid` or the `numbers` of update `step`, unless they are not finite.

        The run has taken so many `seconds`, for its curve.
        """
        with _memory_advice(step):
            pipe = self.pipeline(ema_weights)
            try:
                if what == "grid":
                    self.sample_grid(pipe, f"samples-{step}.png", step)
                else:
                    self._measure(pipe, step, seconds)
            except NotFiniteError as error:
                log(f"no {what} after update {step}: {error}")

    def _measure(self, pipe: DDPMPipeline, step: int, seconds: float) -> EvaluationReport | None:
        if self.evaluation is None or (report := self.evaluation.measure(pipe)) is None:
            return None
        self.evaluation.record(pipe, report, step, step * self.settings["total_batch_size"], seconds)
        if self.tracking is not None:
            self.tracking.numbers(step, {name: entry["value"] for name, entry in report.values.items()})
            if processes().is_main_process and (self.folder / CURVE).exists():
                with Image.open(self.folder / CURVE) as curve:
                    self.tracking.picture(step, "curve", curve)
        return report

    def write_model(self, pipe: DDPMPipeline, step: int) -> None:
        """Write the pipeline (safetensors) and a card without numbers into the output folder: in seconds."""
        with raise_on_all_ranks():
            if processes().is_main_process:
                self._write_pipeline(pipe)
                log(f"wrote the pipeline to {self.folder}")
                self._write_card(step, None)

    def complete(self, pipe: DDPMPipeline, step: int, seconds: float) -> None:
        """Add sample grid, numbers and a card with both to what `write_model` wrote, or raise NotFiniteError."""
        with _memory_advice(step):
            self.sample_grid(pipe, SAMPLES, step)
            report = self._measure(pipe, step, seconds)
        self._write_report_and_card(step, report)
        if self.pushes is not None:
            self.pushes.offer(f"After update {step}, the last")

    def missing(self) -> list[str]:
        """Return what a run that was stopped after `write_model` lacks, for people."""
        wanted = [SAMPLES, *([REPORT] if self.evaluation is not None and self.evaluation.metrics else [])]
        names = [name for name in wanted if not (self.folder / name).exists()]
        return names + ["its push to the Hub"] * (self.pushes is not None)

    def _write_report_and_card(self, step: int, report: EvaluationReport | None) -> None:
        with raise_on_all_ranks():
            if processes().is_main_process:
                if report is not None:
                    report.save(self.folder / REPORT)
                written, card = self._write_card(step, report), self.folder / CARD
                log(f"wrote {card}" if written else f"{card} was edited, so it stays as it is")

    def _write_pipeline(self, pipe: DDPMPipeline) -> None:
        """Write the model into the output folder, and remove the former one's numbers and samples."""
        for name in (REPORT, SAMPLES):
            (self.folder / name).unlink(missing_ok=True)
        write_pipeline(pipe, self.folder)

    def _write_card(self, step: int, report: EvaluationReport | None) -> bool:
        """Write the card, unless a person has edited it; return whether it was written."""
        pictures = sorted(self.folder.glob("samples*.png"), key=lambda path: path.stat().st_mtime_ns)
        options: dict[str, Any] = {"dataset_name": self.config.images_given().get("dataset_name"), "raw": self.raw}
        options |= {"report": dataclasses.asdict(report) if report is not None else None}
        options |= {"sample": pictures[-1].name if pictures else None, "license": self.config.license}
        options |= {"curve": CURVE if (self.folder / CURVE).exists() else None}
        return write_card(self.folder, training_facts(self.folder.resolve().name, self.settings, step, **options))

    def pipeline(self, weights: dict[str, Tensor]) -> DDPMPipeline:
        """Return the weights in a float32 pipeline of their own, the first process's in all; all have to call this."""
        with raise_on_all_ranks():
            copies = {n: x.detach().clone(memory_format=torch.contiguous_format) for n, x in weights.items()}
            pipe = DDPMPipeline(*make_model(self.settings, copies))
            pipe.set_progress_bar_config(disable=True)
        if processes().num_processes > 1:  # rounding may differ between them
            broadcast(pipe.unet.state_dict())
        return pipe

    def _labels(self, seeds: range) -> list[Any] | None:
        classes = self.settings["network"].get("_class_names")
        return [ClassIndex(seed % len(classes)) for seed in seeds] if classes else None

    def _grid_batch(self) -> int:
        return self.config.evaluation_batch(self.settings["network"], processes().num_processes, most=64)

    def seconds_to_complete(self, ema_weights: dict[str, Tensor], step: int) -> dict[str, float]:
        """Estimate how long grid and numbers take, from a few network evaluations; features are not in it."""
        pipe, seeds = self.pipeline(ema_weights), range(min(self.config.num_sample_images, self._grid_batch()))
        sampling = self.config.sampling(pipe)
        pipe = sampling.pipeline(pipe)
        for _ in range(2):  # the first time, kernels are chosen
            chain = pipe.progressive(seeds=seeds, class_labels=self._labels(seeds), **sampling.chain)
            started, few = time.monotonic(), 0
            with _memory_advice(step):
                for few, made in zip((1, 2), chain, strict=False):  # noqa: B007 (how many a short chain has)
                    made.prev_sample.cpu()
            seconds = time.monotonic() - started
        of_an_image = pipe.network_evaluations(**sampling.chain)
        counts = {"grid": self.config.num_sample_images * of_an_image}
        counts |= {"numbers": 0 if self.evaluation is None else self.evaluation.network_evaluations(of_an_image)}
        of_one = seconds / (len(seeds) * few) / processes().num_processes
        return {what: count * of_one for what, count in counts.items()}

    def sample_grid(self, pipe: DDPMPipeline, name: str, step: int) -> None:
        """Write images 0, 1, ... as a grid, for the trackers too; every process draws a share of them."""
        config, here = self.config, processes()
        seeds = range(here.process_index, config.num_sample_images, here.num_processes)
        sampling, batch_size = config.sampling(pipe), self._grid_batch()
        options = {**sampling.chain, "class_labels": self._labels(seeds), "progress": here.is_main_process}
        batches = generate(sampling.pipeline(pipe), seeds, batch_size=batch_size, **options)
        with raise_on_all_ranks():
            drawn = [(seed, image) for part, images in batches for seed, image in zip(part, images, strict=True)]
        whole = dict(pair for share in gather(drawn) for pair in share)
        path = self.folder / name
        with raise_on_all_ranks():
            if here.is_main_process:
                grid = image_grid(torch.stack([whole[seed] for seed in range(config.num_sample_images)]))
                save_picture(grid, path)
                if self.tracking is not None:
                    self.tracking.picture(step, "samples", grid)
        log(f"wrote {path}")


def publish_checkpoint(
    checkpoint: Checkpoint, config: TrainingConfig, samples: bool, evaluate: bool, redraw: bool = False
) -> None:
    """Write a checkpoint's model into `config.output_dir` as a run that ended there would: model, samples, card.

    With `samples` it has a sample grid (with `redraw` a new one), with `evaluate` the numbers that the run would have
    measured, on its images. A model that is there already with these weights stays, with its samples, numbers and
    scheduler; what is missing is added. Raises UserError: the weights are not finite or do not fit, or another process
    writes into the folder.
    """
    folder, step = Path(config.output_dir), checkpoint.state["step"]
    with raise_on_all_ranks():
        network = checkpoint.state["network"]
        evaluation = TrainingEvaluation(config, network, load_split(config, network, "train")) if evaluate else None
        pipe = DDPMPipeline(*checkpoint.model()).to(processes().device)
        pipe.set_progress_bar_config(disable=True)
        check_weights(pipe.unet)
        if evaluation is not None:
            evaluation.check(pipe)
    publisher = Publisher(config, checkpoint.state, evaluation, raw=checkpoint.file == RAW)
    with ExitStack() as cleanup:
        with raise_on_all_ranks():
            if processes().is_main_process and (folder / CONFIG).exists():
                cleanup.enter_context(only_run_in(folder))
        there = from_first(holds_model(folder, pipe))
        with raise_on_all_ranks():
            if not there and folder.resolve() != checkpoint.run:
                check_new_folder(folder)
        if not there:
            publisher.write_model(pipe, step)
        if redraw or (samples and not from_first((folder / SAMPLES).exists())):
            publisher.sample_grid(pipe, SAMPLES, step)
        report = None if evaluation is None else evaluation.measure(pipe)
        if report is None and (folder / REPORT).exists():  # of these weights
            report = EvaluationReport.load(folder / REPORT)
        publisher._write_report_and_card(step, report)


def holds_model(folder: Path, pipe: DDPMPipeline) -> bool:
    """Return whether a folder holds a published model with the same weights."""
    try:
        there = UNet2DModel.from_pretrained(folder / "unet").state_dict() if (folder / INDEX).is_file() else {}
    except (OSError, ValueError):  # a damaged one is none
        return False
    own = pipe.unet.state_dict()
    return there.keys() == own.keys() and all(torch.equal(there[name], own[name].cpu()) for name in own)
