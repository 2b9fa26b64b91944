"""The bound in bits/dim: official outputs, Gaussian data whose bound is known, and a slow second implementation."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    CASES,
    PIXEL_VALUES,
    PREDICTION_TYPE,
    TIMESTEPS,
    VARIANCE_TYPE,
    GaussianData,
    decoder_log_likelihood,
    official,
    official_kl_rounding,
    slow_bits_per_dim,
    tanh_cdf,
)
from scipy import special

from ddpm_hf import DDPMScheduler, bits_per_dim, stratified_bits_per_dim
from ddpm_hf.diffusion.likelihood import (
    LikelihoodEstimate,
    LikelihoodResult,
    prior_bpd,
    subsequence,
    timestep_strata,
    vb_terms_bpd,
)
from ddpm_hf.utils.errors import NotFiniteError

LEVELS = torch.from_numpy(PIXEL_VALUES).float()


class Predicts:
    """A network that predicts x_0 = slope(t) x_t + offset(t), said as epsilon, and remembers what it was given."""

    def __init__(self, alpha_bar, expected_x_0):
        T = len(alpha_bar)
        self.alpha_bar = torch.tensor(alpha_bar)
        self.slope, self.offset = torch.tensor([expected_x_0(t) for t in range(T)], dtype=torch.float64).unbind(1)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, x_t, t, class_labels=None):
        self.seen.append((x_t, t))
        column = [value[t].view(-1, *[1] * (x_t.ndim - 1)) for value in (self.slope, self.offset, self.alpha_bar)]
        slope, offset, a = column
        x_0 = slope * x_t.double() + offset
        if class_labels is not None:
            x_0 = x_0 + class_labels.view(-1, 1, 1, 1) / 10
        eps = (x_t.double() - a.sqrt() * x_0) / (1 - a).sqrt()
        return UNet2DOutput(sample=eps.to(x_t.dtype))


def small_process(T: int = 20, variance_type: str = "fixed_large"):
    """A process with few timesteps that starts as finely as the paper's and still ends in noise."""
    betas = np.geomspace(1e-4, 0.95, T)
    return DDPMScheduler(num_train_timesteps=T, trained_betas=betas, variance_type=variance_type), betas


def pixel_images(n: int, shape=(1, 4, 4), seed: int = 0) -> torch.Tensor:
    return LEVELS[torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed))]


# ---------------------------------------------------------------------- the official implementation's outputs


@pytest.mark.parametrize(("mean", "var", "t"), CASES)
def test_official_bound(mean, var, t):
    prefix, timesteps = f"{mean}_{var}_{t}_", torch.tensor(TIMESTEPS[t])
    scheduler = DDPMScheduler(variance_type=VARIANCE_TYPE[var], prediction_type=PREDICTION_TYPE[mean])
    x_0, x_t, output = official("x0"), official(prefix + "xt"), official(prefix + "model_output")
    for clip, name in ((True, "vb_clip"), (False, "vb_noclip")):
        recorded = official(prefix + name)
        error = (vb_terms_bpd(scheduler, output, x_0, x_t, timesteps, clip_denoised=clip) - recorded).abs()
        tolerance = 2e-5 * recorded + official_kl_rounding(prefix, timesteps)
        assert (error <= tolerance).all(), (name, error, tolerance)
    torch.testing.assert_close(prior_bpd(scheduler, x_0), official(prefix + "prior"), rtol=2e-5, atol=0)


