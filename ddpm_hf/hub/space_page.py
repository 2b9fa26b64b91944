"""The page of a Space: gradio (extra `space`) in front of `space_demo.Demo`.

It asks for nothing from elsewhere: no fonts, no analytics, no share links.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # is looked at when gradio is imported

import gradio as gr
import torch
from PIL import Image

from ..sampling.generation import SAMPLERS
from ..utils.errors import UserError
from .space_demo import ANY_CLASS, Demo, Limits

# Small images are enlarged as squares, not blurred.
_CSS = ".pixels img { image-rendering: pixelated; object-fit: contain }"
_FONTS: Any = ("system-ui", "sans-serif")
_MONO_FONTS: Any = ("ui-monospace", "monospace")
_AN_HOUR = 3600


def _told(action: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same, with UserErrors and OSErrors shown to the visitor as sentences."""

    @functools.wraps(action)
    def wrapped(*values: Any) -> Iterator[Any]:
        try:
            yield from action(*values)
        except (UserError, OSError) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None
        except torch.OutOfMemoryError:
            raise gr.Error("too little memory for that; try fewer images", print_exception=False) from None

    return wrapped


class _Events:
    """What happens when a visitor clicks; each has what its endpoint takes and what it shows."""

    def __init__(self, demo: Demo):
        self.demo = demo
        # One for each session in which somebody sampled; gradio's own cancelling waits for a gap between two pictures,
        # and loses clicks until then.
        self.stops: dict[str | None, threading.Event] = {}

    def choose(self, model: Any) -> Iterator[tuple[Any, ...]]:
        classes = self.demo.classes(model)
        label = gr.Dropdown(choices=classes, value=classes[0] if classes else None, visible=bool(classes))
        yield self.demo.describe(model), label, gr.Slider(visible=ANY_CLASS in classes)

    def wait(self, request: gr.Request) -> str:
        """A new click: it ends what the one before has begun, which Stop could no longer reach."""
        self.stop(request)
        self.stops[request.session_hash] = threading.Event()
        return "in the queue"

    def stop(self, request: gr.Request) -> None:
        self.stops.get(request.session_hash, threading.Event()).set()

    def leave(self, request: gr.Request) -> None:
        self.stops.pop(request.session_hash, threading.Event()).set()

    def sample(
        self, model: Any, seeds: Any, steps: Any, sampler: Any, label: Any, guidance: Any, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        stop = self.stops.get(request.session_hash)
        for made in self.demo.sample(model, seeds, steps, sampler, label, guidance, stop):
            yield made.x_t, made.pred_original_sample, made.images, made.text

    def bits_per_dim(self, model: Any, file: Any, label: Any) -> Iterator[tuple[Image.Image, str]]:
        yield self.demo.bits_per_dim(model, file, label)


def make_page(demo: Demo) -> gr.Blocks:
    """The page; its endpoints are `/sample`, `/interpolate` and `/bits_per_dim`.

    One request is worked on at a time, whichever of the three it is; the others wait.
    """
    limits, events = demo.limits, _Events(demo)
    in_turn: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network"}
    at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    def picture(name: str, elem_id: str, height: int | None = 300) -> gr.Image:
        gr.Markdown(name)  # gradio's own label would cover a corner of the picture
        options: dict[str, Any] = {"elem_id": elem_id, "elem_classes": "pixels", "buttons": ["download", "fullscreen"]}
        return gr.Image(
            label=name, show_label=False, format="png", type="pil", interactive=False, height=height, **options
        )

    with gr.Blocks(title="DDPM", analytics_enabled=False, delete_cache=(_AN_HOUR, _AN_HOUR)) as page:
        gr.Markdown("# Denoising diffusion probabilistic models")
        with gr.Row():
            model = gr.Dropdown(demo.names, value=demo.names[0], label="Model", interactive=True)
            steps = gr.Slider(1, limits.steps, min(50, limits.steps), step=1, label="Steps")
            sampler = gr.Dropdown(list(SAMPLERS), value="ddim", label="Sampler", interactive=True)
            label = gr.Dropdown([], label="Class", allow_custom_value=True, interactive=True, visible=False)
            guidance = gr.Slider(0, 20, 1, step=0.5, label="Guidance (1: as learned)", visible=False)
        facts = gr.Markdown()
        with gr.Tab("Sample"), gr.Row():
            with gr.Column(scale=1):
                seeds = gr.Textbox(
                    "0" if limits.images == 1 else f"0-{min(8, limits.images) - 1}",
                    label="Seeds",
                    info=f"one image each, such as 0-7 or 0,5,8-11; at most {limits.images}",
                    max_lines=1,
                )
                go = gr.Button("Sample", variant="primary")
                stop = gr.Button("Stop")
                timing = gr.Markdown(elem_id="timing")
            with gr.Column(scale=3):
                with gr.Row():
                    with gr.Column():
                        x_t = picture("x_t, on its way from noise to the image", "x_t")
                    with gr.Column():
                        x_0 = picture("x_0 as predicted from it (samplers ddpm and ddim)", "x_0")
                gr.Markdown("Images, in the order of their seeds")
                gallery = gr.Gallery(
                    show_label=False,
                    format="png",
                    columns=8,
                    object_fit="contain",
                    height=240,
                    elem_id="gallery",
                    elem_classes="pixels",
                    interactive=False,
                    buttons=["download", "download_all", "fullscreen"],
                )
        with gr.Tab("Interpolate"):
            with gr.Row():
                seed_a = gr.Number(0, label="Seed A", precision=0)
                seed_b = gr.Number(1, label="Seed B", precision=0)
                share = gr.Slider(0, 1, 0.5, step=0.05, label="t / T (0 keeps the two images, 1 forgets them)")
            between = gr.Button("Interpolate", variant="primary")
            progress = gr.Markdown(elem_id="progress")
            figure = picture("From A to B", "figure", height=None)
        with gr.Tab("Bits/dim"), gr.Row():
            with gr.Column():
                file = gr.File(
                    label=f"An image of any kind, up to {limits.megabytes} MB", type="filepath", elem_id="file"
                )
                measure = gr.Button("Bits per dimension", variant="primary")
                bits = gr.Markdown(elem_id="bits")
            with gr.Column():
                seen = picture("What the network sees", "seen")

        for event in (page.load, model.change):
            event(
                _told(events.choose),
                [model],
                [facts, label, guidance],
                api_visibility="private",
                show_progress="hidden",
            )
        sampling = go.click(events.wait, None, [timing], **at_once).then(
            _told(events.sample),
            [model, seeds, steps, sampler, label, guidance],
            [x_t, x_0, gallery, timing],
            api_name="sample",
            show_progress="hidden",
            trigger_mode="always_last",  # gradio would ignore a click while the one before is still ending
            **in_turn,
        )
        sampling.failure(lambda: "", None, [timing], **at_once)
        stop.click(events.stop, None, None, **at_once)
        page.unload(events.leave)
        between.click(
            _told(demo.interpolate),
            [model, seed_a, seed_b, share, steps, sampler, label, guidance],
            [figure, progress],
            api_name="interpolate",
            show_progress="minimal",
            **in_turn,
        )
        measure.click(
            _told(events.bits_per_dim),
            [model, file, label],
            [seen, bits],
            api_name="bits_per_dim",
            show_progress="minimal",
            **in_turn,
        )
    return page.queue(max_size=limits.waiting, api_open=False, default_concurrency_limit=1)


def serve(models: str, limits: Limits, folder: Path) -> None:
    """Show the page until Ctrl-C; gradio's variables (`GRADIO_SERVER_PORT`, ...) say where.

    A mistake in what is given is one sentence on stderr, and exit code 2.

    Args:
        models: Folders or names on the Hub, with commas between them; the first one is loaded now.
        limits, folder: See `Demo`.
    """
    try:
        demo = Demo(models.split(","), limits, folder)
        demo.load(demo.names[0])
        make_page(demo).launch(
            max_file_size=f"{limits.megabytes}mb",
            theme=gr.themes.Base(font=_FONTS, font_mono=_MONO_FONTS),
            css=_CSS,
            footer_links=["api"],
            ssr_mode=False,  # would need Node.js
            pwa=False,
            share=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
        )
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
