"""What people write against stock's classes, run on stock's and on ours: the same, or a difference that is listed."""

import copy
import functools
import itertools
import json
import pickle
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import SMALL_NETWORK, make_small_unet
from diffusers.training_utils import compute_dream_and_update_latents
from torch import nn

import ddpm_hf
from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel
from ddpm_hf.sampling.generation import with_sampler
from ddpm_hf.utils.errors import UserError

# Where we differ on purpose: function below -> why. A difference that is not listed fails, and so does a listed one
# that is gone. docs/paper.md has them for readers.
DIFFERENCES = {
    # state
    "variance_type_assigned": "stock's step still uses the configuration's; here it counts",
    "betas_assigned": "stock's add_noise and step still use alphas_cumprod; here all tables follow",
    "alphas_assigned": "as betas",
    "betas_in_place": "as betas",
    "alphas_cumprod_saved": "stock's file has the betas of before; ours has trained_betas",
    "alphas_cumprod_in_bf16": "stock computes with what is left of the digits; here the float64 tables stay",
    "alphas_cumprod_that_rises": "stock computes with negative variances; here it is refused",
    "beta_schedule_registered": "stock's tables stay those of before and the file says otherwise; here it is refused",
    "num_train_timesteps_registered": "as beta_schedule",
    "prediction_type_as_an_item": "stock's step does not see it, its file does; here it is refused",
    "unknown_variance_type_registered": "stock samples with some variance; here it is refused",
    "timesteps_of_a_new_scheduler": "stock's step goes to t - 1 until set_timesteps was called; here to the next one",
    "timesteps_that_rise": "stock makes NaN of them; here they are refused",
    # numbers
    "noise_in_bf16": "stock rounds alpha_bar first: no noise at all for small t",
    "noise_with_channels_broadcast": "one noise for all channels is refused: more often a mistake than meant",
    "noise_at_t_in_two_dimensions": "refused: one timestep per image",
    "noise_at_an_int": "stock takes tensors only",
    "noise_at_minus_1": "stock counts from the end; here it is outside the schedule",
    "last_step_of_a_trailing_chain": "stock adds noise wherever t > 0; the last step gives the mean (Algorithm 2)",
    "leading_where_K_does_not_divide_T": "stock rounds T / K down and starts pure noise in the middle of the chain",
    "step_of_mixed_dtypes": "stock's chain takes the wider dtype; here it keeps the sample's",
    "fixed_large_log": "NaN in stock",
    "learned": "stock reads the log-variance as a variance",
    "posterior_mean": "stock refuses to sample",
    "one_timestep_per_image": "stock takes one for all",
    # pipeline
    "pipeline_of_100_timesteps": "stock takes 1000 steps by default, whatever T is, and fails",
    "pipeline_output_latent": "stock gives an array for any word; an unknown one is refused",
}  # fmt: skip

STOCK = SimpleNamespace(
    DDPMScheduler=diffusers.DDPMScheduler, UNet2DModel=diffusers.UNet2DModel, DDPMPipeline=diffusers.DDPMPipeline
)
OURS = SimpleNamespace(DDPMScheduler=DDPMScheduler, UNet2DModel=UNet2DModel, DDPMPipeline=DDPMPipeline)

CASES = {}


def compared(function):
    CASES[function.__name__] = function
    return function


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, OUTPUT = images(2, 3, 4, 4), 0.5 * images(2, 3, 4, 4, seed=1)


def stepped(s, *ts, output=OUTPUT):
    """What `step` gives, at T - 1 and in the middle by default."""
    found = []
    for t in ts or (999, 500):
        made = s.step(output, t, X, generator=torch.Generator().manual_seed(0))
        found += [made.prev_sample, made.pred_original_sample]
    return found


def everything(s):
    """All that depends on the tables."""
    t = torch.tensor([3, 700])
    return [s.add_noise(X, OUTPUT, t), s.get_velocity(X, OUTPUT, t), *stepped(s, 998, 500)]


# ---------------------------------------------------------------------- state changed after construction


@compared
def prediction_type_registered(k):
    s = k.DDPMScheduler()
    s.register_to_config(prediction_type="v_prediction")
    full = torch.full((1, 1, 1, 1), 0.1), 500, torch.full((1, 1, 1, 1), 0.2)
    return [s.step(*full).pred_original_sample, *stepped(s)]