@pytest.mark.parametrize("mean", ["eps", "xstart"])
@pytest.mark.parametrize("var", ["fixedlarge", "fixedsmall"])
def test_the_official_rounding_explains_what_differs(mean, var):
    """At t = 998 and 999 we and the recorded values differ by up to a third, because float32 rounds theirs.

    The recorded means and variances give the recorded bound in float32, in the official order of operations, and give
    ours in float64.
    """
    prefix = f"{mean}_{var}_998_"
    recorded = official(prefix + "vb_clip")
    arrays = [official(prefix + name) for name in ("qpost_mean", "qpost_logvar", "mean", "logvar")]

    def kl(mean_1, logvar_1, mean_2, logvar_2):
        return 0.5 * (
            -1.0 + logvar_2 - logvar_1 + torch.exp(logvar_1 - logvar_2) + (mean_1 - mean_2) ** 2 * torch.exp(-logvar_2)
        )

    in_float32 = kl(*arrays).double().mean((1, 2, 3)) / math.log(2)
    in_float64 = kl(*[array.double() for array in arrays]).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(in_float32, recorded.double(), rtol=1e-3, atol=0)
    assert ((in_float64 - recorded).abs() / recorded).max() > 0.1
    scheduler = DDPMScheduler(variance_type=VARIANCE_TYPE[var], prediction_type=PREDICTION_TYPE[mean])
    ours = vb_terms_bpd(
        scheduler, official(prefix + "model_output"), official("x0"), official(prefix + "xt"), torch.tensor([998, 999])
    )
    torch.testing.assert_close(ours.double(), in_float64, rtol=2e-3, atol=0)


@pytest.mark.parametrize("wrong", ["fixed_small", "clip", "exact"])
def test_wrong_variants_fail_the_official_bound(wrong):
    """beta_tilde for beta, x_0 left unclipped, another decoder than the official one."""
    t = "0" if wrong == "exact" else "37"
    prefix, timesteps = f"eps_fixedlarge_{t}_", torch.tensor(TIMESTEPS[t])
    scheduler = DDPMScheduler(variance_type="fixed_small" if wrong == "fixed_small" else "fixed_large")
    found = vb_terms_bpd(
        scheduler,
        official(prefix + "model_output"),
        official("x0"),
        official(prefix + "xt"),
        timesteps,
        clip_denoised=wrong != "clip",
        cdf="exact" if wrong == "exact" else "tanh",
    )
    error = (found / official(prefix + "vb_clip") - 1).abs()
    assert error[0] > 1e-4


