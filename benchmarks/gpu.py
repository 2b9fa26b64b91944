"""How does this package do on your GPU, beside stock diffusers? `python benchmarks/gpu.py --output runs/gpu`

Everything runs in one process on one card, within `--minutes` (4 by default); what matters most comes first, and every
line is printed and written to `gpu.json` as soon as it is measured, so that a time limit loses nothing before it. Run
nothing else meanwhile. `--rehearse` runs the same path on a CPU with a tiny network: it measures nothing.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler as StockScheduler
from diffusers import UNet2DModel as StockUNet2DModel
from stock_example import StockTraining, sample

from ddpm_hf import DDPMPipeline, DDPMScheduler, Trainer, TrainingConfig, UNet2DModel
from ddpm_hf.pipelines.inference import InferenceOptions, optimize_for_inference
from ddpm_hf.training.update import CapturedUpdate

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"


@dataclasses.dataclass
class Size:
    """How large everything is.

    Attributes:
        preset: The experiment.
        batch, sampling_batch: Images per update, and per network evaluation.
        updates, steps: In each round.
        rounds: How often both sides are timed, one after the other.
        images: In the training set.
    """

    preset: str = "cifar10"
    batch: int = 128
    sampling_batch: int = 256
    updates: int = 20
    steps: int = 20
    rounds: int = 3
    images: int = 5000


REHEARSAL = Size("digits", batch=4, sampling_batch=4, updates=2, steps=3, rounds=2, images=32)


class Report:
    """What was measured so far, in the order it was measured."""

    def __init__(self, folder: Path, minutes: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.end, self.values = folder / "gpu.json", time.monotonic() + 60 * minutes, dict[str, Any]()

    def add(self, name: str, value: Any, remark: str = "") -> None:
        """Print a line and write it down."""
        self.values[name] = value
        shown = f"{value:,.4g}" if isinstance(value, float) else value
        print(f"{name}: {shown}{' ' + remark if remark else ''}", flush=True)
        self.file.write_text(json.dumps(self.values, indent=2) + "\n")

    @contextlib.contextmanager
    def part(self, name: str, seconds: float) -> Iterator[bool]:
        """One part, which is left out where fewer than `seconds` are left, and whose failure loses no other."""
        left = self.end - time.monotonic()
        if left < seconds:
            self.add(f"{name}: left out", f"{left:.0f} s are left")
        start = time.monotonic()
        try:
            yield left >= seconds
        except Exception as error:
            self.add(f"{name}: failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        self.add(f"{name}: seconds", round(time.monotonic() - start, 1))


def wait(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Time one call, the device's work included."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each side; rounds are interleaved."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            found[name].append(seconds_of(run, device))
    return {name: statistics.median(values) for name, values in found.items()}


# ---------------------------------------------------------------------- is it right?


def correctness(report: Report, device: torch.device, folder: Path) -> None:
    """Official recordings, samples beside the CPU's, batches of any size, repeated and resumed training."""
    sys.path.insert(0, str(FIXTURES.parent))
    from oracles import OFFICIAL_NETWORK, official, official_state_dict

    unet = UNet2DModel(**OFFICIAL_NETWORK).eval()
    unet.load_state_dict(official_state_dict())
    with torch.no_grad():
        output = unet.to(device)(official("x").to(device), official("t").to(device)).sample.cpu()
    report.add(
        "largest difference from the official network's output", (output - official("unet_out")).abs().max().item()
    )

    pipe = DDPMPipeline.from_pretrained("digits")
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "output_type": "pt"}
    on_cpu = pipe(seeds=range(16), **options).images
    pipe.to(device)
    optimize_for_inference(pipe, options=InferenceOptions(channels_last=True, captured=True))
    there = pipe(seeds=range(16), **options).images.cpu()
    report.add("samples: largest difference from the CPU's in pixel values", 255 * (there - on_cpu).abs().max().item())
    parts = [pipe(seeds=range(a, b), **options).images.cpu() for a, b in ((0, 1), (1, 6), (6, 16))]
    report.add(
        "samples: largest difference between batches in pixel values",
        255 * (torch.cat(parts) - there).abs().max().item(),
    )

    for precision in ("no", "bf16"):
        AcceleratorState._reset_state()  # it keeps one precision per process
        runs = {name: folder / f"{precision}-{name}" for name in ("whole", "again", "resumed")}
        for name in ("whole", "again"):
            train_a_little(runs[name], precision, 6)
        train_a_little(runs["resumed"], precision, 3)
        train_a_little(runs["resumed"], precision, 6, resume_from_checkpoint="latest")
        for name in ("again", "resumed"):
            same = all(
                (runs[n] / "checkpoint-6" / f).read_bytes() == (runs["whole"] / "checkpoint-6" / f).read_bytes()
                for n in [name]
                for f in ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
            )
            report.add(f"training, precision {precision}: {name} ends in the same bits", same)


