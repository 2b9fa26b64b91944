"""The page of a Space: sampling, interpolation and bits/dim of some models, with gradio (extra `space`).

gradio's components check what visitors and programs send, the pipeline checks the rest. The page loads nothing from
elsewhere: no fonts, no analytics.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from ..data.decoding import DecodeOptions, crop_box, read_image
from ..data.tensors import to_model_range, to_uint8
from ..diffusion.likelihood import stratified_bits_per_dim
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.unet_2d import check_weights, parameter_count
from ..pipelines.figures import interpolate
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..pipelines.schedulers import checked_steps
from ..sampling.generation import SAMPLERS, parse_seeds, with_sampler
from ..utils.errors import UserError, in_one_line
from ..utils.visualize import image_grid

_CSS = ".pixels img { image-rendering: pixelated; object-fit: contain }"  # small images as squares, not blurred
# One request at a time, whichever button it comes from.
_QUEUED: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, "show_progress": "minimal"}
_AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_MEGABYTES, _PIXELS = 10, 25_000_000  # of an uploaded image


@contextmanager
def _errors_shown() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        message = str(error).replace("--seeds", "Seeds")  # a flag of the command line is a field here
        raise gr.Error(message, print_exception=False) from None


def parse_at_most(limit: int, seeds: str) -> list[int]:
    """Return the seeds of `0-7` or `0,5,8-11`; refuse more than `limit` before a list of them fills the memory."""
    ranges = re.findall(r"(\d+)-(\d+)", seeds) if len(seeds) <= 200 else [(0, limit)]
    if any(int(last) - int(first) >= limit for first, last in ranges) or len(parse_seeds(seeds)) > limit:
        raise UserError(f"too many seeds; at most {limit} images at a time")
    return parse_seeds(seeds)


def describe_conversion(file: str, channels: int, height: int, width: int) -> str:
    """Return in words what `read_image` makes of an image file, which it has read."""
    with Image.open(file) as image:
        orientation, size = image.getexif().get(0x0112, 1), image.size
        words = {
            f"{image.format} of {size[0]} x {size[1]} pixels (mode {image.mode})": True,
            "its first frame": getattr(image, "is_animated", False),
            "turned upright": orientation in range(2, 9),
            "white under transparent pixels": image.has_transparency_data,
            "made grey": channels == 1 and image.mode not in ("L", "1"),
            "made RGB": channels == 3 and image.mode != "RGB",
        }
    upright = size[::-1] if orientation in range(5, 9) else size
    left, top, right, bottom = crop_box(upright[1], upright[0], (height, width))
    cropped = right - left, bottom - top
    words[f"the middle {cropped[0]} x {cropped[1]} of it"] = cropped != upright
    words[f"resized to {width} x {height}"] = cropped != (width, height)
    return ", ".join(word for word, applies in words.items() if applies)


def _grid(images: torch.Tensor | None) -> Image.Image | None:
    """`[N, C, H, W]` in [-1, 1] as one picture."""
    return None if images is None else image_grid(to_uint8(images), columns=min(4, len(images)), tile=48)


class Demo:
    """What visitors can do with some models.

    Args:
        models: Folders (looked for in `folder` first) or names on the Hub, with commas between them.
        max_images, max_steps: What a visitor can ask for at once.

    Raises:
        OSError, UserError: There is no model, or one cannot be opened.
    """

    def __init__(self, models: str, folder: Path = Path(), max_images: int = 16, max_steps: int = 1000):
        self.max_images, self.max_steps = max_images, max_steps
        self.pipes: dict[str, DDPMPipeline] = {}
        for name in filter(None, map(str.strip, models.split(","))):
            pipe = DDPMPipeline.from_pretrained(folder / name if (folder / name).is_dir() else name)
            check_weights(pipe.unet)
            self.pipes[name] = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        if not self.pipes:
            raise UserError(f"name at least one model, such as runs/digits,org/name; got {models!r}")
        self.stops: dict[str | None, threading.Event] = {}  # of each visitor's last click on Sample

    def _chain(
        self, model: str, steps: int, sampler: str, label: Any, guidance: float
    ) -> tuple[DDPMPipeline, dict[str, Any]]:
        """Return a pipeline with a scheduler of its own, which remembers how far a chain has come, and its options."""
        pipe = with_sampler(self.pipes[model], sampler)
        pipe = DDPMPipeline(pipe.unet, type(pipe.scheduler).from_config(pipe.scheduler.config))
        steps = checked_steps(pipe.scheduler, steps)
        return pipe, {"num_inference_steps": steps, "class_labels": label or None, "guidance_scale": guidance}

    def start(self, request: gr.Request) -> str:
        """Stop the visitor's earlier sampling, which the button Stop could no longer reach."""
        self.stop(request)
        self.stops[request.session_hash] = threading.Event()
        return "in the queue"

    def stop(self, request: gr.Request) -> None:
        """Stop sampling after the step at hand; gradio's own `cancels` waits for the next picture."""
        self.stops.get(request.session_hash, threading.Event()).set()

    def leave(self, request: gr.Request) -> None:
        """Stop sampling for a visitor who has closed the page."""
        self.stops.pop(request.session_hash, threading.Event()).set()

    def sample(
        self, model: str, seeds: str, steps: int, sampler: str, label: Any, guidance: float, request: gr.Request
    ) -> Iterator[tuple[Any, Any, list[Image.Image], str]]:
        """Draw one image per seed: those of `pipe(seeds=seeds)`.

        Yields:
            x_t, the x_0 predicted from it (`None` where the sampler does not return it), the images (none before the
            end), and how far and how fast it is.
        """
        with _errors_shown():
            chosen = parse_at_most(self.max_images, seeds)
            pipe, options = self._chain(model, steps, sampler, label, guidance)
            count, T = options["num_inference_steps"], pipe.scheduler.config.num_train_timesteps
            stop = self.stops.get(request.session_hash, threading.Event())
            worked, resumed = 0.0, time.monotonic()  # the time in which pictures are shown is not the network's
            for step in pipe.progressive(seeds=chosen, **options):
                done, stopped = step.index + 1, stop.is_set()
                shown = step.index % max(1, count // 20) == 0 or time.monotonic() - resumed > 1
                if done < count and (shown or stopped):
                    worked += time.monotonic() - resumed
                    pipe.check_finite(step.prev_sample)
                    where = f"step {done} of {count}, t = {step.timestep} of {T}: {done / worked:.1f} steps/s"
                    text = f"stopped at {where}" if stopped else where
                    yield _grid(step.prev_sample), _grid(step.pred_original_sample), [], text
                    if stopped:
                        return
                    resumed = time.monotonic()
            images = pipe.as_output(step.prev_sample, "pil")
            worked += time.monotonic() - resumed
            drawn = f"{len(images)} image{'s'[: len(images) > 1]} in {worked:.2f} s"
            text = f"{drawn}: {count} steps of {sampler}, {count / worked:.1f} steps/s"
            yield _grid(step.prev_sample), _grid(step.pred_original_sample), images, text

    def interpolate(
        self, model: str, seed_a: int, seed_b: int, share: float, steps: int, sampler: str, label: Any, guidance: float
    ) -> Iterator[tuple[Image.Image | None, str]]:
        """Draw the images of two seeds, diffuse them to t = `share` T, mix and decode them (Fig. 8).

        Yields:
            The figure, `None` until it is there, and what is being done.
        """
        with _errors_shown():
            pipe, options = self._chain(model, steps, sampler, label, guidance)
            yield None, f"drawing the images of seeds {seed_a} and {seed_b}"
            start = time.monotonic()
            (ends,) = pipe(seeds=[seed_a, seed_b], output_type="pt", return_dict=False, **options)
            yield None, "interpolating between them"
            (a, b), t = ends.cpu().split(1), round(share * pipe.scheduler.config.num_train_timesteps)
            figure = interpolate(pipe, a, b, t, seeds=[seed_a], batch_size=self.max_images, **options)
            took = f"in {time.monotonic() - start:.2f} s"
            yield figure.draw(), f"{len(figure.lambdas)} images between two, mixed at t = {figure.t}, {took}"

    def bits_per_dim(self, model: str, file: str | None, label: Any = None) -> tuple[Image.Image, str]:
        """Estimate the bound on an image's -log p in bits/dim; return the image as the network sees it, and a text."""
        with _errors_shown():
            pipe, start = self.pipes[model], time.monotonic()
            if not file:
                raise UserError("choose an image file first")
            if not isinstance(pipe.scheduler, DDPMScheduler):
                raise UserError(f"{model!r} was saved with a {type(pipe.scheduler).__name__}, which has no likelihood")
            channels, height, width = pipe.image_shape
            pixels = torch.tensor(read_image(Path(file), DecodeOptions(channels, (height, width))))[None]
            labels = pipe.classes.checked(label or None, 1.0, len(pixels))
            evaluations = min(50, 2 * pipe.scheduler.config.num_train_timesteps)  # 50 as in the docs' tables
            estimate = stratified_bits_per_dim(
                pipe.unet,
                pipe.scheduler,
                to_model_range(pixels).to(pipe.device),
                num_evaluations=evaluations,
                batch_size=self.max_images,
                class_labels=None if labels is None else labels.to(pipe.device),
            )
            bits = f"**{estimate.mean:.2f} ± {estimate.sampling_standard_error:.2f} bits/dim**"
            how = f"estimated from {evaluations} network evaluations in {time.monotonic() - start:.2f} s"
            seen = f"What the network saw: {describe_conversion(file, channels, height, width)}."
            text = f"{bits}: the variational bound, {how}, with its standard error.\n\n{seen}"
            return image_grid(pixels, tile=256), text


def make_page(demo: Demo, max_waiting: int = 20) -> gr.Blocks:
    """Return the page; its endpoints are `/sample`, `/interpolate` and `/bits_per_dim`."""
    every = [pipe.classes for pipe in demo.pipes.values()]
    guided = any(classes.null is not None for classes in every)
    names = [name for classes in every for i, name in enumerate(classes.all_names()) if i != classes.null]
    first = names[0] if not guided and all(classes.count for classes in every) else None  # where a class is needed
    with gr.Blocks(title="DDPM", analytics_enabled=False, delete_cache=(3600, 3600)) as page:  # seconds
        gr.Markdown("# Denoising diffusion probabilistic models")
        with gr.Row():
            model = gr.Dropdown(list(demo.pipes), label="Model", interactive=True)
            steps = gr.Slider(1, demo.max_steps, min(50, demo.max_steps), step=1, label="Steps")
            sampler = gr.Dropdown(list(SAMPLERS), value="ddim", label="Sampler", interactive=True)
            options: dict[str, Any] = {"value": first, "allow_custom_value": True, "visible": bool(names)}
            label = gr.Dropdown(list(dict.fromkeys(names)), label="Class (empty: any)", **options)
            guidance = gr.Slider(0, 20, 1, step=0.5, label="Guidance (1: as learned)", visible=guided)
        for name, pipe in demo.pipes.items():
            channels, height, width = pipe.image_shape
            images = f"{'grey' if channels == 1 else 'colour'} images of {height} x {width} pixels"
            T = pipe.scheduler.config.num_train_timesteps
            gr.Markdown(f"{name}: {images}, {parameter_count(pipe.unet):,} parameters, T = {T}")
        with gr.Tab("Sample"), gr.Row():
            _sample_tab(demo, page, model, [steps, sampler, label, guidance])
        with gr.Tab("Interpolate"):
            with gr.Row():
                seed_a, seed_b = (gr.Number(i, label=f"Seed {'AB'[i]}", minimum=0, precision=0) for i in (0, 1))
                share = gr.Slider(0, 1, 0.5, step=0.05, label="t / T (0 keeps the two images, 1 forgets them)")
            mix, mixed = gr.Button("Interpolate", variant="primary"), gr.Markdown(elem_id="progress")
            figure = _picture("From A to B", "figure", height=None)
            inputs = [model, seed_a, seed_b, share, steps, sampler, label, guidance]
            mix.click(demo.interpolate, inputs, [figure, mixed], **_QUEUED)
        with gr.Tab("Bits/dim"), gr.Row():
            with gr.Column():
                file = gr.File(label=f"An image of any kind, up to {_MEGABYTES} MB", elem_id="file")
                measure, bits = gr.Button("Bits per dimension", variant="primary"), gr.Markdown(elem_id="bits")
            seen = _picture("What the network sees", "seen")
            measure.click(demo.bits_per_dim, [model, file, label], [seen, bits], **_QUEUED)
    return page.queue(max_size=max_waiting, api_open=False)


def _sample_tab(demo: Demo, page: gr.Blocks, model: gr.Dropdown, chain: list[Any]) -> None:
    with gr.Column(scale=1):
        how = f"one image each, such as 0-7 or 0,5,8-11; at most {demo.max_images}"
        seeds = gr.Textbox(f"0-{min(8, demo.max_images) - 1}", label="Seeds", info=how, max_lines=1)
        go, stop, text = gr.Button("Sample", variant="primary"), gr.Button("Stop"), gr.Markdown(elem_id="timing")
    with gr.Column(scale=3):
        with gr.Row():
            x_t = _picture("x_t, on its way from noise to the image", "x_t")
            x_0 = _picture("x_0 as predicted from it (samplers ddpm and ddim)", "x_0")
        gr.Markdown("Images, in the order of their seeds")
        look: dict[str, Any] = {"columns": 8, "object_fit": "contain", "height": 240, "elem_classes": "pixels"}
        images = gr.Gallery(show_label=False, format="png", interactive=False, elem_id="gallery", **look)
    # "always_last", as gradio would ignore a click while the sampling before is still ending
    last: dict[str, Any] = {**_QUEUED, "trigger_mode": "always_last", "show_progress": "hidden"}
    started = go.click(demo.start, None, text, **_AT_ONCE)
    sampled = started.then(demo.sample, [model, seeds, *chain], [x_t, x_0, images, text], **last)
    sampled.failure(lambda: "", None, text, **_AT_ONCE)
    stop.click(demo.stop, **_AT_ONCE)
    page.unload(demo.leave)


def _picture(title: str, elem_id: str, height: int | None = 300) -> gr.Image:
    options: dict[str, Any] = {"elem_id": elem_id, "elem_classes": "pixels", "buttons": ["download", "fullscreen"]}
    with gr.Column():
        gr.Markdown(title)  # gradio's own label would cover a corner of the picture
        return gr.Image(label=title, show_label=False, format="png", interactive=False, height=height, **options)


def serve(app: str, models: str, max_images: int, max_steps: int, max_waiting: int) -> None:
    """Show the page until Ctrl-C; a model that cannot be opened is one sentence on stderr, and exit code 2.

    Args:
        app: The app's file; models are looked for beside it.
        models, max_images, max_steps: See `Demo`; the variable `DDPM_HF_SPACE_MODELS` replaces the models.
        max_waiting: Visitors in the queue; the next one is told to come later.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    Image.MAX_IMAGE_PIXELS = _PIXELS // 2  # Pillow refuses twice as many, before it decodes anything
    try:
        demo = Demo(os.environ.get("DDPM_HF_SPACE_MODELS") or models, Path(app).parent, max_images, max_steps)
    except (UserError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    # Fonts of the visitor's system instead of Google's; server-side rendering would need Node.js.
    theme = gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    names = ("ssr_mode", "share", "pwa", "mcp_server", "run_history", "enable_monitoring")
    options: dict[str, Any] = {"theme": theme, "css": _CSS, "footer_links": ["api"], **dict.fromkeys(names, False)}
    make_page(demo, max_waiting).launch(max_file_size=f"{_MEGABYTES}mb", **options)
