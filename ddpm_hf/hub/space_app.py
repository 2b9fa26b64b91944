"""The page of a Space: sampling, interpolation and bits/dim of some models, with gradio (extra `space`)."""

import math
import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
from PIL import Image

try:
    import gradio as gr
except ModuleNotFoundError:
    raise SystemExit("error: the page of a Space needs gradio: pip install 'ddpm-hf[space]'") from None

from ..data.decoding import DecodeOptions, read_image
from ..data.tensors import to_uint8
from ..evaluation.likelihoods import estimate_bits_per_dim
from ..models.unet_2d import check_weights, parameter_count
from ..pipelines.figures import interpolate
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..sampling.generation import SAMPLERS, parse_seeds, with_sampler
from ..utils.errors import UserError, in_one_line
from ..utils.visualize import image_grid

# ZeroGPU's package lends a function a GPU for each call, for the time that is asked for; elsewhere it does nothing.
_gpu: Any = import_module("spaces").GPU if util.find_spec("spaces") else lambda duration: lambda function: function
# One request at a time, whichever button it comes from.
_QUEUED: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, "show_progress": "minimal"}
_AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_SHOWN: dict[str, Any] = {"format": "png", "interactive": False, "elem_classes": "pixels"}
_MEGABYTES, _PIXELS = 10, 25_000_000  # of an uploaded image


