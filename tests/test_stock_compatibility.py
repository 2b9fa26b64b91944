"""Repositories open in stock diffusers without ddpm_hf, and stock's open here. Stock runs in processes of its own."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import SMALL_NETWORK, make_small_unet
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel
from ddpm_hf.pipelines.schedulers import make_scheduler
from ddpm_hf.training.configuration import DistillationConfig
from ddpm_hf.training.distillation import Distillation

WITHOUT_US = "import sys; sys.modules['ddpm_hf'] = None\n"  # from here on, importing it raises ImportError

STOCK_SAMPLES = """
import diffusers, numpy as np, sys, torch
loader, folder, out, steps = sys.argv[1:]
pipe = getattr(diffusers, loader).from_pretrained(folder)
assert type(pipe) is diffusers.DDPMPipeline, type(pipe)
assert type(pipe.unet) is diffusers.UNet2DModel and type(pipe.scheduler) is diffusers.DDPMScheduler
images = pipe(batch_size=3, generator=torch.Generator().manual_seed(5), num_inference_steps=int(steps)).images
np.save(out, np.stack([np.asarray(image) for image in images]))
"""

STOCK_WRITES = """
import diffusers, numpy as np, sys, torch, json
folder, out, network, variance = sys.argv[1:]
torch.manual_seed(3)
unet = diffusers.UNet2DModel(**json.loads(network))
pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(variance_type=variance))
pipe.save_pretrained(folder)
images = pipe(batch_size=3, generator=torch.Generator().manual_seed(5), num_inference_steps=40).images
np.save(out, np.stack([np.asarray(image) for image in images]))
"""


# One process imports stock for all tests; each program runs in a child of its own.
STOCK = """
import json, os, sys, traceback
import diffusers, numpy, torch
for line in sys.stdin:
    code, *sys.argv[1:] = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            exec(code, {"__name__": "__main__"})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    print("ended", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a program, with arguments, in a process that has stock diffusers and cannot import ddpm_hf."""
    errors = tmp_path_factory.mktemp("stock") / "stderr.txt"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors.open("w"), "text": True}
    with subprocess.Popen([sys.executable, "-c", WITHOUT_US + STOCK], **pipes) as process:

        def run(code: str, *arguments: str) -> None:
            process.stdin.write(json.dumps([code, *arguments]) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ended 0\n", errors.read_text()

        yield run
        process.stdin.close()


def levels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def weights_file(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module", params=[("fixed_large", 40), ("fixed_small", 1000)], ids=str)
def ours(request, tmp_path_factory):
    """A folder of ours, its network, the number of steps and the images."""
    variance, steps = request.param
    pipe, folder = DDPMPipeline(make_small_unet(), DDPMScheduler(variance_type=variance)), tmp_path_factory.mktemp("o")
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    images = pipe(batch_size=3, generator=torch.Generator().manual_seed(5), num_inference_steps=steps).images
    return folder, pipe.unet, steps, levels(images)


@pytest.mark.parametrize("loader", ["DDPMPipeline", "DiffusionPipeline"])
def test_ours_opens_in_stock(tmp_path, run, loader, ours):
    folder, unet, steps, images = ours
    out = tmp_path / "images.npy"
    run(STOCK_SAMPLES, loader, str(folder), str(out), str(steps))
    assert np.abs(images - np.load(out)).max() <= 1
    assert np.load(out).std() > 20  # real contrast, not a grey field that anything agrees with

    stock = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    assert type(stock) is diffusers.UNet2DModel
    for name, value in unet.state_dict().items():
        assert torch.equal(stock.state_dict()[name], value), name


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_stock_opens_in_ours(tmp_path, run, variance):
    folder, out = tmp_path / "stock", tmp_path / "images.npy"
    run(STOCK_WRITES, str(folder), str(out), json.dumps(SMALL_NETWORK), variance)
    pipe = DDPMPipeline.from_pretrained(folder)
    assert type(pipe) is DDPMPipeline
    assert type(pipe.unet) is UNet2DModel
    assert type(pipe.scheduler) is DDPMScheduler
    assert pipe.scheduler.config.variance_type == variance
    for name, value in weights_file(folder).items():
        assert torch.equal(pipe.unet.state_dict()[name], value), name
    ours = pipe(batch_size=3, generator=torch.Generator().manual_seed(5), num_inference_steps=40).images
    assert np.abs(levels(ours) - np.load(out)).max() <= 1


def test_what_is_written_is_what_stock_writes(tmp_path, small_pipeline):
    small_pipeline.save_pretrained(tmp_path / "ours")
    stock_unet = diffusers.UNet2DModel(**SMALL_NETWORK)
    stock_unet.load_state_dict(small_pipeline.unet.state_dict())
    stock_scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    diffusers.DDPMPipeline(stock_unet, stock_scheduler).save_pretrained(tmp_path / "stock")
    ours = sorted(str(p.relative_to(tmp_path / "ours")) for p in (tmp_path / "ours").rglob("*"))
    stock = sorted(str(p.relative_to(tmp_path / "stock")) for p in (tmp_path / "stock").rglob("*"))
    assert ours == stock
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        ours, stock = (json.loads((tmp_path / who / name).read_text()) for who in ("ours", "stock"))
        assert ours == stock


def test_loading_and_saving_again_changes_nothing(tmp_path, small_pipeline):
    small_pipeline.save_pretrained(tmp_path / "one")
    DDPMPipeline.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    index = json.loads((tmp_path / "two" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    one, two = weights_file(tmp_path / "one"), weights_file(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_stock_scheduler_given_to_our_pipeline_becomes_ours(small_unet):
    pipe = DDPMPipeline(small_unet, diffusers.DDPMScheduler(variance_type="fixed_large", num_train_timesteps=100))
    assert type(pipe.scheduler) is DDPMScheduler
    assert pipe.scheduler.config.variance_type == "fixed_large"
    assert pipe.scheduler.config.num_train_timesteps == 100


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_other_schedulers_swap_in(small_pipeline, name):
    scheduler = getattr(diffusers, name).from_config(small_pipeline.scheduler.config)
    pipe = DDPMPipeline(small_pipeline.unet, scheduler)
    pipe.set_progress_bar_config(disable=True)

    def images(pipe, **options):
        generator = torch.Generator().manual_seed(0)
        return pipe(batch_size=2, generator=generator, num_inference_steps=10, output_type="np", **options).images

    ours = images(pipe)
    assert np.isfinite(ours).all()
    if name == "DDIMScheduler":  # the only one of them that has a pipeline of its own for these networks
        stock = diffusers.DDIMPipeline(small_pipeline.unet, scheduler)
        stock.set_progress_bar_config(disable=True)
        assert np.abs(ours - images(stock, use_clipped_model_output=True)).max() < 1e-5
        assert np.abs(images(pipe, eta=0.7) - images(stock, use_clipped_model_output=True, eta=0.7)).max() < 1e-5
        assert np.abs(images(pipe, eta=0.7) - ours).max() > 0.1


def test_no_pickle_is_read(tmp_path, small_pipeline):
    small_pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.rglob("*.bin"))
    with pytest.raises(OSError, match="safetensors"):
        DDPMPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pickle"):
        DDPMPipeline.from_pretrained(tmp_path, use_safetensors=False)


def test_from_pipe_takes_stock_pipelines(small_pipeline):
    parts = {"unet": small_pipeline.unet, "scheduler": diffusers.DDIMScheduler()}
    for stock in (diffusers.DDIMPipeline(**parts), diffusers.DDPMPipeline(parts["unet"], diffusers.DDPMScheduler())):
        pipe = DDPMPipeline.from_pipe(stock)
        assert pipe.unet is small_pipeline.unet
        assert len(pipe(seeds=[0], num_inference_steps=10).images) == 1
    assert type(pipe.scheduler) is DDPMScheduler
    ddim = DDPMPipeline.from_pipe(small_pipeline, scheduler=parts["scheduler"])
    assert type(ddim.scheduler) is diffusers.DDIMScheduler
    with pytest.raises(ValueError, match="no vae"):
        DDPMPipeline.from_pipe(small_pipeline, vae=None)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_samples_the_same_in_stock(run, tmp_path, steps):
    DDPMPipeline(make_small_unet(), DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    config = DistillationConfig(model=str(tmp_path / "teacher"), steps=steps, teacher_steps=4)
    preset = Distillation.load(config).preset
    pipe = DDPMPipeline(make_small_unet(1, _distilled_steps=steps), make_scheduler(preset.unet, preset.scheduler))
    pipe.save_pretrained(tmp_path / "student")
    code = STOCK_SAMPLES.replace("is diffusers.DDPMScheduler", "is diffusers.DDIMScheduler")
    run(code, "DDPMPipeline", str(tmp_path / "student"), str(tmp_path / "images.npy"), str(steps))
    ours = pipe(batch_size=3, generator=torch.Generator().manual_seed(5)).images
    assert np.abs(levels(ours) - np.load(tmp_path / "images.npy")).max() <= 1