@compared
def prediction_type_as_an_attribute_of_the_configuration(k):
    return [k.DDPMScheduler(prediction_type="sample").config.prediction_type]


@compared
def prediction_type_as_an_item(k):
    s = k.DDPMScheduler()
    s.config["prediction_type"] = "v_prediction"
    return stepped(s)


@compared
def variance_type_registered(k):
    s = k.DDPMScheduler()
    s.register_to_config(variance_type="fixed_large")
    s.set_timesteps(10)
    return stepped(s, 900, 100)


@compared
def unknown_variance_type_registered(k):
    s = k.DDPMScheduler()
    s.register_to_config(variance_type="fixed_huge")
    return stepped(s)


@compared
def variance_type_assigned(k):
    s = k.DDPMScheduler()
    s.variance_type = "fixed_large"
    s.set_timesteps(10)
    return stepped(s, 100)


@compared
def variance_type_of_none(k):
    s = k.DDPMScheduler(variance_type=None)
    return [s.config.variance_type, *stepped(s)]


@compared
def clipping_registered(k):
    s = k.DDPMScheduler()
    s.register_to_config(clip_sample_range=0.5)
    narrow = stepped(s)
    s.register_to_config(clip_sample=False)
    wide = stepped(s, 10)
    s.register_to_config(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9)
    return narrow + wide + stepped(s)


@compared
def spacing_registered(k):
    s = k.DDPMScheduler()
    s.register_to_config(timestep_spacing="trailing")
    s.set_timesteps(10)
    trailing = s.timesteps
    s.register_to_config(timestep_spacing="leading", steps_offset=1)
    s.set_timesteps(10)
    return [trailing, s.timesteps]


@compared
def beta_schedule_registered(k):
    s = k.DDPMScheduler()
    s.register_to_config(beta_schedule="scaled_linear")
    return everything(s)


@compared
def num_train_timesteps_registered(k):
    s = k.DDPMScheduler()
    s.register_to_config(num_train_timesteps=500)
    return [len(s), *everything(s)]


@compared
def timesteps_sliced(k):
    s = k.DDPMScheduler()
    s.set_timesteps(10)
    s.timesteps = s.timesteps[::3]
    return [s.timesteps, *[s.previous_timestep(t) for t in s.timesteps], *stepped(s, 900, 600)]


@compared
def timesteps_from_the_middle(k):
    s = k.DDPMScheduler()
    s.set_timesteps(10)
    s.timesteps = s.timesteps[3:].to("cpu")
    return [len(s.timesteps), *stepped(s, *s.timesteps)]


@compared
def timesteps_in_place(k):
    s = k.DDPMScheduler()
    s.set_timesteps(10)
    s.timesteps[1] = 777
    return [s.previous_timestep(900), *stepped(s, 900, 777)]


@compared
def timesteps_in_place_in_inference_mode(k):
    with torch.inference_mode():
        s = k.DDPMScheduler()
        s.set_timesteps(10)
        s.timesteps[1] = 777
        return [x.clone() for x in stepped(s, 900, 777)]


@compared
def timesteps_of_a_new_scheduler(k):
    s = k.DDPMScheduler()
    s.timesteps = torch.tensor([900, 600, 0])
    return stepped(s, 900)


@compared
def timesteps_that_rise(k):
    s = k.DDPMScheduler()
    s.set_timesteps(10)
    s.timesteps = s.timesteps.flip(0)
    return stepped(s, 100)


@compared
def alphas_cumprod_assigned(k):
    s = k.DDPMScheduler()
    s.alphas_cumprod = k.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.clone()
    return everything(s)


@compared
def alphas_cumprod_in_place(k):
    s = k.DDPMScheduler()
    s.alphas_cumprod.mul_(0.9)
    return everything(s)


@compared
def alphas_cumprod_without_terminal_snr(k):
    """Lin et al. 2023, Algorithm 1, as it is written into trainers."""
    s = k.DDPMScheduler(prediction_type="v_prediction")
    root = s.alphas_cumprod.sqrt()
    s.alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return [s.alphas_cumprod[-1], *everything(s), *stepped(s, 999)]


