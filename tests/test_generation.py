"""Seeds to files."""

import numpy as np
import pytest
import torch
from conftest import make_small_unet
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.generation import class_sequence, generate, parse_seeds, with_sampler, write_samples


def test_seed_lists():
    assert parse_seeds("0-3") == [0, 1, 2, 3]
    assert parse_seeds("7") == [7]
    assert parse_seeds("5, 8-10,2") == [5, 8, 9, 10, 2]
    for wrong in ("", "a", "1-", "-1", "3-1", "1,,2", "1,1", "0.5"):
        with pytest.raises(ValueError, match=r"seed|range"):
            parse_seeds(wrong)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batches_do_not_change_images(small_pipeline, batch_size):
    def images(size):
        parts = list(generate(small_pipeline, range(7), batch_size=size, num_inference_steps=10))
        assert [seed for seeds, _ in parts for seed in seeds] == list(range(7))
        return torch.cat([part for _, part in parts])

    difference = (images(batch_size).int() - images(4).int()).abs().max()
    assert difference <= 1


def test_a_folder_is_continued(tmp_path, small_pipeline):
    options = {"num_inference_steps": 5}
    assert write_samples(small_pipeline, [0, 1, 1000], tmp_path / "out", **options) == 3
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    assert files == ["00000/00000000.png", "00000/00000001.png", "00001/00001000.png"]
    untouched = (tmp_path / "out" / files[0]).stat().st_mtime_ns
    assert write_samples(small_pipeline, [0, 1, 2, 1000], tmp_path / "out", **options) == 1
    assert (tmp_path / "out" / files[0]).stat().st_mtime_ns == untouched


def test_files_hold_what_the_pipeline_draws(tmp_path, small_pipeline):
    expected = small_pipeline(seeds=[4, 5], num_inference_steps=5).images
    write_samples(small_pipeline, [4, 5], tmp_path / "x.npz", num_inference_steps=5)
    write_samples(small_pipeline, [4, 5], tmp_path / "x", num_inference_steps=5)
    array = np.load(tmp_path / "x.npz", allow_pickle=False)["arr_0"]
    assert array.dtype == np.uint8
    for row, seed in enumerate((4, 5)):
        assert np.array_equal(array[row, ..., 0], np.asarray(expected[row]))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "x" / "00000" / f"{seed:08d}.png")), array[row, ..., 0])
    assert not list(tmp_path.rglob("*.partial"))


def test_samplers(small_pipeline):
    assert with_sampler(small_pipeline, "ddpm") is small_pipeline
    ddim = with_sampler(small_pipeline, "ddim")
    assert type(ddim.scheduler).__name__ == "DDIMScheduler"
    assert ddim.unet is small_pipeline.unet
    with pytest.raises(ValueError, match="'euler'"):
        with_sampler(small_pipeline, "euler")


def test_a_folder_of_other_images_is_not_mixed(tmp_path, small_pipeline):
    write_samples(small_pipeline, [0, 1], tmp_path / "out", num_inference_steps=5)
    with pytest.raises(ValueError, match="other num_inference_steps"):
        write_samples(small_pipeline, [0, 2], tmp_path / "out", num_inference_steps=6)
    with torch.no_grad():
        small_pipeline.unet.conv_out.bias.add_(1)
    with pytest.raises(ValueError, match="other weights"):
        write_samples(small_pipeline, [0, 2], tmp_path / "out", num_inference_steps=5)


def test_classes_by_name_and_number_in_turn():
    pipe = DDPMPipeline(make_small_unet(num_class_embeds=3, _class_names=["cats", "dogs"]), DDPMScheduler())
    assert class_sequence(pipe, "cats, 1", 3) == [0, 1, 0]
    assert class_sequence(pipe, None, 3) is None
    with pytest.raises(ValueError, match="'cows' is no class of this network; it has cats, dogs"):
        class_sequence(pipe, "cows", 1)