# ---------------------------------------------------------------------- Gaussian data


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("t", [1, 5, 100, 900, 999])
def test_terms_of_gaussian_data_are_the_closed_form(variance_type, t):
    """E L_{t-1} for the best prediction, over many pixels of x_0 ~ N(0.3, 0.5^2)."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    betas = scheduler._betas
    data = GaussianData(0.3, 0.5, betas)
    g = torch.Generator().manual_seed(t)
    n = 4000
    x_0 = 0.3 + 0.5 * torch.randn(n, 1, 5, 5, generator=g, dtype=torch.float64)
    noise = torch.randn(x_0.shape, generator=g, dtype=torch.float64)
    x_t = scheduler.add_noise(x_0, noise, t)
    slope, offset = data.expected_noise(t)
    terms = vb_terms_bpd(scheduler, slope * x_t + offset, x_0, x_t, t, clip_denoised=False)
    expected = data.expected_kl(t, betas, large=variance_type == "fixed_large") / math.log(2)
    assert abs(terms.mean().item() - expected) < 4 * terms.std().item() / n**0.5


def test_the_prior_of_gaussian_data_is_the_closed_form():
    scheduler = DDPMScheduler()
    g = torch.Generator().manual_seed(0)
    x_0 = 0.3 + 0.5 * torch.randn(4000, 1, 5, 5, generator=g, dtype=torch.float64)
    prior = prior_bpd(scheduler, x_0)
    expected = GaussianData(0.3, 0.5, scheduler._betas).prior_kl() / math.log(2)
    assert expected == pytest.approx(1e-5, rel=0.1)  # Section 4: "L_T = D_KL(q(x_T|x_0) || N(0, I)) ~ 1e-5 bits/dim"
    assert abs(prior.mean().item() - expected) < 4 * prior.std().item() / 4000**0.5


class DiscretisedGaussian:
    """Grey levels of a Gaussian, rounded; the expected bound of an image is known pixel by pixel."""

    def __init__(self, mean: float, std: float, betas: np.ndarray, large: bool):
        weights = special.ndtr((PIXEL_VALUES + 1 / 255 - mean) / std) - special.ndtr(
            (PIXEL_VALUES - 1 / 255 - mean) / std
        )
        self.probability = weights / weights.sum()
        self.mean = float(self.probability @ PIXEL_VALUES)
        self.std = float(self.probability @ (PIXEL_VALUES - self.mean) ** 2) ** 0.5
        self.process = GaussianData(self.mean, self.std, betas)  # the best *linear* prediction of the rounded data
        self.betas, self.large = betas, large
        self.by_level = self._expected_terms()  # [256, T] in bits
        a = self.process.alpha_bar[-1]
        self.prior = 0.5 * (-math.log(1 - a) - a + a * PIXEL_VALUES**2) / math.log(2)

    @property
    def entropy(self) -> float:
        """What no code can beat, bits per pixel."""
        p = self.probability[self.probability > 0]
        return float(-(p * np.log2(p)).sum())

    def _expected_terms(self) -> np.ndarray:
        """E over the noise of every term of the bound, for every pixel value of x_0."""
        alpha_bar, T = self.process.alpha_bar, len(self.betas)
        out = np.zeros((256, T))
        nodes, weights = np.polynomial.hermite_e.hermegauss(61)
        for t in range(T):
            slope, offset = self.process.expected_x_0(t)
            a, s = alpha_bar[t], max(t, 1)
            a_s = alpha_bar[s - 1]
            beta_tilde = self.betas[s] * (1 - a_s) / (1 - alpha_bar[s])
            variance = self.betas[t] if self.large and t else beta_tilde
            if t == 0:  # the decoder, by quadrature over the noise of x_1
                x_1 = math.sqrt(a) * PIXEL_VALUES[:, None] + math.sqrt(1 - a) * nodes
                log_std = np.full(x_1.shape, 0.5 * math.log(variance))
                log_p = decoder_log_likelihood(PIXEL_VALUES[:, None], slope * x_1 + offset, log_std, tanh_cdf)
                out[:, 0] = -log_p @ (weights / weights.sum()) / math.log(2)
                continue
            from_x_0 = math.sqrt(a_s) * self.betas[t] / (1 - a)
            # x_0 - E[x_0|x_t] = (1 - slope sqrt(a)) x_0 - offset - slope sqrt(1 - a) noise
            gap = ((1 - slope * math.sqrt(a)) * PIXEL_VALUES - offset) ** 2 + slope**2 * (1 - a)
            nats = 0.5 * (math.log(variance / beta_tilde) - 1 + (beta_tilde + from_x_0**2 * gap) / variance)
            out[:, t] = nats / math.log(2)
        return out

    def sample(self, n: int, shape=(1, 4, 4)) -> tuple[torch.Tensor, np.ndarray]:
        """Images, and the expected bound of each of them."""
        g = np.random.default_rng(0)
        index = g.choice(256, size=(n, *shape), p=self.probability)
        bound = (self.prior + self.by_level.sum(1))[index].reshape(n, -1).mean(1)
        return LEVELS[torch.from_numpy(index)], bound


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_bits_per_dim_of_gaussian_data_is_the_closed_form(variance_type):
    """The paper's whole process, T = 1000, with the best predictor: every term, the sum, and the entropy below it."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    data = DiscretisedGaussian(0.1, 0.3, scheduler._betas, large=variance_type == "fixed_large")
    x_0, expected = data.sample(32)
    unet = Predicts(data.process.alpha_bar, data.process.expected_x_0)
    result = bits_per_dim(unet, scheduler, x_0, clip_denoised=False)
    difference = result.total_bpd.double().numpy() - expected
    assert abs(difference.mean()) < 4 * difference.std() / 32**0.5
    assert difference.std() / 32**0.5 < 0.15  # bits/dim, of about 8: the test can tell
    expected_bound = float(data.probability @ (data.prior + data.by_level.sum(1)))
    excess = {"fixed_large": 0.13, "fixed_small": 0.77}[variance_type]  # beta_tilde costs more where the data vary
    assert expected_bound == pytest.approx(data.entropy + excess, abs=0.01)
    # The error of the prediction: E (x_0 - E[x_0|x_t])^2 = std^2 (1 - alpha_bar) / var(x_t), in pixel values
    a = torch.from_numpy(data.process.alpha_bar)
    rmse = 127.5 * (data.std**2 * (1 - a) / (a * data.std**2 + 1 - a)).sqrt()
    torch.testing.assert_close(result.rmse[100:].double(), rmse[100:], rtol=0.15, atol=0)