@compared
def alphas_cumprod_moved(k):
    s = k.DDPMScheduler()
    s.alphas_cumprod = s.alphas_cumprod.to("cpu", copy=True)
    s.betas = s.betas.double()
    return [s.alphas_cumprod, *everything(s)]


@compared
def alphas_cumprod_in_bf16(k):
    s = k.DDPMScheduler()
    s.alphas_cumprod = s.alphas_cumprod.bfloat16()
    return [s.alphas_cumprod, *everything(s)]


@compared
def alphas_cumprod_that_rises(k):
    s = k.DDPMScheduler()
    s.alphas_cumprod = s.alphas_cumprod.flip(0)
    return everything(s)


@compared
def alphas_cumprod_saved(k, tmp_path):
    s = k.DDPMScheduler()
    s.alphas_cumprod = s.alphas_cumprod * 0.9
    s.save_pretrained(tmp_path)
    return everything(k.DDPMScheduler.from_pretrained(tmp_path))


BETAS = torch.linspace(2e-4, 0.01, 1000)


@compared
def betas_assigned(k):
    s = k.DDPMScheduler()
    s.betas = BETAS
    return everything(s)


@compared
def betas_in_place(k):
    s = k.DDPMScheduler()
    s.betas.mul_(0.5)
    return everything(s)


@compared
def alphas_assigned(k):
    s = k.DDPMScheduler()
    s.alphas = 1 - BETAS
    return everything(s)


@compared
def all_three_tables_assigned(k):
    s = k.DDPMScheduler()
    s.betas = BETAS
    s.alphas = 1 - BETAS
    s.alphas_cumprod = torch.cumprod(s.alphas, dim=0)
    return [s.betas, s.alphas, s.alphas_cumprod, *everything(s)]


@compared
def copied(k):
    s = k.DDPMScheduler()
    s.register_to_config(prediction_type="v_prediction")
    s.alphas_cumprod = s.alphas_cumprod * 0.9
    s.set_timesteps(10)
    s.timesteps = s.timesteps[::3]
    return [y for again in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))) for y in stepped(again, 900, 600)]


@compared
def another_scheduler_of_what_was_registered(k):
    s = k.DDPMScheduler()
    s.register_to_config(prediction_type="v_prediction", clip_sample=False)
    ddim = diffusers.DDIMScheduler.from_config(s.config)
    return [
        ddim.config.prediction_type,
        ddim.config.clip_sample,
        k.DDPMScheduler.from_config(s.config).config.clip_sample,
    ]


# ---------------------------------------------------------------------- dtypes of what users derive


@compared
def tables(k):
    s = k.DDPMScheduler()
    return [s.betas, s.alphas, s.alphas_cumprod, s.one, s.timesteps, s.init_noise_sigma, len(s)]


@compared
def images_times_tables(k):
    s, t = k.DDPMScheduler(), torch.tensor([3, 700])
    signal = s.alphas_cumprod[t].view(-1, 1, 1, 1)
    snr = s.alphas_cumprod[t] / (s.one - s.alphas_cumprod[t])  # min-SNR weights
    return [signal.sqrt() * X, (s.betas[t].view(-1, 1, 1, 1) * X), snr.clamp(max=5), s.alphas_cumprod.to(X.dtype)]


@compared
def dream(k):
    class Predicts(nn.Module):
        def forward(self, x, t, states):
            return SimpleNamespace(sample=0.3 * x)

    s, t = k.DDPMScheduler(), torch.tensor([3, 700])
    return list(compute_dream_and_update_latents(Predicts(), s, t, OUTPUT, s.add_noise(X, OUTPUT, t), OUTPUT, None))


@compared
def previous_timesteps(k):
    s = k.DDPMScheduler()
    fresh = [s.previous_timestep(500), s.previous_timestep(torch.tensor(500)), s.previous_timestep(0)]
    s.set_timesteps(10)
    return [*fresh, s.previous_timestep(900), s.previous_timestep(torch.tensor(0))]


@compared
def noise_in_float64_and_float16(k):
    s, t = k.DDPMScheduler(), torch.tensor([300, 700])
    return [s.add_noise(X.double(), OUTPUT.double(), t).float(), s.add_noise(X.half(), OUTPUT, t).dtype]