def train_a_little(folder: Path, precision: str, steps: int, **options: Any) -> None:
    """A few updates of the digits preset, with the defaults of this device but for compiling, which takes minutes."""
    trainer(
        folder,
        "digits",
        8,
        max_train_steps=steps,
        checkpointing_steps=3,
        mixed_precision=precision,
        compile=False,
        dataset="digits",
        **options,
    ).train()


def trainer(folder: Path, preset: str, batch: int, **options: Any) -> Trainer:
    """A run, on CPUs with the captured update's path."""
    config = TrainingConfig(
        preset=preset,
        output_dir=str(folder),
        total_batch_size=batch,
        eval_num_images=0,
        num_sample_images=1,
        ddpm_num_inference_steps=1,
        **options,
    )
    run = Trainer(config)
    if run.device.type == "cpu":
        run.update = CapturedUpdate.of(run.update)
    return run


# ---------------------------------------------------------------------- training


def training(report: Report, size: Size, device: torch.device, folder: Path) -> None:
    """An update beside stock's, kernels and host time of ours, and the loop without a host that waits."""
    images = np.random.default_rng(0).integers(0, 256, (size.images, 3, 32, 32), dtype=np.uint8)
    data = {"dataset": "digits"}
    if size.preset != "digits":
        np.save(folder / "images.npy", images.transpose(0, 2, 3, 1))
        data = {"train_data_dir": str(folder / "images.npy")}
    start = time.monotonic()
    AcceleratorState._reset_state()
    run = trainer(folder / "ours", size.preset, size.batch, **data)
    before = memory(device)
    run.model.train()
    steps = iter(range(10**6))

    def ours(updates: int = size.updates) -> None:
        for _ in range(updates):
            run._update(next(steps))

    ours(1)
    wait(device)
    first = compiled()
    report.add("ours: compiling and capturing, seconds", time.monotonic() - start)
    ours()
    ours_seconds = seconds_of(ours, device)
    report.add("ours: images/s", size.updates * size.batch / ours_seconds, run.run.describe_computation())
    report.add("ours: peak memory, MB", memory(device) - before)
    report.add("ours: an update, ms", 1000 * ours_seconds / size.updates)
    report.add("ours: the host's part of it, ms", 1000 * host_seconds(ours, device) / size.updates)
    report.add("ours: 800,000 updates, hours", 800_000 * ours_seconds / size.updates / 3600)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours(25)  # with two checks for skipped updates
            report.add("ours: updates without waiting for the device", True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    report.add("ours: kernels per update", kernels_of(lambda: ours(1), device))
    report.add("ours: compiled", first, f"after the first update; after {next(steps)}: {compiled()}")

    best = 0.0
    channels = run.unet.config.in_channels
    clean = torch.randn(size.batch, channels, *image_size_of(run.unet), device=device)
    for name, variant in stock_variants(device).items():
        with report.part(f"stock, {name}", 150 if variant["compile"] else 10) as there_is_time:
            if not there_is_time:
                continue
            before = memory(device)
            stock = stock_training(run.unet, device, **variant)
            stock.update(clean)
            sides = interleaved(
                {"ours": ours, "stock": lambda stock=stock: [stock.update(clean) for _ in range(size.updates)]},
                size.rounds,
                device,
            )
            rate = size.updates * size.batch / sides["stock"]
            report.add(f"stock, {name}: images/s", rate, f"ours beside it: {sides['stock'] / sides['ours']:.2f} times")
            report.add(f"stock, {name}: peak memory, MB", memory(device) - before)
            best = max(best, rate)
            report.add("ours by the best of stock's so far", size.updates * size.batch / sides["ours"] / best)
            del stock


def image_size_of(unet: UNet2DModel) -> tuple[int, int]:
    """Height and width."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def stock_variants(device: torch.device) -> dict[str, dict[str, Any]]:
    """What a user of stock's example would try."""
    plain = {"tf32": False, "bf16": False, "channels_last": False, "compile": False}
    return {
        "float32 (PyTorch's defaults)": plain,
        "float32, TF32 products": {**plain, "tf32": True},
        "bf16": {**plain, "bf16": True},
        "bf16, channels_last": {**plain, "bf16": True, "channels_last": True},
        "bf16, channels_last, compiled": {
            **plain,
            "bf16": True,
            "channels_last": True,
            "compile": device.type == "cuda",
        },
    }


def stock_training(
    unet: UNet2DModel, device: torch.device, tf32: bool, bf16: bool, channels_last: bool, compile: bool
) -> StockTraining:
    """Stock's example on the same network."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32, True
    network = stock_copy(unet).to(device)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    stock = StockTraining(network, StockScheduler(), autocast=torch.bfloat16 if bf16 else None)
    if compile:
        stock.model = torch.compile(network)
    return stock


def stock_copy(unet: UNet2DModel) -> StockUNet2DModel:
    """Stock's network with the same weights."""
    made = StockUNet2DModel(**{k: v for k, v in unet.config.items() if not k.startswith("_")})
    made.load_state_dict(unet.state_dict())
    return made


def memory(device: torch.device) -> float:
    """MB that PyTorch held on the device at most since the last call; what it does not use is given back first."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_reserved() / 2**20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


def host_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the host has launched everything."""
    wait(device)
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    wait(device)
    return seconds


def kernels_of(run: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """How many kernels and copies run on the device, and how often the host launches (on CPUs: operators)."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        run()
        wait(device)
    events = profiler.events()
    if device.type != "cuda":
        return {"operators": sum(event.name.startswith("aten::") for event in events)}
    on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    launches = [event.name for event in events if "Launch" in event.name]
    copies = [name for name in on_device if "copy" in name.lower() or "memcpy" in name.lower()]
    return {"kernels": len(on_device), "copies": len(copies), "launches": len(launches)}


def compiled() -> dict[str, int]:
    """Count what `torch.compile` made so far: graphs, and breaks between them."""
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


# ---------------------------------------------------------------------- sampling, and the card


def sampling(report: Report, size: Size, device: torch.device) -> None:
    """Steps of Algorithm 2 beside stock's, float32 and fp16."""
    torch.manual_seed(0)
    pipe = DDPMPipeline(UNet2DModel.from_preset(size.preset), DDPMScheduler.from_preset(size.preset)).to(device)
    pipe.set_progress_bar_config(disable=True)
    seeds, n = range(size.sampling_batch), size.sampling_batch * size.steps
    shape = (size.sampling_batch, *pipe.image_shape)
    cuda = device.type == "cuda"
    options = InferenceOptions("bf16", channels_last=True, compiled=cuda, captured=True)
    optimize_for_inference(pipe, options=options)

    def ours() -> None:
        pipe(seeds=seeds, num_inference_steps=size.steps, output_type="pt")

    report.add("sampling, ours: first call, seconds", seconds_of(ours, device))
    report.add("sampling, ours: kernels of a call", kernels_of(ours, device), f"in {size.steps} steps")
    for name, dtype in (
        ("float32", torch.float32),
        ("fp16", torch.float16 if device.type == "cuda" else torch.bfloat16),
    ):
        network, x = stock_copy(pipe.unet).to(device, dtype).eval(), torch.randn(shape, device=device, dtype=dtype)

        def stock(network: StockUNet2DModel = network, x: torch.Tensor = x) -> None:
            sample(network, StockScheduler(), x, size.steps, None)

        stock()
        sides = interleaved({"ours": ours, "stock": stock}, size.rounds, device)
        report.add(f"sampling, stock {name}: image steps/s", n / sides["stock"])
        report.add(
            "sampling, ours: image steps/s", n / sides["ours"], f"{sides['stock'] / sides['ours']:.2f} times stock's"
        )


def matrix_peak(report: Report, device: torch.device, n: int) -> None:
    """The card's best bf16 matrix product, and the share of it that an update reaches."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    a @ a
    peak = 2 * n**3 / min(seconds_of(lambda: a @ a, device) for _ in range(10)) / 1e12
    report.add("bf16 matrix product, TFLOP/s", peak)
    if (rate := report.values.get("ours: images/s")) and n > 1024:
        report.add("ours: share of it, %", 100 * rate * 37.3e-3 / peak, "(37.3 GFLOP per image, forward and backward)")


def main(arguments: list[str] | None = None) -> int:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--rehearse", action="store_true", help="the same path on a CPU, tiny")
    values = parser.parse_args(arguments)
    if not values.rehearse and not torch.cuda.is_available():
        print("error: there is no CUDA device here; --rehearse runs the same path on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if values.rehearse else "cuda")
    size = REHEARSAL if values.rehearse else Size()
    report = Report(values.output, values.minutes)
    name = "none: a rehearsal on the CPU" if values.rehearse else torch.cuda.get_device_name()
    report.add("device", name, f"PyTorch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with report.part("correctness", 20) as there_is_time:
            if there_is_time:
                correctness(report, device, folder)
        with report.part("training", 60) as there_is_time:
            if there_is_time:
                training(report, size, device, folder)
        with report.part("sampling", 40) as there_is_time:
            if there_is_time:
                sampling(report, size, device)
        with report.part("matrix product", 5) as there_is_time:
            if there_is_time:
                matrix_peak(report, device, 256 if values.rehearse else 8192)
    return 0


if __name__ == "__main__":
    sys.exit(main())