# ---------------------------------------------------------------------- the whole loop


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
def test_bits_per_dim_equals_a_slow_implementation(variance_type, clip):
    scheduler, betas = small_process(variance_type=variance_type)
    data = GaussianData(0.1, 0.8, betas)
    unet = Predicts(data.alpha_bar, data.expected_x_0)
    x_0 = pixel_images(3).double()
    result = bits_per_dim(unet, scheduler, x_0, clip_denoised=clip)

    # The noise of every x_t, from what the network saw
    noise = np.zeros((20, *x_0.shape))
    for x_t, t in unet.seen:
        a = data.alpha_bar[int(t)]
        noise[int(t)] = (x_t.double().numpy() - math.sqrt(a) * x_0.double().numpy()) / math.sqrt(1 - a)
    assert len(unet.seen) == 20

    def predict(x_t, t):
        slope, offset = data.expected_x_0(t)
        return slope * x_t + offset

    total, prior, terms, mse = slow_bits_per_dim(
        predict, betas, x_0.double().numpy(), noise, "large" in variance_type, clip
    )
    for found, expected in (
        (result.total_bpd, total),
        (result.prior_bpd, prior),
        (result.terms_bpd, terms),
        (result.mse, mse),
        (result.rate_bpd, prior + terms[:, 1:].sum(1)),
        (result.distortion_bpd, terms[:, 0]),
        (result.rmse, 127.5 * np.sqrt(mse.mean(0))),
        (result.progressive_rate_bpd, [prior.mean() + terms.mean(0)[t + 1 :].sum() for t in range(20)]),
    ):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)  # kept in float32
    assert 0.8 < noise.std() < 1.2
    assert result.terms_bpd.shape == result.mse.shape == (3, 20)
    assert result.progressive_rate_bpd[-1].item() == pytest.approx(prior.mean(), rel=1e-5)
    assert result.progressive_rate_bpd[0].item() == pytest.approx(result.rate_bpd.mean().item(), rel=1e-5)


@pytest.mark.parametrize("estimate", [bits_per_dim, stratified_bits_per_dim])
def test_the_batch_size_changes_nothing(estimate):
    scheduler, betas = small_process()
    data = GaussianData(0.1, 0.8, betas)
    unet = Predicts(data.alpha_bar, data.expected_x_0)
    x_0, labels = pixel_images(7), torch.arange(7)
    options = {"num_evaluations": 10} if estimate is stratified_bits_per_dim else {}
    results = [
        estimate(unet, scheduler, x_0, batch_size=size, class_labels=labels, seed=3, **options)
        for size in (64, 1, 3, 7, 23)
    ]
    for result in results[1:]:
        assert torch.equal(result.total_bpd, results[0].total_bpd)
        assert torch.equal(result.prior_bpd, results[0].prior_bpd)
    # Labels go with their images, and an image does not depend on those beside it.
    alone = estimate(unet, scheduler, x_0[:1], class_labels=labels[:1], seed=3, **options)
    assert torch.equal(alone.total_bpd, results[0].total_bpd[:1])
    swapped = estimate(unet, scheduler, x_0, class_labels=labels.flip(0), seed=3, **options)
    differs = swapped.total_bpd != results[0].total_bpd
    assert differs.tolist() == [True, True, True, False, True, True, True]
    other = estimate(unet, scheduler, x_0, class_labels=labels, seed=4, **options)
    assert (other.total_bpd != results[0].total_bpd).all()