@compared
def noise_in_bf16(k):
    return [k.DDPMScheduler().add_noise(torch.zeros_like(X).bfloat16(), OUTPUT.bfloat16(), torch.tensor([0, 5]))]


@compared
def step_in_half_precision(k):
    return [x.dtype for x in stepped(k.DDPMScheduler())] + [
        k.DDPMScheduler().step(OUTPUT.bfloat16(), 5, X.bfloat16()).prev_sample.dtype
    ]


@compared
def step_of_mixed_dtypes(k):
    return [k.DDPMScheduler().step(OUTPUT, 5, X.bfloat16()).prev_sample.dtype]


# ---------------------------------------------------------------------- arguments


@compared
def noise_broadcast(k):
    s, t = k.DDPMScheduler(), torch.arange(0, 800, 100)
    one, eight = X[:1], images(8, 3, 4, 4, seed=2)
    return [
        f(a, b, u)
        for f in (s.add_noise, s.get_velocity)
        for a, b, u in ((one, eight, t), (eight, one, t), (one, one, t), (eight, eight, t[3:4]), (one, eight, t[3]))
    ]


@compared
def noise_with_channels_broadcast(k):
    return [k.DDPMScheduler().add_noise(X, OUTPUT[:, :1], torch.tensor([3, 700]))]


@compared
def noise_at_t_in_two_dimensions(k):
    return [k.DDPMScheduler().add_noise(X, OUTPUT, torch.tensor([[3], [700]]))]


@compared
def noise_at_an_int(k):
    return [k.DDPMScheduler().add_noise(X, OUTPUT, 5)]


@compared
def noise_at_minus_1(k):
    return [k.DDPMScheduler().add_noise(X, OUTPUT, torch.tensor([-1, 3]))]


@compared
def noise_at_a_float(k):
    return [k.DDPMScheduler().add_noise(X, OUTPUT, torch.tensor([1.0, 3.0]))]


@compared
def numbers_of_numpy(k):
    s = k.DDPMScheduler(num_train_timesteps=np.int64(100))
    s.set_timesteps(np.int64(10))
    return [s.timesteps, s.betas, len(s)]


@compared
def a_whole_float_of_steps(k):
    s = k.DDPMScheduler()
    s.set_timesteps(10.0)
    return [s.timesteps]


@compared
def last_step_of_a_trailing_chain(k):
    s = k.DDPMScheduler(timestep_spacing="trailing", variance_type="fixed_large")
    s.set_timesteps(10)
    return stepped(s, 99)


@compared
def leading_where_K_does_not_divide_T(k):
    s = k.DDPMScheduler()
    s.set_timesteps(501)
    return [s.timesteps]


@compared
def fixed_large_log(k):
    return stepped(k.DDPMScheduler(variance_type="fixed_large_log"))


@compared
def learned_range(k):
    return stepped(k.DDPMScheduler(variance_type="learned_range"), output=torch.cat([OUTPUT, OUTPUT], 1))


@compared
def learned(k):
    return stepped(k.DDPMScheduler(variance_type="learned"), output=torch.cat([OUTPUT, OUTPUT], 1))


@compared
def posterior_mean(k):
    return stepped(k.DDPMScheduler(prediction_type="posterior_mean"))


@compared
def one_timestep_per_image(k):
    return [k.DDPMScheduler().step(OUTPUT, torch.tensor([500, 3]), X).pred_original_sample]


# ---------------------------------------------------------------------- networks


def network(k, **config):
    torch.manual_seed(0)
    stock = diffusers.UNet2DModel(**{**SMALL_NETWORK, **config}).eval()
    unet = k.UNet2DModel(**{**SMALL_NETWORK, **config}).eval()
    unet.load_state_dict(stock.state_dict())
    return unet


@compared
def a_size_that_only_the_configuration_says(k):
    return [network(k, sample_size=7)(images(1, 1, 8, 8), 5).sample]


@compared
def another_first_layer(k):
    unet = network(k)
    torch.manual_seed(1)
    unet.conv_in = nn.Conv2d(4, 16, 3, padding=1)
    return [unet(images(1, 4, 8, 8), 5).sample]


