"""Shared by all tests: no network, few threads, a small network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Networks this small gain nothing from threads, and lose much where other processes want the cores. Subprocesses too.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Features of real images are kept across evaluations; nobody's own cache (or trackio) is written by tests.
os.environ["DDPM_HF_CACHE"] = tempfile.mkdtemp(prefix="ddpm-hf-tests-")
os.environ["TRACKIO_DIR"] = os.path.join(os.environ["DDPM_HF_CACHE"], "trackio")

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.schedulers import scheduling_ddpm

from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel
from ddpm_hf.utils.randomness import SeededNoise

FIXTURES = Path(__file__).parent / "fixtures"
DIGITS_MODEL = Path(__file__).parents[1] / "ddpm_hf/models/digits"  # trained: what `make demo` makes

SMALL_NETWORK = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "attention_head_dim": None,
}


def make_small_unet(seed: int = 0, **overrides) -> UNet2DModel:
    """A network of 8x8 grey images whose output is far from zero everywhere."""
    torch.manual_seed(seed)
    unet = UNet2DModel(**{**SMALL_NETWORK, **overrides})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet.eval()


def gaussian_pipeline(scheduler, data) -> DDPMPipeline:
    """A pipeline whose network knows the best epsilon for independent Gaussian pixels (`oracles.GaussianData`)."""

    class Best(UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            best = torch.tensor([data.expected_noise(int(t)) for t in torch.as_tensor(timestep).reshape(-1).tolist()])
            slope, offset = best.to(sample).view(-1, 2, 1, 1, 1).unbind(1)
            return UNet2DOutput(sample=slope * sample + offset)

    pipe = DDPMPipeline(Best(**SMALL_NETWORK), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def stock_draws(noise: SeededNoise) -> Iterator[None]:
    """Within, stock's DDPM pipeline and scheduler draw the noise of seeds instead of that of generators."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline_ddpm, scheduling_ddpm):
            patch.setattr(module, "randn_tensor", lambda shape, **options: noise.normal(shape))
        yield


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """What a training run sets for its whole process, accelerate's precision and the threads, ends with the test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state()


@pytest.fixture
def small_unet() -> UNet2DModel:
    return make_small_unet()


@pytest.fixture
def small_pipeline(small_unet) -> DDPMPipeline:
    pipe = DDPMPipeline(small_unet, DDPMScheduler(variance_type="fixed_large"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# The files that take longest. They come first, so that no process is alone with one of them at the end.
LONGEST = ["test_trainer", "test_publish", "test_kill", "test_docs", "test_stock_compatibility", "test_space"]
LONGEST += ["test_inference", "test_distributed", "test_space_page", "test_compiled", "test_packaging"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["DDPM_HF_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def repository_root() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture(scope="module")
def app(space, tmp_path_factory):
    """The module's `space` (a written one), started from elsewhere; in the end, that it tried to reach nothing."""
    from space_server import running

    folder = tmp_path_factory.mktemp("app")
    with running(space / "app.py", folder, models=None, cwd=folder) as started:
        yield started
        assert started.left() == []


@pytest.fixture(scope="module")
def client(app, tmp_path_factory):
    """A program that calls the app's API."""
    from gradio_client import Client

    downloads = tmp_path_factory.mktemp("downloads")
    return Client(app.url, verbose=False, analytics_enabled=False, download_files=downloads)
