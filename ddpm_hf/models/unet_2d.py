"""The paper's network: `diffusers.UNet2DModel` with the official code's initialisation and presets."""

from __future__ import annotations

import json
from functools import wraps
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
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
        """The configuration as JSON, as stock's but for `_name_or_path`."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class UNet2DModel(PortableConfigMixin, PrivateByDefault, StockUNet2DModel):
    """The U-Net of Ho et al. 2020 (Appendix B), starting from the official initialisation.

    Arguments, their defaults, state-dict keys and the saved configuration are stock's, and so is the output for the
    same weights; `from_preset` has the paper's architectures. Beyond stock:

    - Convolutions and linear layers start from fan-avg uniform weights and zero biases; the last layer of every
      residual block, every attention block and the network itself starts at 1e-10, so a fresh network's output is
      nearly 0. Nothing is drawn where weights are about to be loaded.
    - Images that cannot be halved often enough are refused with a sentence instead of failing inside. (`sample_size`
      alone is not: a network says 28 and runs at 32.)

    Raises:
        ValueError: Blocks and widths that do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        # All arguments are handed on: stock's decorated __init__ writes the configuration once more from them.
        try:
            super().__init__(**arguments)
        except ValueError as error:
            for width in block_out_channels:
                if norm_num_groups is not None and width % norm_num_groups:
                    raise UserError(
                        f"block_out_channels={tuple(block_out_channels)} must be multiples of "
                        f"norm_num_groups={norm_num_groups}, and {width} is not"
                    ) from error
            raise
        self.__module__ = StockUNet2DModel.__module__  # what pipelines record as the component's library
        self._initialize()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As stock's, but a network of which weights are missing is refused; stock leaves them random.

        Raises:
            UserError: The files hold nothing for some of the weights; names one.
        """
        told = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if missing := sorted(info.get("missing_keys", ())):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"the weights of {str(pretrained_model_name_or_path)!r} do not fit its config.json: they have no "
                f"{missing[0]}{more}"
            )
        return (model, info) if told else model

    @wraps(StockUNet2DModel.save_pretrained, assigned=())  # stock looks at the arguments
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As stock's; what `push_to_hub=True` publishes is private unless `private=False`."""
        if kwargs.get("push_to_hub"):
            kwargs = private_options(save_directory, kwargs)
            save_directory = str(save_directory)  # stock splits it
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> UNet2DModel:
        """A fresh network of one of the paper's experiments (`presets.py`), with some arguments replaced.

        Raises:
            ValueError: Unknown preset, or overrides that do not fit.
        """
        return cls(**{**get_preset(name).unet, **overrides})

    def _initialize(self) -> None:
        """The official code's initialisation: fan-avg uniform is Glorot's, and scale s is its gain sqrt(s).

        Goes through `torch.nn.init`, which diffusers switches off while it loads weights.
        """
        last = {id(self.conv_out)}
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                last.add(id(module.conv2))
            elif isinstance(module, Attention):
                last.add(id(module.to_out[0]))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                gain = _NEAR_ZERO**0.5 if id(module) in last else 1.0
                nn.init.xavier_uniform_(module.weight, gain=gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor, ...]:
        """The prediction for a batch of noisy images, as stock's.

        Args:
            sample: x_t, `[B, in_channels, H, W]`.
            timestep: int, 0-d or `[B]`.
            class_labels: `[B]`, for networks with `num_class_embeds`.
            return_dict: `False` gives a tuple.

        Returns:
            `.sample`, `[B, out_channels, H, W]`.

        Raises:
            ValueError: A size that cannot be halved often enough, a wrong number of channels or of timesteps.
        """
        # of the layer, which users replace by one with other channels and leave the configuration as it was
        channels = getattr(self.conv_in, "in_channels", self.config.in_channels)
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise UserError(f"expected images of shape [B, {channels}, H, W], got {list(sample.shape)}")
        check_size(self, *sample.shape[2:])
        if isinstance(timestep, Tensor) and timestep.ndim and timestep.shape not in ((1,), sample.shape[:1]):
            raise UserError(
                f"timestep must be one number, or one per image: got shape {tuple(timestep.shape)} for a batch of "
                f"{len(sample)}"
            )
        return super().forward(sample, timestep, class_labels, return_dict)


def not_finite_weight(network: nn.Module) -> str | None:
    """The name of the first weight that holds NaN or infinity, or `None`."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            return name
    return None


def check_weights(network: nn.Module) -> None:
    """Refuse a network whose output can only be NaN.

    Raises:
        NotFiniteError: A weight holds NaN or infinity; names it, and what may help.
    """
    if (name := not_finite_weight(network)) is not None:
        hint = (
            ", or load it in float32 or bfloat16 if it is" if next(network.parameters()).dtype == torch.float16 else ""
        )
        raise NotFiniteError(
            f"the network's weights {name} hold NaN or infinity; take an intact copy of the model{hint}"
        )


def check_size(network: StockUNet2DModel, height: int, width: int) -> None:
    """Check that images of this size can be halved as often as the network, stock's too, does it.

    Raises:
        ValueError: They cannot.
    """
    factor = 2 ** sum(getattr(block, "downsamplers", None) is not None for block in network.down_blocks)
    for size in (height, width):
        if size % factor or size < factor:
            below = max(size // factor, 1) * factor
            raise UserError(
                f"an image of {height}x{width} cannot be halved {factor.bit_length() - 1} time(s) as this network "
                f"does; use a multiple of {factor}, for example {below} or {below + factor}, or fewer "
                "block_out_channels"
            )


def use_plain_attention(network: nn.Module) -> None:
    """Attention as two matrix products: on CPUs faster than PyTorch's fused kernel at the paper's 16 x 16 positions.

    The results differ by rounding only. Nothing is changed that is saved.
    """
    for module in network.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def parameter_count(unet: torch.nn.Module) -> int:
    """How many weights the network has, as the paper counts them."""
    return sum(p.numel() for p in unet.parameters())