@compared
def embedded_numbers_and_vectors(k):
    x = images(2, 1, 8, 8)
    numbers = network(k, class_embed_type="timestep")(x, 5, torch.tensor([3.0, 7.0])).sample
    return [numbers, network(k, class_embed_type="identity")(x, 5, images(2, 64)).sample]


@compared
def skip_blocks_of_odd_widths(k):
    """Their groups are their own, not `norm_num_groups`."""
    config = {"down_block_types": ("SkipDownBlock2D",) * 3, "up_block_types": ("SkipUpBlock2D",) * 3}
    return [network(k, **config, block_out_channels=(16, 20, 32))(images(1, 3, 8, 8), 5).sample]


# ---------------------------------------------------------------------- pipeline


def drawn(k, scheduler=None, unet=None, **options):
    pipe = k.DDPMPipeline(unet or network(k), scheduler or k.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 5, "output_type": "np", **options}
    return [pipe(**options).images]


@compared
def pipeline_output_numpy(k):
    return [*drawn(k, output_type="numpy"), *drawn(k, output_type=None)]


@compared
def pipeline_output_pt(k):
    return drawn(k, output_type="pt")


@compared
def pipeline_output_latent(k):
    return drawn(k, output_type="latent")


@compared
def pipeline_arguments(k):
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    return [
        *drawn(k, batch_size=np.int64(3)),
        *drawn(k, num_inference_steps=10.0),
        *drawn(k, batch_size=3, generator=generators),
        *drawn(k, unet=network(k, sample_size=[8, 16])),
    ]


@compared
def pipeline_of_100_timesteps(k):
    pipe = k.DDPMPipeline(network(k), k.DDPMScheduler(num_train_timesteps=100))
    pipe.set_progress_bar_config(disable=True)
    return [pipe(generator=torch.Generator().manual_seed(0), output_type="np").images]


@compared
def scheduler_of_a_pipeline_replaced(k):
    pipe = k.DDPMPipeline(network(k), k.DDPMScheduler())
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_large")
    pipe.set_progress_bar_config(disable=True)
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 5, "output_type": "np"}
    return [pipe.scheduler.config.variance_type, pipe(**options).images]


# ---------------------------------------------------------------------- the comparison


def outcome(function, k, tmp_path):
    wants_folder = "tmp_path" in function.__code__.co_varnames[: function.__code__.co_argcount]
    try:
        return function(k, tmp_path) if wants_folder else function(k)
    except Exception as error:
        return error


def alike(ours, stock) -> bool:
    if isinstance(ours, Exception) or isinstance(stock, Exception):
        return isinstance(ours, Exception) and isinstance(stock, Exception)
    if len(ours) != len(stock):
        return False
    for a, b in zip(ours, stock, strict=True):
        if isinstance(b, (torch.Tensor, np.ndarray)):
            if type(a) is not type(b) or a.dtype != b.dtype or a.shape != b.shape:
                return False
            a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
            # stock computes in float32: its 1 - alpha_bar has lost digits
            if not torch.allclose(a, b, rtol=1e-3, atol=2e-4):
                return False
        elif type(a) is not type(b) or a != b:
            return False
    return True


@pytest.mark.parametrize("name", CASES)
def test_like_stock(name, tmp_path):
    ours = outcome(CASES[name], OURS, tmp_path / "ours")
    stock = outcome(CASES[name], STOCK, tmp_path / "stock")
    assert not isinstance(ours, Exception) or isinstance(ours, UserError), repr(ours)
    same, listed = alike(ours, stock), name in DIFFERENCES
    assert same != listed, f"{ours}\n{stock}"


def test_listed_differences_are_run():
    assert set(DIFFERENCES) <= set(CASES)


def test_a_step_of_registered_v_prediction():
    """Known values: 0.1 and 0.2 at t = 500."""
    s = DDPMScheduler()
    s.register_to_config(prediction_type="v_prediction")
    full = torch.full((1, 1, 1, 1), 0.1), 500, torch.full((1, 1, 1, 1), 0.2)
    assert s.step(*full).pred_original_sample.item() == pytest.approx(-0.0402, abs=1e-4)
    assert s.p_mean_variance(*full)[3].item() == pytest.approx(-0.0402, abs=1e-4)
    s.set_timesteps(10)
    s.timesteps = s.timesteps[::3]
    assert [int(s.previous_timestep(t)) for t in s.timesteps] == [600, 300, 0, -1]