def test_images_have_noise_of_their_own():
    scheduler, betas = small_process()
    data = GaussianData(0.1, 0.8, betas)
    unet = Predicts(data.alpha_bar, data.expected_x_0)
    x_0 = torch.zeros(4, 1, 4, 4)
    bits_per_dim(unet, scheduler, x_0)
    seen = torch.stack([x_t for x_t, _ in unet.seen]) / (1 - torch.tensor(data.alpha_bar).float()).sqrt().view(
        -1, 1, 1, 1, 1
    )
    correlation = torch.corrcoef(seen.transpose(0, 1).flatten(1))  # between images
    assert (correlation - torch.eye(4)).abs().max() < 4 / (20 * 16) ** 0.5
    correlation = torch.corrcoef(seen.flatten(1))  # between timesteps
    assert (correlation - torch.eye(20)).abs().max() < 5 / 64**0.5


def test_the_decoder_and_clipping_can_be_chosen():
    scheduler, betas = small_process()
    data = GaussianData(0.1, 0.8, betas)
    unet = Predicts(data.alpha_bar, data.expected_x_0)
    x_0 = pixel_images(3)
    for estimate in (bits_per_dim, stratified_bits_per_dim):
        options = {"num_evaluations": 40} if estimate is stratified_bits_per_dim else {}
        default = estimate(unet, scheduler, x_0, **options).total_bpd
        exact = estimate(unet, scheduler, x_0, cdf="exact", **options).total_bpd
        unclipped = estimate(unet, scheduler, x_0, clip_denoised=False, **options).total_bpd
        assert 0 < (exact - default).abs().max() < 0.1
        assert (unclipped - default).abs().max() > 0


def test_the_result_of_low_precision_is_float32():
    scheduler, betas = small_process()
    data = GaussianData(0.1, 0.8, betas)
    unet = Predicts(data.alpha_bar, data.expected_x_0)

    def low(x_t, t):
        return UNet2DOutput(sample=unet(x_t, t).sample.bfloat16())

    x_0 = pixel_images(3)
    result = bits_per_dim(low, scheduler, x_0)
    assert result.total_bpd.dtype == torch.float32
    assert (result.total_bpd / bits_per_dim(unet, scheduler, x_0).total_bpd - 1).abs().max() < 0.1


def test_a_progress_bar(capsys):
    scheduler, betas = small_process()
    data = GaussianData(0.1, 0.8, betas)
    unet = Predicts(data.alpha_bar, data.expected_x_0)
    bits_per_dim(unet, scheduler, pixel_images(2))
    assert capsys.readouterr().err == ""
    bits_per_dim(unet, scheduler, pixel_images(2), progress=True)
    assert "bits/dim" in (err := capsys.readouterr().err)
    assert "2/2" in err
    stratified_bits_per_dim(unet, scheduler, pixel_images(2), num_evaluations=10, progress=True)
    assert "2/2" in (err := capsys.readouterr().err)
    assert "image/s" in err


# ---------------------------------------------------------------------- the stratified estimator


@pytest.fixture(scope="module")
def toy():
    """A process of 20 timesteps with Gaussian data: images, their expected bounds, and the best network."""
    scheduler, betas = small_process(variance_type="fixed_small")
    data = DiscretisedGaussian(0.1, 0.3, betas, large=False)
    x_0, expected = data.sample(16)
    assert expected.mean() == pytest.approx(9, abs=0.5)
    return Predicts(data.process.alpha_bar, data.process.expected_x_0), scheduler, x_0, expected


