"""A run that cannot fit into memory is a sentence; what it keeps is compared with PyTorch's profiler."""

import psutil
import pytest
import torch
from torch.profiler import profile

from ddpm_hf import UNet2DModel, cli
from ddpm_hf.models.unet_2d import use_plain_attention
from ddpm_hf.training import memory
from ddpm_hf.training.memory import activation_bytes
from ddpm_hf.utils import machine


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("digits", {}), ("digits", {"num_class_embeds": 10, "dropout": 0.3}), ("cifar10", {"sample_size": 16})],
)
def test_activations_are_those_that_pytorch_allocates(preset, changes):
    with torch.device("meta"):
        empty = UNet2DModel.from_preset(preset, **changes)
    unet, config = UNet2DModel.from_preset(preset, **changes), empty.config
    use_plain_attention(unet)
    x_t, t = torch.randn(2, config.in_channels, config.sample_size, config.sample_size), torch.zeros(2).long()
    with profile(profile_memory=True) as profiler:
        output = unet(x_t, t, t if config.num_class_embeds else None).sample
    allocated = sum(event.self_cpu_memory_usage for event in profiler.key_averages()) - output.nbytes
    # the profiler does not see the images, which are kept too
    assert activation_bytes(empty, 2) == pytest.approx(allocated + x_t.nbytes, rel=0.01)


# CIFAR-10's network has 35.7 million parameters (Ho et al. 2020, Section 4): 142.98 MB in float32, seven times that is
# 1.00 GB, and five times 0.715 GB.
COUNTED = "1 GB for weights, gradients, Adam and averages of 35,746,307 parameters"


@pytest.mark.parametrize(
    ("free", "flags", "sentence"),
    [
        (0.3e9, [], f"takes at least {COUNTED}, and this machine has 0.3 GB for it; train a smaller network"),
        (0.8e9, [], f"{COUNTED}, and this machine has 0.8 GB for it; --posthoc_ema false needs 0.715 GB of it"),
        (0.8e9, ["--posthoc_ema", "false"], "with micro-batches of 128 images (0.715 GB for weights"),
        (2.0e9, [], "this machine has 2 GB for it; give --train_batch_size 16 or less, or --gradient_checkpointing"),
        (0.9e9, ["--posthoc_ema", "false", "--train_batch_size", "8"], "give --train_batch_size 4 or less, or --grad"),
        (0.6e9, ["--posthoc_ema", "false", "--gradient_checkpointing"], "takes at least 0.715 GB for weights"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_too_little_memory_is_a_sentence_before_anything_is_read(
    free, flags, sentence, dry_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "obtainable_memory", lambda device: (int(free), "this machine"))
    images = ["--train_data_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "run")]
    assert cli.main(["train", *images, *flags, *["--dry_run"] * dry_run]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_container_has_its_own_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "Path", lambda *parts: tmp_path / parts[-1])
    (there, _) = machine.obtainable_memory(torch.device("cpu"))
    assert 0 < there <= psutil.virtual_memory().total + psutil.swap_memory().total
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.obtainable_memory(torch.device("cpu"))[0] > 10**8
    (tmp_path / "memory.max").write_text("100000000\n")
    assert machine.obtainable_memory(torch.device("cpu")) == (10**8, "this machine")


def test_processes_of_a_machine_share_its_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(memory, "obtainable_memory", lambda device: (int(3e9), "this machine"))
    images = ["--train_data_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "run")]
    assert cli.main(["train", *images, "--gradient_checkpointing"]) == 2
    assert f"{COUNTED}, and this machine has 0.75 GB for each process" in capsys.readouterr().err