# ---------------------------------------------------------------------- what follows has no counterpart in stock


def exact_noise(betas, x_0, noise, t):
    """Eq. 4 in float64 from beta_t alone."""
    alpha_bar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))[t.numpy()].reshape(-1, 1, 1, 1)
    return torch.from_numpy(
        np.sqrt(alpha_bar) * x_0.double().numpy() + np.sqrt(1 - alpha_bar) * noise.double().numpy()
    )


T_PAIR = torch.tensor([3, 700])


@pytest.mark.parametrize("change", ["betas", "alphas", "betas in place", "alphas in place"])
def test_tables_follow_betas_and_are_saved(change, tmp_path):
    s = DDPMScheduler(rescale_betas_zero_snr=True)
    if change == "betas":
        s.betas = BETAS
    elif change == "alphas":
        s.alphas = 1 - BETAS
    elif change == "betas in place":
        s.betas.copy_(BETAS)
    else:
        s.alphas.copy_(1 - BETAS)
    s.save_pretrained(tmp_path)
    expected = exact_noise(BETAS, X, OUTPUT, T_PAIR).float()
    saved = DDPMScheduler.from_pretrained(tmp_path), diffusers.DDPMScheduler.from_pretrained(tmp_path)
    for again in (s, *saved, diffusers.DDIMScheduler.from_config(s.config)):
        torch.testing.assert_close(again.add_noise(X, OUTPUT, T_PAIR), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(again.betas, BETAS, rtol=1e-3, atol=0)


def test_another_schedule_is_not_hidden_by_trained_betas():
    s = DDPMScheduler(beta_schedule="quad")
    assert DDPMScheduler.from_config(s.config).betas[500] == s.betas[500]
    again = DDPMScheduler.from_config(s.config, beta_schedule="linear")
    assert again._betas[1] == pytest.approx(1e-4 + 0.0199 / 999, rel=1e-12)


def test_moving_the_tables_keeps_their_digits():
    s = DDPMScheduler()
    before = s._betas
    for name in ("betas", "alphas", "alphas_cumprod"):
        for change in (torch.clone, torch.Tensor.double, torch.Tensor.half, torch.Tensor.float):
            setattr(s, name, change(getattr(DDPMScheduler(), name)))
            assert getattr(s, name).dtype == change(torch.ones(1)).dtype
    assert s._betas is before
    assert s.config.trained_betas is None


def test_a_float64_table_is_not_shared():
    s, betas = DDPMScheduler(), BETAS.double()
    s.betas = betas
    betas.mul_(0.5)
    torch.testing.assert_close(s.add_noise(X, OUTPUT, T_PAIR), exact_noise(BETAS / 2, X, OUTPUT, T_PAIR).float())
    s.timesteps = chosen = torch.tensor([900, 500, 0])
    chosen[1] = 600
    assert s.previous_timestep(900) == 600


def test_what_cannot_be_followed_is_refused_until_it_is_repaired():
    s = DDPMScheduler()
    s.betas[3] = 2.0
    for use in (lambda: s.alphas, lambda: s.config, lambda: s.add_noise(X, X, 5), lambda: s.step(X, 5, X)):
        with pytest.raises(UserError, match=r"got 2\.0 at t=3"):
            use()
    s.betas[3] = 1e-3
    assert s.alphas[3] == pytest.approx(0.999)
    s.timesteps[2] = 5
    with pytest.raises(UserError, match="5 is followed by 996"):
        s.step(X, 5, X)
    s.set_timesteps(10)
    assert s.previous_timestep(900) == 800
    betas, alphas = s.betas, s.alphas
    betas.mul_(0.5)
    alphas.mul_(0.9)
    with pytest.raises(UserError, match="contradict"):
        s.step(X, 900, X)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: setattr(s, "alphas_cumprod", torch.ones(5)), r"1000 numbers.*\[5\]"),
        (lambda s: setattr(s, "betas", torch.arange(1000)), r"1000 numbers.*int64"),
        (lambda s: setattr(s, "betas", "linear"), "betas must be a tensor"),
        (lambda s: setattr(s, "timesteps", [1, 2]), "1 is followed by 2"),
        (lambda s: setattr(s, "timesteps", torch.tensor([2000, 2])), "timestep 2000 is outside"),
        (lambda s: setattr(s, "timesteps", torch.tensor([5.5])), "whole number, got 5.5"),
        (lambda s: setattr(s, "variance_type", "fixed_huge"), "'fixed_huge'.*fixed_small"),
        (lambda s: s.register_to_config(prediction_type="eps"), "'eps'.*epsilon, sample"),
        (lambda s: s.register_to_config(trained_betas=[0.1]), "trained_betas cannot change.*from_config"),
        (lambda s: setattr(s.config, "clip_sample", False), r"register_to_config\(clip_sample=False\)"),
    ],
)
def test_bad_changes(change, message):
    s = DDPMScheduler()
    with pytest.raises(UserError, match=message):
        change(s)
    assert all(torch.equal(a, b) for a, b in zip(everything(s), everything(DDPMScheduler()), strict=True))


