"""The paper's recipes as data: one frozen dataclass per experiment.

Every value stands beside the sentence or table of Ho et al. 2020 (arXiv 2006.11239; Section 4 and Appendix B), or the
line of the official code (hojonathanho/diffusion), that it comes from. Where the two disagree, the comment says so.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .utils.errors import UserError
from .utils.text import nearest

# What the settings of a recipe that are names can be.
CHOICES = {
    "lr_scheduler": ("constant", "cosine", "linear"),
    "timestep_sampling": ("uniform", "stratified"),
    "loss": ("simple", "vlb", "hybrid"),
}
# Names of samplers; `sampling.generation` has their schedulers.
SAMPLERS = ("ddpm", "ddim", "dpmsolver++", "unipc", "heun", "deis", "sa_solver")


@dataclass(frozen=True)
class Preset:
    """One experiment: network, diffusion process and training recipe; Adam(0.9, 0.999) without weight decay."""

    name: str  # what `from_preset` and `--preset` take
    source: str  # where in the paper the experiment is
    unet: Mapping[str, Any]  # of `UNet2DModel`, written out in full where stock's default differs
    scheduler: Mapping[str, Any]  # of `DDPMScheduler`
    total_batch_size: int  # images per optimizer update, over all processes and accumulation steps
    learning_rate: float  # its peak
    max_train_steps: int  # optimizer updates
    lr_warmup_steps: int = 5000  # updates of linear warm-up from 0; run_cifar.py, run_lsun.py: warmup=5000
    lr_scheduler: str = "constant"  # after the warm-up, or `cosine` or `linear` to 0 (short runs)
    max_grad_norm: float = 1.0  # global norm, above which gradients are scaled down; only the code: grad_clip=1.
    ema_decay: float = 0.9999  # "EMA on model parameters with a decay factor of 0.9999"
    # `True`: min(ema_decay, (1 + n) / (10 + n)) after n updates, which short runs need
    ema_warmup: bool = False
    random_flip: bool = True  # with probability 1/2: "for CIFAR10"; "for all other datasets except LSUN Bedroom"
    # Algorithm 1, or `stratified`: one t from each of B equal parts of 0..T-1 (the same expectation, less variance)
    timestep_sampling: str = "uniform"
    loss: str = "simple"  # Eq. 14; or `vlb` (Eq. 12 weights), or `hybrid` (Nichol & Dhariwal 2021)
    dataset: str | None = None  # what `--dataset` means by default; `None` where the data must be named
    # What the paper measured, by the names of an evaluation's numbers: `(value,)`, and for Inception scores
    # `(mean, standard deviation over ten parts)`. Bits/dim are upper bounds.
    paper: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("unet", "scheduler", "paper"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


# What the official network (models/unet.py) needs of stock's UNet2DModel. Where stock's default is something else, it
# moves the output of a network with the official weights by the share given.
OFFICIAL_NETWORK: dict[str, Any] = {
    "downsample_padding": 0,  # TensorFlow's SAME padding for stride 2 pads right and below only; stock: 50 %
    "attention_head_dim": None,  # one attention head over all channels; stock: 6.4 %
    "flip_sin_to_cos": False,  # the sinusoidal embedding is (sin, cos); stock: 6.1 %
    "freq_shift": 1,  # and its frequencies divide by (dim/2 - 1); stock: 4.4 %
    "norm_eps": 1e-6,  # tf.contrib group_norm's default; stock: 8e-5
    "norm_num_groups": 32,  # as in stock
    "layers_per_block": 2,  # "two convolutional residual blocks per resolution level", as in stock
}

# "We set T = 1000 for all experiments"; "constants increasing linearly from beta_1 = 10^-4 to beta_T = 0.02".
PAPER_PROCESS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": True,  # p_sample: clip_denoised=True
}


def _network(sample_size: int, widths: tuple[int, ...], attention_resolution: int, **more: Any) -> dict[str, Any]:
    """Return UNet2DModel arguments with "self-attention blocks at [...] 16 x 16", or at another resolution."""
    attends = [sample_size >> level == attention_resolution for level in range(len(widths))]
    return {
        **OFFICIAL_NETWORK,
        "sample_size": sample_size,
        "block_out_channels": widths,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        **more,
    }


def _image256(name: str, source: str, steps: int, ch: int = 128, fid: float | None = None, **more: Any) -> Preset:
    """Return a 256 x 256 experiment; run_lsun.py 'unet2d16b2c112244': six resolutions, ch_mult=(1, 1, 2, 2, 4, 4)."""
    return Preset(
        name,
        source,
        # dropout: "on the other datasets to zero without sweeping"
        _network(256, (ch, ch, 2 * ch, 2 * ch, 4 * ch, 4 * ch), 16, dropout=0.0),
        {**PAPER_PROCESS, "variance_type": "fixed_small"},  # the scripts sample with the posterior variance
        total_batch_size=64,  # "64 for larger images"
        learning_rate=2e-5,  # "we lowered it to 2 x 10^-5 for the 256 x 256 images"
        max_train_steps=steps,
        # Table 3, by the code of StyleGAN2 (Appendix B), which takes uint8 pixel values
        paper={} if fid is None else {"fid_inception_train_uint8": (fid,)},
        **more,
    )


def _cifar10(
    name: str,
    source: str,
    paper: Mapping[str, tuple[float, ...]],
    prediction_type: str = "epsilon",
    loss: str = "simple",
    variance_type: str = "fixed_large",  # run_cifar.py: model_var_type='fixedlarge'
) -> Preset:
    """Return a CIFAR-10 experiment; they differ in what is predicted, in the loss and in the reverse variance.

    run_cifar.py 'unet2d16b2': ch=128, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,); "35.7 million parameters".
    """
    # A learned variance ("L, learned diagonal") has an output of its own for every value, its logarithm.
    outputs = {"out_channels": 6} if variance_type == "learned" else {}
    return Preset(
        name,
        source,
        _network(32, (128, 256, 256, 256), 16, dropout=0.1, **outputs),  # "on CIFAR10 to 0.1 by sweeping"
        {**PAPER_PROCESS, "prediction_type": prediction_type, "variance_type": variance_type},
        total_batch_size=128,  # "128 for CIFAR10"
        learning_rate=2e-4,  # "2 x 10^-4 without any sweeping"
        max_train_steps=800_000,  # Section 4 / Appendix B: "800k steps"
        loss=loss,
        dataset="cifar10",
        paper=paper,
    )


def _ablation(name: str, prediction_type: str, loss: str, variance_type: str, *numbers: tuple[float, ...]) -> Preset:
    """Return a row of Table 2, from its numbers; where there are none, training was unstable."""
    names = ("is_inception_float", "fid_inception_train_float", "bits_per_dim", "bits_per_dim_train")
    predicted = "mu_tilde" if prediction_type == "posterior_mean" else prediction_type
    bound = "L, learned diagonal variance" if variance_type == "learned" else "L, fixed isotropic variance"
    source = f"{predicted} prediction, {bound if loss == 'vlb' else 'unweighted squared error'}"
    source += "" if numbers else "; without numbers, because training was unstable"
    source = f"{'Tables 1 and 2' if len(numbers) == 4 else 'Table 2'}: {source}"
    paper = dict(zip(names, numbers, strict=False))
    return _cifar10(f"cifar10_ablation_{name}", source, paper, prediction_type, loss, variance_type)


_CIFAR10 = _cifar10(
    "cifar10",
    "Tables 1 and 2, L_simple; run_cifar.py",
    # Table 1, last row, and Table 2; the FID against the test set, rate, distortion and RMSE: Section 4.1 and 4.3;
    # L_T: Section 4.
    {
        "is_inception_float": (9.46, 0.11),
        "fid_inception_train_float": (3.17,),
        "fid_inception_test_float": (5.24,),
        "bits_per_dim": (3.75,),
        "bits_per_dim_train": (3.72,),
        "rate_bpd": (1.78,),
        "distortion_bpd": (1.97,),
        "rmse": (0.95,),
        "prior_bpd": (1e-5,),
    },
)

# The paper's network and process, for minutes on one GPU (`--max_train_minutes`): what long training does not need.
# docs/training.md has what short runs of a small network say about these values, with three seeds.
_CIFAR10_FAST = dataclasses.replace(
    _CIFAR10,
    name="cifar10_fast",
    source="not in the paper: its CIFAR-10 network, trained for minutes instead of days",
    unet={**_CIFAR10.unet, "dropout": 0.0},  # 0.1 is against overfitting in 2000 epochs; here there are some 50
    learning_rate=4e-4,  # twice the paper's, because it is there for a moment and then falls to 0
    lr_warmup_steps=500,
    lr_scheduler="cosine",
    max_train_steps=40_000,  # a limit, beside that of time
    ema_decay=0.9995,  # an average over 2000 updates,
    ema_warmup=True,  # and in short runs over a ninth of those made so far
    timestep_sampling="stratified",
    paper={},
)

_ALL = (
    Preset(
        "digits",
        "not in the paper: the smallest real task, for a first look and for tests",
        # 8x8 grey images. Every value was chosen by measuring what two to three minutes on two cores can do
        # (docs/digits.md); attention is in the middle block only.
        _network(8, (48, 48), 0, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8, dropout=0.0),
        {**PAPER_PROCESS, "variance_type": "fixed_large"},
        total_batch_size=64,
        learning_rate=3e-3,
        lr_warmup_steps=100,
        lr_scheduler="cosine",
        max_train_steps=2500,
        ema_decay=0.998,
        ema_warmup=True,
        random_flip=False,
        timestep_sampling="stratified",
        dataset="digits",
    ),
    _CIFAR10,
    _CIFAR10_FAST,
    # Table 2, whose last row is `cifar10`: what is predicted, the loss, the reverse variance; Inception score, FID.
    _ablation("mu_learned", "posterior_mean", "vlb", "learned", (7.28,), (23.69,)),
    _ablation("mu_fixed", "posterior_mean", "vlb", "fixed_large", (8.06,), (13.22,)),
    _ablation("mu_mse", "posterior_mean", "simple", "fixed_large"),
    _ablation("epsilon_learned", "epsilon", "vlb", "learned"),
    # and bits/dim of the test and training sets: Table 1
    _ablation("epsilon_fixed", "epsilon", "vlb", "fixed_large", (7.67, 0.13), (13.51,), (3.70,), (3.69,)),
    # Update counts from Appendix B; 114 million parameters each.
    _image256("celebahq256", "Figure 1, Appendix B", 500_000),
    # Flips: paper and code disagree (run_lsun.py flips bedrooms by default and has --randflip 0 in its cat command).
    # The paper is followed: bedrooms are not flipped, cats are.
    _image256("lsun_bedroom256", "Table 3, Appendix B", 2_400_000, fid=6.36, random_flip=False),
    # "approximately 256 million parameters by increasing filter count": the width 192 is inferred from that count;
    # the released code has only 128.
    _image256("lsun_bedroom256_large", "Table 3, Appendix B", 1_150_000, ch=192, fid=4.90, random_flip=False),
    _image256("lsun_church256", "Table 3, Appendix B", 1_200_000, fid=7.89),
    _image256("lsun_cat256", "Table 3, Appendix B", 1_800_000, fid=19.75),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})
"""Every `Preset` by its name."""

# `ddpm-hf distill`, not in the paper; network and process are the teacher's
DISTILLATION = Preset(
    name="distillation",
    source="docs/distillation.md",
    unet={},
    scheduler={},
    total_batch_size=64,
    learning_rate=2e-3,
    max_train_steps=2000,
    lr_warmup_steps=100,
    lr_scheduler="cosine",
    ema_decay=0.998,
    ema_warmup=True,
    random_flip=False,
    timestep_sampling="stratified",
)


def get_preset(name: str) -> Preset:
    """Return the preset called `name`; raise a `ValueError` that lists all presets where there is none."""
    try:
        return PRESETS[name]
    except (KeyError, TypeError):  # TypeError: not hashable
        known = f"the presets are {', '.join(PRESETS)}"
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}; {known}") from None
