"""How fast, beside stock diffusers? `python benchmarks/speed.py --output runs/speed`

Every row does the same work in two ways, interleaved (A B A B ...), in one process, on the same weights and data: as
stock diffusers 0.42 does it in eager float32, and as this package does it. The ratio is of rounds beside each other.
Where its spread is larger than the effect, the table claims nothing. Run nothing else meanwhile; it takes about twenty
minutes.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import DDPMScheduler as StockScheduler
from diffusers import UNet2DModel as StockUNet2DModel
from digits_quality import frechet_distance
from measuring import Row, high_water_mark, interleaved, matrix_product_peak, peak_memory, table, write
from PIL import Image
from stock_example import StockTraining, endless, sample, transform
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf import DDPMPipeline, DDPMScheduler, Trainer, TrainingConfig, UNet2DModel
from ddpm_hf.data.datasets import load_images
from ddpm_hf.data.tensors import to_model_range
from ddpm_hf.diffusion.likelihood import bits_per_dim, stratified_bits_per_dim
from ddpm_hf.pipelines.inference import optimize_for_inference
from ddpm_hf.presets import get_preset
from ddpm_hf.sampling.generation import generate, with_sampler

STOCK_BF16 = "stock in bf16 too"
DIGITS = str(Path(__file__).parent.parent / "ddpm_hf" / "models" / "digits")


def cifar10() -> DDPMPipeline:
    """The paper's network with weights as large as trained ones have them: what they are changes no time."""
    torch.manual_seed(0)
    unet = UNet2DModel.from_preset("cifar10").eval()
    with torch.no_grad():
        for weight in unet.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.5 / weight[0].numel() ** 0.5)
    return DDPMPipeline(unet, DDPMScheduler.from_preset("cifar10"))


def stock_of(pipe: DDPMPipeline) -> tuple[StockUNet2DModel, StockScheduler]:
    """Stock's network with the same weights, and its scheduler."""
    unet = StockUNet2DModel(**{k: v for k, v in pipe.unet.config.items() if not k.startswith("_")})
    unet.load_state_dict(pipe.unet.state_dict())
    return unet.eval(), StockScheduler.from_config(pipe.scheduler.config)