def test_a_compiled_step_follows():
    s = DDPMScheduler()
    s.set_timesteps(10)
    t = torch.tensor([900, 800])

    def denoise(output, t, x):
        return s.step(output, t, x).prev_sample + s.add_noise(x, output, t)

    torch._dynamo.reset()
    compiled = torch.compile(denoise, fullgraph=True, backend="eager")
    found = []
    for change in (
        lambda: None,
        lambda: s.register_to_config(prediction_type="v_prediction"),
        lambda: setattr(s, "alphas_cumprod", s.alphas_cumprod * 0.9),
        lambda: s.timesteps.copy_(torch.arange(900, 400, -50)),
    ):
        change()
        assert s.timesteps[0] == 900  # as any loop over them does, which is when changes in place are seen
        for function in (compiled, denoise):
            torch.manual_seed(0)
            found.append(function(OUTPUT, t, X))
        torch.testing.assert_close(found[-2], found[-1], rtol=1e-6, atol=1e-6)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(found[::2]))


def test_a_measured_error_goes_with_the_process_that_it_was_measured_on():
    s = DDPMScheduler(variance_type="optimal")
    s.set_prediction_error([0.01] * 1000)
    s.check_variance()
    s.betas = BETAS
    with pytest.raises(UserError, match="measured error"):
        s.check_variance()


# ---------------------------------------------------------------------- other schedulers

SCHEDULERS = [
    name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")
]  # all that can be imported


def made(name, config=None):
    """`None` for those that need other packages or arguments of their own."""
    kind = getattr(diffusers, name)
    try:
        return kind() if config is None else kind.from_config(config)
    except (ImportError, TypeError):
        return None


COMPATIBLE = [kind.__name__ for kind in DDPMScheduler().compatibles if made(kind.__name__) is not None]


def test_enough_schedulers_can_be_made():
    assert len(COMPATIBLE) >= 12
    assert "EDMEulerScheduler" not in COMPATIBLE


@pytest.mark.parametrize("name", sorted(COMPATIBLE))
def test_there_and_back_through_another_scheduler(name, tmp_path):
    ours = DDPMScheduler(beta_schedule="scaled_linear", beta_end=0.012, num_train_timesteps=200, variance_type=None)
    ours.register_to_config(prediction_type="v_prediction", timestep_spacing="trailing")
    ours.save_pretrained(tmp_path / "ours")
    getattr(diffusers, name).from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "other")
    back = DDPMScheduler.from_pretrained(tmp_path / "other")
    assert np.array_equal(back._betas, ours._betas)
    for key in ("prediction_type", "timestep_spacing", "num_train_timesteps", "clip_sample", "variance_type"):
        assert back.config[key] == ours.config[key], key
    own = made(name)  # with its own defaults; `variance_type` of a DPM-Solver's is null
    own.save_pretrained(tmp_path / "own")
    opened = DDPMScheduler.from_pretrained(tmp_path / "own")
    torch.testing.assert_close(opened.alphas_cumprod, own.alphas_cumprod, rtol=1e-4, atol=1e-5)
    assert opened.variance_type == "fixed_small"


