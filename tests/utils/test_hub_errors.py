"""One sentence for what goes wrong on the way to the Hub, and whether waiting can help."""

import json
import shutil

import httpx2
import pytest
import torch
from conftest import DIGITS_MODEL
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ddpm_hf import DDPMPipeline
from ddpm_hf.utils import hub_errors

MODEL = DIGITS_MODEL


def answered(status: int) -> HfHubHTTPError:
    request = httpx2.Request("GET", "http://127.0.0.1/x")
    return HfHubHTTPError("an answer", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "passing"),
    [(answered(status), True) for status in (408, 412, 429, 500, 502, 503, 504)]
    + [(answered(status), False) for status in (400, 401, 403, 404)]
    + [(httpx2.ReadTimeout("slow"), True), (httpx2.RemoteProtocolError("cut"), True), (ConnectionResetError(), True)]
    + [(OfflineModeIsEnabled("off"), False), (ValueError("a mistake"), False), (OSError("disk full"), False)],
)
def test_what_may_be_over_soon(error, passing):
    assert hub_errors.is_passing(error) is passing
    wrapped = OSError("something else")
    wrapped.__cause__ = error
    assert hub_errors.is_passing(wrapped) is passing


def test_passing_failures_are_waited_out_and_others_are_not(monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)

    def failing(*errors):
        left = list(errors)

        def call():
            if left:
                raise left.pop(0)
            return "done"

        return call

    assert hub_errors.retried(failing(answered(503), httpx2.ReadTimeout("slow")), "org/m") == "done"
    assert waited == [1, 2]
    for error in (answered(403), httpx2.ConnectError("refused"), LocalEntryNotFoundError("not here")):
        with pytest.raises(OSError, match=r"org/m|no answer"):
            hub_errors.retried(failing(error), "org/m")
    with pytest.raises(OSError, match="the Hub answered 503"):
        hub_errors.retried(failing(*[answered(503)] * 3), "org/m")
    with pytest.raises(KeyError):  # a bug is no matter of the network
        hub_errors.retried(failing(KeyError("bug")), "org/m")
    assert waited == [1, 2, 1, 2]


def test_folders_that_hold_no_ddpm(tmp_path):
    with pytest.raises(OSError, match="no model_index"):
        DDPMPipeline.from_pretrained(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match="is not a JSON object"):
            DDPMPipeline.from_pretrained(tmp_path)
    index = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIM"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(ValueError, match=r"holds a LDMPipeline .*vqvae: VQModel.*, not a DDPM"):
        DDPMPipeline.from_pretrained(tmp_path)
    with pytest.raises(
        OSError, match=r"nor is it in the cache, and the network is switched off .HF_HUB_OFFLINE is set"
    ):
        DDPMPipeline.from_pretrained("org/m")


def test_a_component_that_is_given_need_not_be_there(tmp_path):
    pipe = DDPMPipeline.from_pretrained(MODEL)
    shutil.copytree(MODEL, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "unet")
    again = DDPMPipeline.from_pretrained(tmp_path / "m", unet=pipe.unet)
    assert again.unet is pipe.unet


@pytest.mark.parametrize("word", [True, None])
def test_no_pickle_is_read_in_place_of_safetensors(tmp_path, small_pipeline, word):
    """`None` would let diffusers fall back to them."""
    small_pipeline.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(small_pipeline.unet.state_dict(), tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="has no safetensors weights"):
        DDPMPipeline.from_pretrained(tmp_path, use_safetensors=word)
    with pytest.raises(ValueError, match="would read a pickle"):
        DDPMPipeline.from_pretrained(tmp_path, use_safetensors=False)