def gflop_of(unet: torch.nn.Module, shape: tuple[int, ...]) -> float:
    """Of one evaluation with plain convolutions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(shape, dtype=next(unet.parameters()).dtype), 0)
    return counter.get_total_flops() / 1e9


def pixel_values(x: torch.Tensor) -> torch.Tensor:
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round()


def sampling(
    row: Row, pipe: DDPMPipeline, batch: int, steps: int, rounds: int, precision: str, compile: bool = False
) -> Row:
    """`steps` steps of a batch, stock's loop beside the pipeline's; the check is filled in for float32.

    Stock is in float32, or in the precision that the row's name says: as `pipe.to(torch.bfloat16)`, chain and all.
    """
    unet, scheduler = stock_of(pipe)
    unet.to(torch.bfloat16 if STOCK_BF16 in row.what else torch.float32)
    chosen = optimize_for_inference(pipe, precision=precision, compile=compile)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(batch, *pipe.image_shape, generator=torch.Generator().manual_seed(0))
    made: dict[str, torch.Tensor] = {}

    def stock() -> None:
        made["stock"] = sample(unet, scheduler, x.to(unet.dtype), steps, torch.Generator().manual_seed(1))

    def ours() -> None:
        for step in pipe.denoise(x, torch.Generator().manual_seed(1), num_inference_steps=steps):
            made["ours"] = step.prev_sample

    row.gflop = gflop_of(unet, x.shape)
    row.what += f" ({str(chosen).replace(',', '')})"  # ours
    interleaved(row, stock, ours, rounds)
    row.stock, row.ours = ([seconds / steps for seconds in side] for side in (row.stock, row.ours))
    row.low_precision = precision != "fp32"
    if precision == "fp32":
        apart = (pixel_values(made["ours"]) - pixel_values(made["stock"])).abs().max().item()
        row.check = f"images differ by {apart:.0f} pixel value(s) at most"
    pipe.network = pipe.unet
    return row


def digits_distance(precision: str, num_samples: int, steps: int = 50) -> float:
    """Frechet distance of samples of the digits model to the training images, pixels, levels 0..16."""
    pipe = DDPMPipeline.from_pretrained(DIGITS)
    optimize_for_inference(pipe, precision=precision)
    real = load_images(dataset="digits", split="train", channels=1, resolution=(8, 8)).images
    pipe = with_sampler(pipe, "ddim")
    drawn = [image for _, image in generate(pipe, range(num_samples), batch_size=250, num_inference_steps=steps)]
    samples, real = (x.reshape(len(x), -1).double().numpy() * (16 / 255) for x in (torch.cat(drawn), real))
    return frechet_distance(samples, real)


def trainer_of(folder: str, **values: Any) -> Trainer:
    return Trainer(TrainingConfig(output_dir=folder, report_to=None, **values))


def as_the_example_loads(data: Any) -> datasets.Dataset:
    """A table of PNGs, decoded and transformed whenever an image is asked for."""
    _, channels, size, _ = data.images.shape
    arrays = data.images.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(a[..., 0] if channels == 1 else a) for a in arrays]
    made = datasets.Dataset.from_dict({"image": pictures}, datasets.Features({"image": datasets.Image()}))
    change = transform(size, channels)
    return made.with_transform(lambda rows: {"input": [change(image) for image in rows["image"]]})


def training(
    row: Row, folder: Path, preset: str, batch: int, updates: int, rounds: int, per_image: bool, **values: Any
) -> Row:
    """`updates` updates of the trainer, data and all, beside those of the stock example on the same network."""
    from torch.utils.tensorboard import SummaryWriter  # more memory than a network: not where that is measured

    trainer = trainer_of(str(folder), preset=preset, train_batch_size=batch, mixed_precision="bf16", **values)
    unet = StockUNet2DModel(**{k: v for k, v in trainer.unet.config.items() if not k.startswith("_")})
    unet.load_state_dict(trainer.unet.state_dict())
    recipe = trainer.recipe
    scheduler = StockScheduler(**get_preset(preset).scheduler)
    autocast = torch.bfloat16 if STOCK_BF16 in row.what else None
    stock_side = StockTraining(unet, scheduler, recipe.learning_rate, recipe.lr_warmup_steps, autocast)
    batches = endless(DataLoader(as_the_example_loads(trainer.data), batch_size=batch, shuffle=True))
    log = SummaryWriter(folder / "log")
    losses: dict[str, list[float]] = {"stock": [], "ours": []}
    trainer.model.train()

    def stock() -> None:
        for _ in range(updates):
            losses["stock"].append(stock_side.update(next(batches)["input"]))
            for name, value in (("loss", losses["stock"][-1]), ("lr", stock_side.lr.get_last_lr()[0])):
                log.add_scalar(name, value, len(losses["stock"]))

    def ours() -> None:
        for _ in range(updates):
            loss, _ = trainer._update(trainer.step)
            trainer.step += 1
            losses["ours"].append(loss.item())

    interleaved(row, stock, ours, rounds)
    trainer.batches.close()
    log.close()
    each = updates * (batch if per_image else 1)
    row.stock, row.ours = ([seconds / each for seconds in side] for side in (row.stock, row.ours))
    means = [np.mean(losses[side][-updates:]) for side in ("stock", "ours")]
    row.check = f"mean loss of the last {updates} updates {means[0]:.3f} and {means[1]:.3f}"
    row.low_precision = True
    return row


def likelihood_rows(rounds: int, compile: bool) -> list[Row]:
    """The bound of 64 digits: in full beside a loop of stock forwards, and from 50 evaluations per image."""
    pipe = DDPMPipeline.from_pretrained(DIGITS)
    unet, _ = stock_of(pipe)
    images = load_images(dataset="digits", split="validation", channels=1, resolution=(8, 8)).images[:64]
    x_0 = to_model_range(images)
    exact = bits_per_dim(pipe.unet, pipe.scheduler, x_0).total_bpd.mean().item()
    optimize_for_inference(pipe, precision="bf16", compile=compile)
    found: dict[str, Any] = {}
    noise = torch.randn(x_0.shape)

    @torch.no_grad()
    def stock() -> None:
        for t in range(1000):
            unet(pipe.scheduler.add_noise(x_0, noise, t), torch.full((64,), t))

    def full() -> None:
        found["full"] = bits_per_dim(pipe.network, pipe.scheduler, x_0).total_bpd.mean().item()

    def few() -> None:
        found["few"] = stratified_bits_per_dim(pipe.network, pipe.scheduler, x_0, num_evaluations=50)

    whole = interleaved(Row("bits/dim of 64 digits, 1000 steps (bf16)", ">= 2.3"), stock, full, rounds)
    whole.check = f"{found['full']:.4f} bits/dim, in float32 {exact:.4f}"
    short = Row("bits/dim of 64 digits, stratified K = 50 (bf16)", ">= 20")
    interleaved(short, stock, few, rounds)
    estimate = found["few"]
    short.check = f"{estimate.mean:.3f} +- {estimate.sampling_standard_error:.3f}, in full {exact:.3f}"
    return [whole, short]


def image_rows(folder: Path, rounds: int) -> list[Row]:
    """4,500 PNGs of 28 x 28 pixels to tensors: the first epoch, and the others."""
    generator = np.random.default_rng(0)
    for i in range(4500):
        Image.fromarray(generator.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{i:04d}.png")

    class Files(Dataset):
        def __init__(self) -> None:
            self.paths, self.transform = sorted(folder.glob("*.png")), transform(28, 1)

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            with Image.open(self.paths[index]) as image:
                return self.transform(image)

    held: dict[str, torch.Tensor] = {}

    def stock() -> None:
        held["stock"] = torch.cat(list(DataLoader(Files(), batch_size=64)))

    def first() -> None:
        held["data"] = load_images(train_data_dir=str(folder), channels=1, resolution=(28, 28)).images

    def later() -> None:
        held["ours"] = torch.cat([to_model_range(part) for part in held["data"].split(64)])

    rows = [interleaved(Row("4,500 PNGs of 28 x 28 to tensors, first epoch", "<= stock's"), stock, first, rounds)]
    rows += [interleaved(Row("the same, later epochs", "~ 0"), stock, later, rounds)]
    apart = (held["ours"] - held["stock"]).abs().max().item()
    for row in rows:
        row.check = f"tensors differ by {apart:.0e} at most"
    return rows


def start_rows(rounds: int) -> list[Row]:
    """Seconds of a fresh process, beside one that imports diffusers or does nothing."""
    rows = []
    for what, target, command in (
        ("`import ddpm_hf`", "<= 0.1 s", [sys.executable, "-c", "import ddpm_hf"]),
        ("`ddpm-hf --help`", "<= 0.5 s", [sys.executable, "-m", "ddpm_hf.cli", "--help"]),
    ):
        other = [sys.executable, "-c", "import diffusers" if "import" in what else "pass"]
        row = Row(
            what + (", beside `import diffusers`" if "import" in what else ", beside Python's own start"), target
        )
        calls: list[Callable[[], Any]] = [
            lambda words=words: subprocess.run(words, check=True, capture_output=True) for words in (other, command)
        ]
        rows.append(interleaved(row, *calls, rounds=rounds))
    return rows


def memory_of(kind: str) -> None:
    """In a process of its own: print the MB at most of sampling or training the CIFAR-10 network."""
    side, task = kind.split("-", 1)
    if task == "training":
        images = torch.zeros(16, 3, 32, 32)
        if side == "stock":
            unet = StockUNet2DModel(**get_preset("cifar10").unet)
            stock_side = StockTraining(unet, StockScheduler(**get_preset("cifar10").scheduler))
            for _ in range(2):
                stock_side.update(images)
        else:
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder) / "images"
                data.mkdir()
                for i in range(16):
                    Image.new("RGB", (32, 32)).save(data / f"{i}.png")
                trainer = trainer_of(folder + "/run", preset="cifar10", train_data_dir=str(data), **CIFAR_TRAINING)
                for step in range(2):
                    trainer._update(step)
                trainer.batches.close()
    else:
        pipe = cifar10()
        x = torch.randn(16, 3, 32, 32)
        if side == "stock":
            unet, scheduler = stock_of(pipe)
            del pipe
            sample(unet, scheduler, x, 2, torch.Generator())
        else:
            optimize_for_inference(pipe, precision=task.removeprefix("sampling-"))
            for _ in pipe.denoise(x, num_inference_steps=2):
                pass
    print(high_water_mark())


CIFAR_TRAINING: dict[str, Any] = {"train_batch_size": 16, "mixed_precision": "bf16", "channels_last": True}


def memory_rows() -> list[Row]:
    rows = []
    for what, stock, ours in (
        ("peak memory, sampling the CIFAR-10 network, fp32", "stock-sampling", "ours-sampling-fp32"),
        ("the same, bf16", "stock-sampling", "ours-sampling-bf16"),
        ("peak memory, training the CIFAR-10 network, batch 16, bf16", "stock-training", "ours-training"),
    ):
        row = Row(what, "not above stock's", unit="MB")
        row.stock, row.ours = [peak_memory(__file__, "--memory", stock)], [peak_memory(__file__, "--memory", ours)]
        print(f"{what}: {row.stock[0]:.0f} and {row.ours[0]:.0f} MB", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/speed", help="folder for speed.json and speed.md")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="groups: cifar10 digits training likelihood images start memory")
    parser.add_argument("--no_compile", action="store_true", help="without torch.compile, which takes minutes")
    parser.add_argument("--num_samples", type=int, default=2000, help="for the Frechet distances")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        memory_of(arguments.memory)
        return
    if torch.accelerator.is_available():
        parser.error("this measures CPUs; hide the accelerator, with CUDA_VISIBLE_DEVICES= or the like")
    compile, rounds = not arguments.no_compile, arguments.rounds
    peaks = {"fp32": matrix_product_peak(torch.float32), "bf16": matrix_product_peak(torch.bfloat16)}
    print("matrix products:", {name: f"{peak:.0f} GFLOP/s" for name, peak in peaks.items()}, flush=True)

    rows: list[Row] = []

    def cifar_sampling() -> None:
        what = "sampling, CIFAR-10 network, batch 16, a step"
        row = sampling(Row(what, ">= 2.3"), cifar10(), 16, 2, rounds, "bf16", compile)
        distances = [digits_distance(p, arguments.num_samples) for p in ("fp32", "bf16")]
        row.check = f"digits: Frechet distance {distances[1]:.2f}, in float32 {distances[0]:.2f}"
        rows.append(row)
        rows.append(sampling(Row(f"{what}, {STOCK_BF16}", "> 1"), cifar10(), 16, 2, rounds, "bf16", compile))
        rows.append(sampling(Row(what, ">= 1.2"), cifar10(), 16, 2, rounds, "fp32"))

    def digits_sampling() -> None:
        pipe = DDPMPipeline.from_pretrained(DIGITS)
        low, full = (Row("sampling, digits network, batch 64, a step", ">= 2") for _ in range(2))
        rows.extend(
            sampling(row, pipe, 64, 50, rounds, precision, compile)
            for row, precision in ((low, "bf16"), (full, "fp32"))
        )
        distances = [digits_distance(p, arguments.num_samples) for p in ("fp32", "bf16")]
        low.check = f"Frechet distance {distances[1]:.2f}, in float32 {distances[0]:.2f}"

    def trainings() -> None:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "images"
            data.mkdir()
            generator = np.random.default_rng(0)
            for i in range(256):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(data / f"{i}.png")
            row = Row("training update, CIFAR-10 network, batch 16 (bf16, channels_last)", ">= 1.6")
            values = {"train_data_dir": str(data), "channels_last": True, "gradient_accumulation_steps": 1}
            rows.append(training(row, Path(folder) / "cifar", "cifar10", 16, 1, rounds, False, **values))
            row = Row(f"the same, {STOCK_BF16}", "> 1")
            rows.append(training(row, Path(folder) / "both", "cifar10", 16, 1, rounds, False, **values))
            row = Row("training, digits preset, whole loop, an image (bf16)", ">= 2")
            values = {"dataset": "digits"}
            rows.append(training(row, Path(folder) / "digits", "digits", 64, 20, rounds, True, **values))

    def images() -> None:
        with tempfile.TemporaryDirectory() as folder:
            rows.extend(image_rows(Path(folder), rounds))

    groups: dict[str, Callable[[], Any]] = {
        "cifar10": cifar_sampling,
        "digits": digits_sampling,
        "training": trainings,
        "likelihood": lambda: rows.extend(likelihood_rows(min(rounds, 3), compile)),
        "images": images,
        "start": lambda: rows.extend(start_rows(rounds)),
        "memory": lambda: rows.extend(memory_rows()),
    }
    for name in arguments.only or groups:
        if name not in groups:
            parser.error(f"--only {name}: the groups are {', '.join(groups)}")
        groups[name]()
        write(rows, peaks, Path(arguments.output))
    print(table(rows, peaks))


if __name__ == "__main__":
    main()