@pytest.fixture(scope="module")
def unets():
    return make_small_unet(), make_small_unet(out_channels=2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_gives_an_image_or_a_sentence(name, unets):
    found = []
    for unet, variance_type in zip(unets, ("fixed_small", "learned_range"), strict=True):
        if (scheduler := made(name, DDPMScheduler(variance_type=variance_type).config)) is None:
            continue
        pipe = DDPMPipeline(unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        try:
            image = pipe(seeds=[0], num_inference_steps=5, output_type="np").images
            found.append(image.shape == (1, 8, 8, 1) and np.isfinite(image).all())
        except UserError as error:
            found.append("sentence" if name in str(error) else str(error))
    processes = ("EDM", "Flow", "IPNDM", "CM", "ScoreSde", "Inverse", "RePaint", "UnCLIP")
    if name in COMPATIBLE or name in ("TCDScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler"):
        assert found == [True, True]
    elif any(word in name for word in processes) and name != "LCMScheduler":
        assert found == ["sentence", "sentence"] or not found


def test_eta_is_the_schedulers_own_unless_given(unets):
    seen = []

    def recorded(step):
        @functools.wraps(step)
        def record(*arguments, **options):
            seen.append(options["eta"])
            return step(*arguments, **options)

        return record

    for kind in (diffusers.TCDScheduler, diffusers.DDIMScheduler):
        pipe = DDPMPipeline(unets[0], kind.from_config(DDPMScheduler().config))
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler.step = recorded(pipe.scheduler.step)
        for eta in (None, 0.5):
            pipe(seeds=[0], num_inference_steps=4, eta=eta)
    assert seen == [0.3] * 4 + [0.5] * 4 + [0.0] * 4 + [0.5] * 4


def test_another_process_is_no_ddpm(unets):
    """`ddpm-hf sample` would make a DDPM of its configuration, with betas that nobody trained with."""
    pipe = DDPMPipeline(unets[0], diffusers.FlowMatchEulerDiscreteScheduler())
    for sampler in ("ddpm", "ddim"):
        with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler is for another process"):
            with_sampler(pipe, sampler)
    for config in (pipe.scheduler.config, json.loads(pipe.scheduler.to_json_string())):
        with pytest.raises(UserError, match=r"scheduler.* has no betas|FlowMatchEulerDiscreteScheduler has no betas"):
            DDPMScheduler.from_config(config)
    for config in ({"_class_name": "DDIMScheduler"}, {}):
        assert DDPMScheduler.from_config(config).betas[-1] == pytest.approx(0.02)
    DDPMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear")


# ---------------------------------------------------------------------- unusual repositories


def write_repository(folder, flat=False, **changes):
    """As stock saves it, then edited by hand as people do it; `flat` as google/ddpm-cifar10-32 is laid out."""
    torch.manual_seed(0)
    pipe = diffusers.DDPMPipeline(diffusers.UNet2DModel(**SMALL_NETWORK), diffusers.DDPMScheduler())
    pipe.save_pretrained(folder)
    for part, file in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        path = folder / part / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes.get(part, {})}))
        if flat:
            for made_file in (folder / part).iterdir():
                made_file.rename(folder / made_file.name)
            (folder / part).rmdir()
    return pipe


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": {"variance_type": None}},
        {"flat": True},
        {"unet": {"sample_size": [8, 8]}},
        {"unet": {"an_unknown_key": 3}, "scheduler": {"another": [1]}},
        {"unet": {"attention_head_dim": 8}},
    ],
    ids=str,
)
def test_unusual_repositories_open_and_give_stocks_images(changes, tmp_path):
    write_repository(tmp_path, **changes)
    found = []
    for kind in (diffusers.DDPMPipeline, DDPMPipeline):
        pipe = kind.from_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 5, "output_type": "np"}
        found.append(pipe(**options).images)
    assert type(pipe.unet) is UNet2DModel
    assert type(pipe.scheduler) is ddpm_hf.DDPMScheduler
    assert np.abs(found[0] - found[1]).max() < 1e-3


@pytest.mark.parametrize("embedding", ["timestep", "identity"])
def test_networks_that_take_numbers_or_vectors_instead_of_classes_are_refused(embedding):
    pipe = DDPMPipeline(make_small_unet(class_embed_type=embedding), DDPMScheduler())
    with pytest.raises(UserError, match=f"class_embed_type='{embedding}' takes a number or vector"):
        pipe(seeds=[0], num_inference_steps=2)