@pytest.mark.parametrize("num_evaluations", [2, 6, 20, 40])
def test_the_stratified_estimator_is_unbiased_and_knows_its_error(toy, num_evaluations):
    unet, scheduler, x_0, expected = toy
    repeats = 150
    estimates = [
        stratified_bits_per_dim(
            unet, scheduler, x_0, num_evaluations=num_evaluations, seed=seed, clip_denoised=False, batch_size=1000
        )
        for seed in range(repeats)
    ]
    means = np.array([estimate.mean for estimate in estimates])
    error = means - expected.mean()
    assert abs(error.mean()) < 3.5 * error.std(ddof=1) / repeats**0.5  # unbiased
    # The reported standard error is the true one: 150 repeats know theirs to 6 %, the estimate's mean to less.
    reported = np.mean([estimate.sampling_standard_error**2 for estimate in estimates]) ** 0.5
    assert reported == pytest.approx(error.std(ddof=1), rel=0.25)
    within = np.abs(error) < 2 * np.array([estimate.sampling_standard_error for estimate in estimates])
    # 95 % for normal errors; 16 squares of differences that are far from normal know the error less well.
    assert within.mean() > (0.75 if num_evaluations == 2 else 0.85)
    # And it is the images' own bounds that are estimated.
    by_image = np.mean([estimate.total_bpd.numpy() for estimate in estimates], axis=0)
    spread = np.std([estimate.total_bpd.numpy() for estimate in estimates], axis=0) / repeats**0.5
    assert (np.abs(by_image - expected) < 4.5 * spread).all()


def test_the_stratified_estimator_agrees_with_the_full_sum(toy):
    unet, scheduler, x_0, expected = toy
    sums = [bits_per_dim(unet, scheduler, x_0, seed=s, clip_denoised=False).total_bpd.mean().item() for s in range(20)]
    full, error = np.mean(sums), np.std(sums, ddof=1) / 20**0.5
    assert abs(full - expected.mean()) < 3.5 * error
    for seed in range(5):
        estimate = stratified_bits_per_dim(unet, scheduler, x_0, num_evaluations=10, seed=seed, clip_denoised=False)
        assert abs(estimate.mean - full) < 3 * math.hypot(estimate.sampling_standard_error, error)
    assert torch.equal(estimate.prior_bpd.float(), bits_per_dim(unet, scheduler, x_0).prior_bpd)


def test_a_biased_estimator_fails_the_toy(toy):
    """Every fourth timestep, times four: the usual shortcut."""
    unet, scheduler, x_0, expected = toy
    terms = np.mean(
        [bits_per_dim(unet, scheduler, x_0, seed=s, clip_denoised=False).terms_bpd.mean(0) for s in range(20)], 0
    )
    assert abs(4 * terms[::4].sum() - expected.mean()) > 1


