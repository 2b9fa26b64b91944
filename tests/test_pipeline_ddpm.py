"""Sampling: the same images as stock's pipeline, one image per seed, and bad arguments."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import make_small_unet

from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel


def arrays(pipe, **options):
    return pipe(num_inference_steps=20, output_type="np", **options).images


def test_same_images_as_stock_for_the_same_generator(small_pipeline):
    stock = diffusers.DDPMPipeline(small_pipeline.unet, diffusers.DDPMScheduler(variance_type="fixed_large"))
    stock.set_progress_bar_config(disable=True)
    for generators in (1, 3):
        made = [torch.Generator().manual_seed(i) for i in range(generators)]
        again = [torch.Generator().manual_seed(i) for i in range(generators)]
        ours = arrays(small_pipeline, batch_size=3, generator=made if generators > 1 else made[0])
        theirs = arrays(stock, batch_size=3, generator=again if generators > 1 else again[0])
        assert np.abs(ours - theirs).max() < 1 / 255


def test_an_image_depends_on_its_own_seed_only(small_pipeline):
    four = arrays(small_pipeline, seeds=[7, 8, 9, 10])
    for row, seed in enumerate([7, 8, 9, 10]):
        alone = arrays(small_pipeline, seeds=[seed])[0]
        # Convolutions may round differently for another batch size, by far less than a grey level.
        assert np.abs(four[row] - alone).max() < 1e-4
    assert np.abs(four[0] - four[1]).max() > 0.1


def test_dropout_is_off_while_sampling_and_the_mode_comes_back(small_pipeline):
    unet = UNet2DModel(**{**small_pipeline.unet.config, "dropout": 0.5})
    unet.load_state_dict(small_pipeline.unet.state_dict())
    pipe = DDPMPipeline(unet.train(), small_pipeline.scheduler)
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(arrays(pipe, seeds=[0]), arrays(small_pipeline, seeds=[0]))
    assert unet.training


def test_default_steps_are_the_whole_chain(small_unet):
    pipe = DDPMPipeline(small_unet, DDPMScheduler(num_train_timesteps=30))
    pipe.set_progress_bar_config(disable=True)
    pipe(seeds=[0])
    assert len(pipe.scheduler.timesteps) == 30


def test_output_types(small_pipeline):
    pil = small_pipeline(seeds=[0, 1], num_inference_steps=5).images
    assert [image.size for image in pil] == [(8, 8), (8, 8)]
    pt = small_pipeline(seeds=[0, 1], num_inference_steps=5, output_type="pt", return_dict=False)[0]
    assert pt.shape == (2, 1, 8, 8)
    assert 0 <= pt.min() <= pt.max() <= 1
    assert np.array_equal(np.asarray(pil[0]), (pt[0, 0] * 255).round().byte().numpy())


def test_a_bf16_network_keeps_a_float32_chain(small_pipeline):
    full = arrays(small_pipeline, seeds=[0])
    low = arrays(small_pipeline.to(torch.bfloat16), seeds=[0])
    assert low.dtype == np.float32
    assert len(np.unique(low)) > 30  # bf16 pixels near 1 would fall on few values
    assert np.abs(full - low).mean() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"output_type": "latent"}, "'latent'"),
        ({"seeds": [1], "generator": torch.Generator()}, "not both"),
        ({"seeds": [1, 2], "batch_size": 3}, "2 seeds"),
        ({"batch_size": 3, "generator": [torch.Generator()]}, "got 1 generators"),
        ({"num_inference_steps": 0}, "got 0"),
        ({"num_inference_steps": 1001}, "1001"),
    ],
)
def test_bad_arguments(small_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        small_pipeline(**options)


def test_a_learned_variance_is_dropped_by_samplers_that_have_none():
    unet = make_small_unet(out_channels=2)
    learned = DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range"))
    plain = make_small_unet()
    plain.load_state_dict(
        {
            **unet.state_dict(),
            **{f"conv_out.{name}": unet.state_dict()[f"conv_out.{name}"][:1] for name in ("weight", "bias")},
        }
    )
    for scheduler in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
        images = []
        for network in (unet, plain):
            pipe = DDPMPipeline(network, scheduler.from_config(learned.scheduler.config))
            pipe.set_progress_bar_config(disable=True)
            images.append(arrays(pipe, seeds=[0]))
        assert np.abs(images[0] - images[1]).max() < 1e-4