class Demo:
    """What visitors can do with models: folders (looked for in `folder` first) or names on the Hub, between commas."""

    def __init__(self, models: str, folder: Path = Path(), max_images: int = 16, max_steps: int = 1000):
        self.max_images, self.max_steps = max_images, max_steps
        self.pipes: dict[str, DDPMPipeline] = {}
        self.measured: dict[str, float] = {}  # seconds of an evaluation of one image, on this machine
        for name in filter(None, map(str.strip, models.split(","))):
            pipe = DDPMPipeline.from_pretrained(folder / name if (folder / name).is_dir() else name)
            check_weights(pipe.unet)
            self.pipes[name] = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
            first, start = pipe.classes.all_names()[:1] or None, time.monotonic()
            few = range(0 if os.environ.get("SPACES_ZERO_GPU") else 4)  # there no GPU is there yet
            for _, step in zip(few, pipe.progressive(seeds=range(4), class_labels=first), strict=False):
                step.prev_sample.cpu()
                start, self.measured[name] = time.monotonic(), (time.monotonic() - start) / 4  # the first one is slow
        if not self.pipes:
            raise UserError(f"name at least one model, such as runs/digits,org/name; got {models!r}")

    def _chain(self, model: str, steps: int, sampler: str, label: Any, guidance: float) -> tuple[DDPMPipeline, dict]:
        """Return a pipeline with a scheduler of its own, which remembers how far a chain has come, and its options."""
        pipe = self.pipes[model]
        pipe = with_sampler(pipe, None if pipe.distilled_steps else sampler)  # a distilled model has only its own
        pipe = DDPMPipeline(pipe.unet, type(pipe.scheduler).from_config(pipe.scheduler.config))
        return pipe, {"num_inference_steps": steps, "class_labels": label or None, "guidance_scale": guidance}

    def seconds(self, images: int, model: str, *inputs: Any) -> float:
        """Return how long drawing takes: as measured here; on ZeroGPU an allowance, which was chosen, not measured."""
        pipe, options = self._chain(model, *inputs[-4:])
        allowed = 0.05 + 4e-7 * images * math.prod(pipe.image_shape[1:])
        return pipe.network_evaluations(**options) * (self.measured[model] * images if self.measured else allowed)

    def expected(self, *inputs: Any) -> str:
        """Say how long `sample` will take, and how that is known; or what is wrong with its inputs."""
        try:
            seconds = self.seconds(len(parse_seeds(inputs[1], "Seeds", self.max_images)), *inputs)
        except UserError as error:
            return str(error)
        how = f"measured: {self.measured[inputs[0]]:.2g} s per image and evaluation" if self.measured else "a guess"
        return f"Expected: {max(seconds, 0.1):.1f} s ({how})."

    def sample(self, model: str, seeds: str, steps: int, sampler: str, label: Any, guidance: float) -> Iterator[Any]:
        """Draw `pipe(seeds=seeds)`; yield x_t, the predicted x_0 or `None`, the images at the end, and a text."""
        pipe, options = self._chain(model, steps, sampler, label, guidance)
        evaluations, count = pipe.network_evaluations(**options), len(pipe.scheduler.timesteps)
        worked, resumed = 0.0, time.monotonic()  # the time in which pictures are shown is not the network's
        for step in pipe.progressive(seeds=parse_seeds(seeds, "Seeds", self.max_images), **options):
            done, both = step.index + 1, (step.prev_sample, step.pred_original_sample)
            if step.index % max(1, count // 20) and done < count and time.monotonic() - resumed < 1:
                continue
            pipe.check_finite(step.prev_sample)
            images = pipe.as_output(step.prev_sample, "pil") if done == count else []
            worked += time.monotonic() - resumed
            text = f"step {done} of {count}, t = {step.timestep}: {done / worked:.1f} steps/s"
            if images:
                self.measured[model] = worked / evaluations / len(images)
                how = f"{steps} steps" + f" of {sampler}" * (pipe.distilled_steps is None)
                text = f"{len(images)} drawn in {worked:.2f} s: {how}, {evaluations} network evaluations each"
            yield *(x if x is None else image_grid(to_uint8(x), min(4, len(x)), tile=48) for x in both), images, text
            resumed = time.monotonic()

    def interpolate(
        self, model: str, seed_a: int, seed_b: int, share: float, steps: int, sampler: str, label: Any, guidance: float
    ) -> tuple[Image.Image, str]:
        """Diffuse two seeds' images to t = `share` T, mix and decode them (Fig. 8); return the figure and a text."""
        pipe, options = self._chain(model, steps, sampler, label, guidance)
        start = time.monotonic()
        (ends,) = pipe(seeds=[seed_a, seed_b], output_type="pt", return_dict=False, **options)
        (a, b), t = ends.cpu().split(1), round(share * pipe.scheduler.config.num_train_timesteps)
        figure = interpolate(pipe, a, b, t, seeds=[seed_a], batch_size=self.max_images, **options)
        text = f"{len(figure.lambdas)} images between two, mixed at t = {figure.t}"
        return figure.draw(), f"{text}, in {time.monotonic() - start:.2f} s"

    def bits_per_dim(self, model: str, file: str | None, label: Any = None) -> tuple[Image.Image, str]:
        """Estimate the bound on an image's -log p in bits/dim; return the image as the network sees it, and a text."""
        pipe, start = self.pipes[model], time.monotonic()
        if not file:
            raise UserError("choose an image file first")
        pixels = torch.tensor(read_image(Path(file), DecodeOptions(pipe.image_shape[0], pipe.image_shape[1:])))
        estimate, number = estimate_bits_per_dim(pipe, pixels, label or None)
        bits = f"**{estimate.mean:.2f} ± {estimate.sampling_standard_error:.2f} bits/dim**: the variational bound"
        text = f"{bits}, estimated from {number} network evaluations"
        return image_grid(pixels[None], tile=256), f"{text} in {time.monotonic() - start:.2f} s"


def make_page(demo: Demo, max_waiting: int = 20) -> gr.Blocks:
    """Return the page; its endpoints are `/sample`, `/interpolate` and `/bits_per_dim`."""
    every = [pipe.classes for pipe in demo.pipes.values()]
    guided = any(classes.null is not None for classes in every)
    names = [name for classes in every for i, name in enumerate(classes.all_names()) if i != classes.null]
    first = names[0] if not guided and all(classes.count for classes in every) else None  # where a class is needed
    own = {pipe.distilled_steps for pipe in demo.pipes.values()}
    fixed = own.pop() if len(own) == 1 else None  # all are distilled into so many steps, which cannot be chosen
    lend = _gpu(duration=lambda *inputs: 10 + math.ceil(2 * demo.seconds(demo.max_images, *inputs)))  # Fig. 8: 2
    with gr.Blocks(title="DDPM", analytics_enabled=False, delete_cache=(3600, 3600)) as page:  # seconds
        gr.Markdown("# Denoising diffusion probabilistic models")
        with gr.Row():
            model = gr.Dropdown(list(demo.pipes), label="Model", interactive=True)
            few = min(20, demo.max_steps)  # better than 50 of ddim on digits, see docs/sampling.md
            steps = gr.Slider(1, demo.max_steps, fixed or few, step=1, label="Steps", interactive=not fixed)
            sampler = gr.Dropdown(list(SAMPLERS), value="dpmsolver++", label="Sampler", visible=not fixed)
            options: dict[str, Any] = {"value": first, "allow_custom_value": True, "visible": bool(names)}
            label = gr.Dropdown(list(dict.fromkeys(names)), label="Class (empty: any)", **options)
            guidance = gr.Slider(0, 20, 1, step=0.5, label="Guidance (1: as learned)", visible=guided and not fixed)
        for name, pipe in demo.pipes.items():
            shape, T = " x ".join(map(str, pipe.image_shape)), pipe.scheduler.config.num_train_timesteps
            how = f", distilled into {pipe.distilled_steps} steps" if pipe.distilled_steps else ""
            gr.Markdown(f"{name}: images of {shape}, {parameter_count(pipe.unet):,} parameters, T = {T}{how}")
        with gr.Tab("Sample"), gr.Row():
            with gr.Column(scale=1):
                how = f"one image each, such as 0,5,8-11; at most {demo.max_images}"
                seeds = gr.Textbox(f"0-{min(8, demo.max_images) - 1}", label="Seeds", info=how, max_lines=1)
                expected = gr.Markdown(elem_id="expected")
                go, stop = gr.Button("Sample", variant="primary"), gr.Button("Stop")
                text = gr.Markdown(elem_id="timing")
            with gr.Column(scale=3):
                with gr.Row():
                    x_t = _picture("x_t, on its way from noise to the image", "x_t")
                    x_0 = _picture("x_0 as predicted from it (samplers ddpm and ddim)", "x_0")
                images = gr.Gallery(label="Images, in the order of seeds", elem_id="gallery", height=320, **_SHOWN)
            inputs: list[Any] = [model, seeds, steps, sampler, label, guidance]
            # "multiple": further clicks wait in the queue; gradio would ignore them, also for a while after a stop
            often = {**_QUEUED, "trigger_mode": "multiple", "show_progress": "hidden"}
            drawing = go.click(lend(demo.sample), inputs, [x_t, x_0, images, text], **often)
            stop.click(lambda: "stopped", None, text, cancels=drawing, **_AT_ONCE)
            gr.on([page.load, images.change, *(x.change for x in inputs)], demo.expected, inputs, expected, **_AT_ONCE)
        with gr.Tab("Interpolate"):
            with gr.Row():
                seed_a, seed_b = (gr.Number(i, label=f"Seed {'AB'[i]}", minimum=0, precision=0) for i in (0, 1))
                share = gr.Slider(0, 1, 0.5, step=0.05, label="t / T (0 keeps the two images, 1 forgets them)")
            mix, mixed = gr.Button("Interpolate", variant="primary"), gr.Markdown(elem_id="progress")
            figure = _picture("From A to B", "figure", height=None)
            inputs = [model, seed_a, seed_b, share, steps, sampler, label, guidance]
            mix.click(lend(demo.interpolate), inputs, [figure, mixed], **_QUEUED)
        with gr.Tab("Bits/dim", visible=not fixed), gr.Row():
            with gr.Column():
                file = gr.File(label=f"An image of any kind, up to {_MEGABYTES} MB", elem_id="file")
                measure, bits = gr.Button("Bits per dimension", variant="primary"), gr.Markdown(elem_id="bits")
            seen = _picture("What the network sees", "seen")
            measure.click(_gpu(duration=60)(demo.bits_per_dim), [model, file, label], [seen, bits], **_QUEUED)
    return page.queue(max_size=max_waiting, api_open=False)


def _picture(title: str, elem_id: str, height: int | None = 300) -> gr.Image:
    with gr.Column():
        gr.Markdown(title)  # gradio's own label would cover a corner of the picture
        return gr.Image(label=title, show_label=False, elem_id=elem_id, height=height, **_SHOWN)


def serve(app: str, models: str, max_images: int = 16, max_steps: int = 1000, max_waiting: int = 20) -> None:
    """Show the page of a `Demo` until Ctrl-C; models are looked for beside the app's file, `app`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    Image.MAX_IMAGE_PIXELS = _PIXELS // 2  # Pillow refuses twice as many, before it decodes anything
    try:
        demo = Demo(os.environ.get("DDPM_HF_SPACE_MODELS") or models, Path(app).parent, max_images, max_steps)
    except (UserError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    css = ".pixels img { image-rendering: pixelated; object-fit: contain }"  # small images as squares, not blurred
    css += " #gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)) }"
    # Fonts of the visitor's system instead of Google's; server-side rendering would need Node.js.
    theme = gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    off = dict.fromkeys(("ssr_mode", "share", "pwa", "mcp_server", "run_history", "enable_monitoring"), False)
    options: dict[str, Any] = {"theme": theme, "css": css, "footer_links": ["api"], "show_error": True, **off}
    make_page(demo, max_waiting).launch(max_file_size=f"{_MEGABYTES}mb", **options)