def test_the_paper_scale_estimate_agrees_within_its_own_error_bars():
    """T = 1000 and 50 evaluations instead of 1000, against the closed form."""
    scheduler = DDPMScheduler(variance_type="fixed_large")
    data = DiscretisedGaussian(0.1, 0.3, scheduler._betas, large=True)
    x_0, expected = data.sample(200)
    unet = Predicts(data.process.alpha_bar, data.process.expected_x_0)
    estimate = stratified_bits_per_dim(unet, scheduler, x_0, num_evaluations=50, clip_denoised=False)
    assert abs(estimate.mean - expected.mean()) < 3 * estimate.sampling_standard_error
    assert estimate.sampling_standard_error < 0.05
    assert len(estimate.total_bpd) == 200
    whole = float(data.probability @ (data.prior + data.by_level.sum(1)))
    assert abs(estimate.mean - whole) < 3 * estimate.standard_error
    assert estimate.standard_error == pytest.approx(estimate.total_bpd.std().item() / 200**0.5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(T=st.integers(1, 4000), data=st.data())
def test_strata_cover_every_timestep_once(T, data):
    count = data.draw(st.integers(1, T))
    edges = timestep_strata(T, count)
    assert len(edges) == count + 1
    assert (edges[0], edges[-1]) == (0, T)
    widths = np.diff(edges)
    assert (widths >= 1).all()
    assert widths[0] == 1 or count == 1


def test_strata_of_the_paper():
    widths = np.diff(timestep_strata(1000, 25))
    assert widths.sum() == 1000
    assert (np.diff(widths) >= -1).all()  # growing, up to rounding
    assert (timestep_strata(1000, 1000) == np.arange(1001)).all()


# ---------------------------------------------------------------------- results and bad input


def test_results_in_the_papers_terms():
    result = LikelihoodResult(
        total_bpd=torch.tensor([6.5]),
        prior_bpd=torch.tensor([0.5]),
        terms_bpd=torch.tensor([[3.0, 2.0, 1.0]]),
        mse=torch.tensor([[0.0, 0.25, 1.0]]),
    )
    assert result.rate_bpd.tolist() == [3.5]
    assert result.distortion_bpd.tolist() == [3.0]
    assert result.rmse.tolist() == [0.0, 63.75, 127.5]
    assert result.progressive_rate_bpd.tolist() == [3.5, 1.5, 0.5]


def test_one_image_has_no_standard_error_over_images():
    one = LikelihoodEstimate(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([0.04]))
    assert math.isnan(one.standard_error)
    assert one.sampling_standard_error == pytest.approx(0.2)


X_0 = pixel_images(2)


@pytest.mark.parametrize(
    ("x_0", "options", "message"),
    [
        ((X_0 * 127.5 + 127.5).byte(), {}, r"torch.uint8.*x / 127.5 - 1"),
        (X_0 * 127.5 + 127.5, {}, r"scaled to \[-1, 1\].*torch.float32 from"),
        (X_0[:0], {}, r"at least one image.*\(0, 1, 4, 4\)"),
        (X_0, {"batch_size": 0}, r"batch_size.*got 0"),
        (X_0, {"batch_size": -1}, r"batch_size.*got -1"),
        (X_0, {"cdf": "erf"}, r"'tanh'.*'erf'"),
    ],
)
@pytest.mark.parametrize("estimate", [bits_per_dim, stratified_bits_per_dim])
def test_bad_input(estimate, x_0, options, message):
    scheduler, betas = small_process()
    data = GaussianData(0.1, 0.8, betas)
    if estimate is stratified_bits_per_dim:
        options = options | {"num_evaluations": 40}
    with pytest.raises(ValueError, match=message):
        estimate(Predicts(data.alpha_bar, data.expected_x_0), scheduler, x_0, **options)


@pytest.mark.parametrize("num_evaluations", [0, 3, 42, 4.0])
def test_a_bad_number_of_evaluations(toy, num_evaluations):
    with pytest.raises(ValueError, match=rf"even and between 2 and 40, got {num_evaluations}"):
        stratified_bits_per_dim(*toy[:3], num_evaluations=num_evaluations)


@pytest.mark.parametrize("count", [0, 21])
def test_a_bad_number_of_strata(count):
    with pytest.raises(ValueError, match=rf"between 1 and T=20, got {count}"):
        timestep_strata(20, count)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bits_per_dim_of_a_network_that_fails_at_one_timestep_are_none(value):
    """An infinite output would be clipped, and counted as a bad guess."""

    def network(x_t, t, **_):
        at_7 = (torch.as_tensor(t).reshape(-1, 1, 1, 1) == 7).expand_as(x_t)
        return UNet2DOutput(sample=torch.where(at_7, value, 0.0))

    scheduler, x_0 = DDPMScheduler(num_train_timesteps=20), torch.zeros(2, 1, 4, 4)
    with pytest.raises(NotFiniteError, match=r"the bound's term at t=7 is not finite"):
        bits_per_dim(network, scheduler, x_0)
    with pytest.raises(NotFiniteError, match=r"the bound's term at t=7 is not finite"):
        stratified_bits_per_dim(network, scheduler, x_0, num_evaluations=40)


def optimal_scheduler(data, betas, **settings):
    """A scheduler that knows how far the best prediction of Gaussian data is off, and whose variance follows."""
    T = len(betas)
    scheduler = DDPMScheduler(T, trained_betas=betas.tolist(), variance_type="optimal", **settings)
    scheduler.set_prediction_error([data.unknown_of_x_0(t) for t in range(T)])
    return scheduler


@pytest.mark.parametrize("timesteps", [[19], [19, 7], [18, 11, 5, 2, 0], list(range(19, -1, -1))])
def test_the_bound_of_any_chain_of_gaussian_data_is_its_exact_value(timesteps):
    """With the optimal variance each step of the chain is exact, so the bound is -log p(x_0) of the data themselves.

    Up to L_T, the decoder's bins, and the noise of the estimate: x_0 here are 8-bit pixel values of N(0.1, 0.3^2).
    """
    betas = np.linspace(1e-3, 0.6, 20)
    data = DiscretisedGaussian(0.1, 0.3, betas, large=False)
    x_0, _ = data.sample(200)
    scheduler = optimal_scheduler(data.process, betas)
    unet = Predicts(data.process.alpha_bar, data.process.expected_x_0)
    found = bits_per_dim(unet, scheduler, x_0, timesteps=timesteps, clip_denoised=False)
    assert found.terms_bpd.shape == found.mse.shape == (200, len(timesteps))
    mean, variance = data.process.marginal(timesteps[0])
    a = data.process.alpha_bar[timesteps[0]]
    prior = 0.5 * (-math.log(1 - a) - 1 + (1 - a) + a * (data.mean**2 + data.std**2)) / math.log(2)
    # the chain starts from N(0, 1) instead of q(x_t): KL(q(x_t) || N(0, 1)) is what that costs
    start = 0.5 * (variance + mean**2 - 1 - math.log(variance)) / math.log(2)
    assert found.prior_bpd.mean().item() == pytest.approx(prior, rel=0.1)
    levels = ((x_0 + 1) * 127.5).round().long().numpy()
    code_length = -np.log2(data.probability)[levels].reshape(200, -1).mean(1)
    excess = found.total_bpd.double().numpy() - code_length
    error = excess.std() / 200**0.5
    assert abs(excess.mean() - start) < 4 * error + 2e-3
    assert error < 0.03


def test_the_bound_of_the_whole_chain_is_the_full_sum():
    betas = np.linspace(1e-3, 0.6, 20)
    data = DiscretisedGaussian(0.1, 0.3, betas, large=True)
    x_0, _ = data.sample(5)
    scheduler = DDPMScheduler(20, trained_betas=betas.tolist(), variance_type="fixed_large")
    unet = Predicts(data.process.alpha_bar, data.process.expected_x_0)
    full = bits_per_dim(unet, scheduler, x_0)
    chain = bits_per_dim(unet, scheduler, x_0, timesteps=list(range(19, -1, -1)))
    assert torch.equal(full.total_bpd, chain.total_bpd)
    assert torch.equal(full.terms_bpd, chain.terms_bpd)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "optimal"])
