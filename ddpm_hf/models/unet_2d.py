"""The paper's network: `diffusers.UNet2DModel` with the official code's initialisation and presets."""

from __future__ import annotations

import json
from functools import wraps
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel as StockUNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ..presets import get_preset
from ..utils.errors import NotFiniteError, UserError
from ..utils.hub_errors import PrivateByDefault, private_options

# `variance_scaling(scale=1e-10)` stands in for zero in the official code (nn.py, default_init).
_NEAR_ZERO = 1e-10


class PortableConfigMixin:
    """Keeps where something was loaded from (`_name_or_path`, often a local path) out of what is saved."""

    def to_json_string(self) -> str:
        """Return the configuration as JSON, as stock's but for `_name_or_path`."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class UNet2DModel(PortableConfigMixin, PrivateByDefault, StockUNet2DModel):
    """The U-Net of Ho et al. 2020 (Appendix B), starting from the official initialisation.

    Arguments, their defaults, state-dict keys and the saved configuration are stock's, and so is the output for the
    same weights; `from_preset` has the paper's architectures. A fresh network's output is nearly 0. Images that cannot
    be halved often enough are refused with a sentence (but not a `sample_size`: a network says 28 and runs at 32).

    Raises:
        ValueError: Blocks and widths that do not fit together.
    """

    # with stock's signature, from which diffusers reads the configuration
    @wraps(StockUNet2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any):
        try:
            super().__init__(*args, **kwargs)
        except ValueError as error:
            groups = self.config.norm_num_groups
            for width in self.config.block_out_channels:
                if groups is not None and width % groups:
                    widths = f"block_out_channels={tuple(self.config.block_out_channels)}"
                    message = f"{widths} must be multiples of norm_num_groups={groups}, and {width} is not"
                    raise UserError(message) from error
            raise
        self.__module__ = StockUNet2DModel.__module__  # what pipelines record as the component's library
        self._initialize()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a network as stock does; raise a UserError where weights are missing, which stock leaves random."""
        told = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if missing := sorted(info.get("missing_keys", ())):
            more = f"{missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}"
            name = str(pretrained_model_name_or_path)
            raise UserError(f"the weights of {name!r} do not fit its config.json: they have no {more}")
        return (model, info) if told else model

    @wraps(StockUNet2DModel.save_pretrained, assigned=())  # stock looks at the arguments
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the network as stock does; what `push_to_hub=True` publishes is private unless `private=False`."""
        if kwargs.get("push_to_hub"):
            kwargs = private_options(save_directory, kwargs)
            save_directory = str(save_directory)  # stock splits it
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> UNet2DModel:
        """Return a fresh network of one of the paper's experiments (`presets.py`), with some arguments replaced."""
        return cls(**{**get_preset(name).unet, **overrides})

    def _initialize(self) -> None:
        """Draw the official code's initial weights, by `torch.nn.init`: diffusers switches it off while it loads."""
        # fan-avg uniform is Glorot's, and scale s is its gain sqrt(s); biases are 0
        blocks = [module.conv2 for module in self.modules() if isinstance(module, ResnetBlock2D)]
        attention = [module.to_out[0] for module in self.modules() if isinstance(module, Attention)]
        last = {id(layer) for layer in (*blocks, *attention, self.conv_out)}
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                gain = _NEAR_ZERO**0.5 if id(module) in last else 1.0
                nn.init.xavier_uniform_(module.weight, gain=gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor, ...]:
        """Return the prediction for noisy images `[B, in_channels, H, W]` as `.sample`, `[B, out_channels, H, W]`.

        `timestep` is an int, 0-d or `[B]`; `class_labels` are `[B]`, for networks with `num_class_embeds`. A size that
        cannot be halved often enough, or a wrong number of channels or timesteps, raises a `ValueError`.
        """
        # of the layer, which users replace by one with other channels and leave the configuration as it was
        channels = getattr(self.conv_in, "in_channels", self.config.in_channels)
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise UserError(f"expected images of shape [B, {channels}, H, W], got {list(sample.shape)}")
        check_size(self, *sample.shape[2:])
        if isinstance(timestep, Tensor) and timestep.ndim and timestep.shape not in ((1,), sample.shape[:1]):
            got = f"got shape {tuple(timestep.shape)} for a batch of {len(sample)}"
            raise UserError(f"timestep must be one number, or one per image: {got}")
        return super().forward(sample, timestep, class_labels, return_dict)


def check_weights(network: nn.Module) -> None:
    """Raise a NotFiniteError where a weight holds NaN or infinity: the network's output could only be NaN."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            half = next(network.parameters()).dtype == torch.float16
            hint = ", or load it in float32 or bfloat16 if it is" if half else ""
            what = f"the network's weights {name} hold NaN or infinity"
            raise NotFiniteError(f"{what}; take an intact copy of the model{hint}")


def check_size(
    network: StockUNet2DModel, height: int, width: int, otherwise: str = ", or fewer block_out_channels"
) -> None:
    """Raise a `ValueError` unless images of this size can be halved as often as the network, stock's too, does it.

    `otherwise` is the end of its advice, after sizes that can be.
    """
    factor = 2 ** sum(getattr(block, "downsamplers", None) is not None for block in network.down_blocks)
    for size in (height, width):
        if size % factor or size < factor:
            below = max(size // factor, 1) * factor
            sizes = f"{below} or {below + factor}"
            what = f"an image of {height}x{width} cannot be halved {factor.bit_length() - 1} time(s)"
            advice = f"use a multiple of {factor}, for example {sizes}{otherwise}"
            raise UserError(f"{what} as this network does; {advice}")


def use_plain_attention(network: nn.Module) -> None:
    """Compute attention as two matrix products: on CPUs faster than PyTorch's fused kernel at 16 x 16 positions."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def parameter_count(unet: torch.nn.Module) -> int:
    """Return how many weights the network has, as the paper counts them."""
    return sum(p.numel() for p in unet.parameters())
