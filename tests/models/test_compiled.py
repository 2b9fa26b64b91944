"""What `torch.compile` makes of the network: one graph without breaks, compiled once. (Dynamo's own counters.)"""

import pytest
import torch
from conftest import make_small_unet
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel
from ddpm_hf.diffusion.objectives import simple_loss
from ddpm_hf.pipelines.inference import InferenceOptions, optimize_for_inference


@pytest.fixture
def counter():
    torch._dynamo.reset()
    counters.clear()
    yield CompileCounter()
    torch._dynamo.reset()


def breaks() -> dict[str, int]:
    return dict(counters["graph_break"])


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 2])], ids=["plain", "classes"])
def test_training_compiles_one_graph_once(counter, labels):
    unet = make_small_unet(**({} if labels is None else {"num_class_embeds": 3}), dropout=0.1)
    network, scheduler = torch.compile(unet.to(memory_format=torch.channels_last), backend=counter), DDPMScheduler()
    given = {} if labels is None else {"class_labels": labels}
    for step in range(4):
        torch.manual_seed(step)
        x_0, noise = torch.randn(2, 2, *unet_shape(unet)).unbind()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = simple_loss(network, scheduler, x_0, torch.randint(0, 1000, (2,)), noise, **given).mean()
        loss.backward()
    assert breaks() == {}
    assert counter.frame_count == 1


def unet_shape(unet: UNet2DModel) -> tuple[int, int, int]:
    return unet.config.in_channels, unet.config.sample_size, unet.config.sample_size


@pytest.mark.parametrize("captured", [False, True])
def test_sampling_compiles_one_graph_per_batch_size(counter, captured, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=counter, **options))
    pipe = DDPMPipeline(make_small_unet(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    optimize_for_inference(pipe, options=InferenceOptions(channels_last=True, compiled=True, captured=captured))
    for batch in (4, 4, 3, 2):  # a smaller last batch takes the code of the others
        pipe(seeds=range(batch), num_inference_steps=3)
    assert breaks() == {}
    assert counter.frame_count == 1
    pipe(seeds=range(1), num_inference_steps=3)  # less than half of it does not
    assert counter.frame_count == 2


def test_the_papers_network_is_one_graph():
    """The CIFAR-10 network, as dynamo explains it (shapes alone, on the meta device)."""
    torch._dynamo.reset()
    with torch.device("meta"):
        unet = UNet2DModel.from_preset("cifar10")
        explained = torch._dynamo.explain(unet)(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_weights_are_cast_to_bf16_once_per_pass():
    """Autocast's casts in the graphs of a pass: one per weight forward, none backward, where the casts are kept."""
    casts: dict[str, list[int]] = {}

    def recorder(name):
        def compile(graph, inputs):
            weights = [node for node in graph.graph.find_nodes(op="placeholder") if is_weight(node.meta["val"])]
            casts[name] = [sum(casts_to_bf16(user) for user in node.users) for node in weights]
            return make_boxed_func(graph)

        return compile

    def is_weight(value):
        return isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[2:] == (3, 3)

    def casts_to_bf16(node):
        return isinstance(made := node.meta.get("val"), torch.Tensor) and made.dtype == torch.bfloat16

    unet = make_small_unet()
    network = torch.compile(unet, backend=aot_autograd(fw_compiler=recorder("forward"), bw_compiler=recorder("back")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(torch.randn(2, *unet_shape(unet)), torch.tensor([3, 4])).sample.float().square().mean().backward()
    wide = sum(module.kernel_size == (3, 3) for module in unet.modules() if isinstance(module, torch.nn.Conv2d))
    assert casts["forward"] == [1] * wide
    assert sum(casts["back"]) == 0