def test_a_chain_as_a_process_of_its_own_has_the_samplers_coefficients(variance_type):
    betas = np.linspace(1e-3, 0.6, 20)
    data = GaussianData(0.1, 0.3, betas)
    scheduler = optimal_scheduler(data, betas, clip_sample=False)
    scheduler.register_to_config(variance_type=variance_type)
    timesteps = [18, 11, 5, 2]
    few = subsequence(scheduler, timesteps)
    scheduler.set_timesteps(timesteps=timesteps)
    x_t, output = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    for k, t in enumerate(reversed(timesteps)):
        theirs = scheduler.step(output, t, x_t, torch.Generator().manual_seed(0)).prev_sample
        mean, variance, _, _ = few.p_mean_variance(output, k, x_t, clip_denoised=False)
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0), dtype=x_t.dtype)
        if k == 1 and variance_type == "optimal":  # sampling limits the last noise, the bound does not
            variance = variance.clamp(max=(2 / 255) ** 2 * math.pi / 2)
        torch.testing.assert_close(theirs, mean + (k > 0) * variance.sqrt() * noise, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="must fall"):
        subsequence(scheduler, [2, 5])
    with pytest.raises(ValueError, match="a bound over all T steps only"):
        subsequence(DDPMScheduler(prediction_type="posterior_mean"), [5, 2])


def test_a_scheduler_of_stock_has_no_bound():
    with pytest.raises(ValueError, match="needs ddpm_hf's DDPMScheduler, got DDIMScheduler; a distilled model has"):
        bits_per_dim(None, diffusers.DDIMScheduler(), torch.zeros(1, 1, 4, 4))
