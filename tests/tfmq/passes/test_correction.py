"""PTQD's correction against values of the released code, and inside the sampling loop."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline
from diffusers.configuration_utils import FrozenDict

from tests.tfmq import networks
from tests.tfmq.oracle import each, read, said, tensors
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.network.backbone import KINDS
from tfmq.network.calibration import CalibrationSet, collect_calibration
from tfmq.network.sampling import Conditioning, SamplingSettings, sample
from tfmq.passes.correction import (
    NoiseCorrection,
    attach_correction,
    corrected_noise,
    corrected_scheduler,
    correction_of,
    ddim_sigma,
    error_bias,
    error_slope,
    measure_correction,
    reduced_sigma,
    residual_deviation,
)
from tfmq.precision import Precision
from tfmq.quantization import quantize_

STATISTICS = "07a_ptqd_statistics"
SAMPLER = "07b_ptqd_sampler"


class Network(torch.nn.Module):
    """A function as a UNet of one level."""

    up_blocks = ()

    def __init__(self, function, channels=3):
        super().__init__()
        self.function = function
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = FrozenDict(in_channels=channels)

    def forward(self, latents, timestep, context=None):
        return SimpleNamespace(sample=self.function(latents, int(timestep), context))


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """It is called as a UNet is."""
    monkeypatch.setitem(KINDS, "Network", KINDS["UNet2DModel"])


class Scheduler(DDIMScheduler):
    """DDIM with given cumulative alphas, at the recorded time steps; its last step ends on the first of the alphas.

    The recorded sampler takes every n-th training step, from the first to the last that there is, and adds an offset;
    diffusers stops after the steps that were asked for, which differs where they do not divide the training schedule.
    """

    def __init__(self, alphas_cumprod):
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1].double()])
        super().__init__(
            num_train_timesteps=len(alphas_cumprod),
            trained_betas=(1 - alphas_cumprod.double() / previous).tolist(),
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=int(tensors(SAMPLER)["timesteps"][0]),
        )
        self.alphas_cumprod, self.final_alpha_cumprod = alphas_cumprod, alphas_cumprod[0]

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(num_inference_steps, device)
        recorded = tensors(SAMPLER)["timesteps"]
        if num_inference_steps == len(recorded):
            self.num_inference_steps = len(self.alphas_cumprod) // int(recorded[1] - recorded[0])
            self.timesteps = recorded.flip(0)


def recorded_correction():
    """The correction with the recorded tables; float32 alphas as the recorded sampler saw them."""
    values = tensors(SAMPLER)
    correction = NoiseCorrection(*values["bias"].shape)
    correction.timesteps = values["timesteps"]
    correction.slopes = values["k_raw"].clamp_min(0)
    correction.biases, correction.deviations = values["bias"], values["residual_std"]
    correction.alphas, correction.previous_alphas = values["table.a"].double(), values["table.a_prev"].double()
    return correction


# -- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_equal_the_published_ones():
    values = tensors(STATISTICS)
    noise, error = values["eps"], values["eps_hat"] - values["eps"]
    torch.testing.assert_close(error, values["error"], rtol=1e-4, atol=1e-6)
    for index, timestep in enumerate(values["timesteps"]):
        rows = values["t"] == timestep
        slope = error_slope(noise[rows], error[rows])
        torch.testing.assert_close(slope.float(), values["k_raw"][index], rtol=0, atol=1e-6)
        bias = error_bias(error[rows]).float()
        torch.testing.assert_close(bias, values["bias"][index], rtol=1e-4, atol=1e-6)
        deviation = residual_deviation(noise[rows], error[rows], slope.clamp_min(0)).float()
        torch.testing.assert_close(deviation, values["residual_std"][index], rtol=1e-4, atol=0)


def test_measured_on_a_pool_they_are_the_same():
    """A pool and a UNet that hold the recorded noise give the recorded tables, negative slopes cut to 0."""
    values = tensors(STATISTICS)
    timesteps = values["timesteps"].flip(0)
    order = torch.stack([(values["t"] == t).nonzero().flatten() for t in timesteps])
    index = torch.arange(order.numel()).reshape(order.shape).float()
    latents = index[:, :, None, None, None].expand(-1, -1, *values["eps"].shape[1:])
    unet = Network(lambda x, t, context: values["eps_hat"][order].flatten(0, 1)[x[:, 0, 0, 0].long()])
    alphas = torch.linspace(0.01, 0.99, len(timesteps) + 1, dtype=torch.float64)
    settings = SamplingSettings(len(timesteps))
    pool = CalibrationSet(latents, timesteps, values["eps"][order], latents[0], alphas, settings)
    correction = measure_correction(unet, pool, images=order.shape[1], batch=4)
    assert torch.equal(correction.timesteps, values["timesteps"])
    torch.testing.assert_close(correction.slopes, values["k_raw"].clamp_min(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(correction.biases, values["bias"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(correction.deviations, values["residual_std"], rtol=1e-4, atol=0)
    assert torch.equal(correction.alphas, alphas[:-1].flip(0))
    assert torch.equal(correction.previous_alphas, alphas[1:].flip(0))


def test_under_guidance_the_error_is_that_of_the_guided_noise():
    values = tensors(STATISTICS)
    halves = {-1.0: "uncond", 1.0: "cond"}
    noise = torch.zeros_like(values["guided.eps"])
    images = len(noise)

    def network(kind):
        def predict(x, t, context):
            return torch.cat(
                [values[f"guided.{kind}_{halves[float(c[0, 0])]}"][i % images, None] for i, c in enumerate(context)]
            )

        return Network(predict, noise.shape[1])

    conditioning = Conditioning(torch.ones(images, 1, 1), -torch.ones(images, 1, 1))
    settings = SamplingSettings(steps=1, guidance_scale=values["guided.scale"].item())
    pool = collect_calibration(
        network("fp"),
        Scheduler(tensors(SAMPLER)["alphas_cumprod"]),
        noise,
        settings,
        batch=images,
        conditioning=conditioning,
    )
    torch.testing.assert_close(pool.noise[0], values["guided.eps"], rtol=1e-5, atol=1e-6)
    correction = measure_correction(network("q"), pool, images=images, batch=images)
    expected = error_bias(values["guided.error"]).float()
    torch.testing.assert_close(correction.biases[0], expected, rtol=1e-4, atol=1e-6)
    slope = error_slope(values["guided.eps"], values["guided.error"]).clamp_min(0).float()
    torch.testing.assert_close(correction.slopes[0], slope, rtol=0, atol=1e-6)


# -- one step ---------------------------------------------------------------------------------------------------------


@each(SAMPLER, r"table\.eta(?P<eta>[\d.]+)\.sigma")
def test_sigmas_are_ddim_s(match):
    values = tensors(SAMPLER)
    alphas = zip(values["table.a"].tolist(), values["table.a_prev"].tolist(), strict=True)
    sigmas = [ddim_sigma(alpha, previous, float(match["eta"])) for alpha, previous in alphas]
    torch.testing.assert_close(torch.tensor(sigmas), values[match[0]], rtol=1e-4, atol=1e-7)


@each(SAMPLER, r"eta(?P<eta>[\d.]+)\.idx(?P<index>\d+)\.(?P<call>guided|plain)\.(?P<kind>\w+)\.x_prev")
def test_step_equals_the_published_one(match):
    """Noise, eta and the diffusers step that takes them; uncorrected steps show that the schedule is the same."""
    values, prefix = tensors(SAMPLER), match[0].removesuffix("x_prev")
    index, eta = int(match["index"]), float(match["eta"])
    timestep = int(values["timesteps"][index])
    noise = values["e_cond"]
    if match["call"] == "guided":
        noise = values["e_uncond"] + values["scale"] * (values["e_cond"] - values["e_uncond"])
    reduced = eta
    if match["kind"] == "corrected":
        noise, reduced = recorded_correction()(timestep, noise, eta)
    scheduler = Scheduler(values["alphas_cumprod"])
    scheduler.set_timesteps(len(values["timesteps"]))
    step = scheduler.step(noise, timestep, values["x"], eta=reduced, variance_noise=values["z"] if reduced else None)
    alpha, previous = values["table.a"][index].item(), values["table.a_prev"][index].item()
    sigma = torch.tensor(ddim_sigma(alpha, previous, reduced))
    for name, ours in (("x_prev", step.prev_sample), ("pred_x0", step.pred_original_sample), ("e", noise)):
        if prefix + name in values:
            expected = values[prefix + name]
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(sigma, values[prefix + "sigma_new"], rtol=1e-4, atol=1e-6)


def test_noise_is_never_reduced_below_none():
    alpha, previous = 0.3, 0.5
    sigma = ddim_sigma(alpha, previous, 1.0)
    assert reduced_sigma(sigma, alpha, previous, deviation=1e3) == 0
    assert reduced_sigma(sigma, alpha, previous, deviation=0.0) == pytest.approx(sigma)


def test_a_known_linear_error_is_taken_back_exactly():
    noise = torch.randn(4, 3, 8, 8, generator=networks.generator(), dtype=torch.float64)
    bias = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    predicted = 1.25 * noise + bias.view(-1, 1, 1)
    torch.testing.assert_close(corrected_noise(predicted, 0.25, bias), noise)


def test_a_step_without_statistics_is_refused():
    values = tensors(SAMPLER)
    other = int(values["timesteps"].max()) + 1
    with pytest.raises(ValueError, match=f"no noise correction for time step {other}: the statistics are those of"):
        recorded_correction()(other, values["x"], 0.0)


# -- whole trajectories -----------------------------------------------------------------------------------------------


@each(SAMPLER, r"trajectory\.eta(?P<eta>[\d.]+)\.x")
def test_trajectory_equals_the_published_one(match):
    """The released sampler's trajectory through our own loop: network, guidance, correction, scheduler."""
    values = tensors(SAMPLER)
    alphas, start, steps = values["alphas_cumprod"], values[match[0][:-1] + "x_T"], len(values["timesteps"])
    scale, shift = read(said(SAMPLER, match[0]), r"= #\*sqrt\(1-alphas_cumprod\[t\]\)\*x \+ #\*c")

    def predict(x, t, context):
        return scale * (1 - alphas[t]).sqrt() * x + shift * context[:, :, :, None]

    seen = []
    final = sample(
        Network(predict, start.shape[1]),
        Scheduler(alphas),
        start,
        SamplingSettings(steps, float(match["eta"]), values["scale"].item()),
        conditioning=Conditioning(torch.ones(len(start), 1, 1), -torch.ones(len(start), 1, 1)),
        step_noise=values[match[0][:-1] + "z"].reshape(steps, *start.shape),
        callback=seen.append,
        correction=recorded_correction(),
    )
    found = torch.cat([step.latents for step in seen[1:]] + [final])
    torch.testing.assert_close(found, values[match[0]].reshape(found.shape), rtol=1e-4, atol=1e-4)


def test_under_a_repeated_step_and_guidance_the_correction_is_looked_up_by_time_step():
    """An error that is a number for each time step is taken back exactly by a scheduler that visits one twice."""
    errors = {801: 0.2, 601: -0.1, 401: 0.3, 201: -0.2, 1: 0.1}

    def network(wrong):
        def predict(x, t, context):
            # Guidance multiplies an error of the conditional half alone by its scale.
            return 0.5 * x.flip(3) + context[:, :, :, None] * 0.1 + wrong * errors[t] * (context[:, :, :, None] > 0)

        return Network(predict)

    settings = SamplingSettings(steps=5, guidance_scale=7.5)
    given = {"conditioning": Conditioning(torch.ones(3, 1, 1), -torch.ones(3, 1, 1))}
    pool = collect_calibration(network(False), networks.pndm(), networks.noise(3), settings, batch=2, **given)
    assert pool.timesteps.tolist() == [801, 601, 601, 401, 201, 1]
    correction = measure_correction(network(True), pool, images=3, batch=2)
    assert correction.timesteps.tolist() == sorted(errors)
    biases = torch.tensor([7.5 * errors[t] for t in sorted(errors)])
    torch.testing.assert_close(correction.biases, biases[:, None].expand(-1, 3), rtol=1e-4, atol=1e-5)
    alphas = networks.scheduler().alphas_cumprod[correction.timesteps].double()
    assert torch.equal(correction.alphas, alphas) and torch.equal(correction.previous_alphas[1:], alphas[:-1])
    given["correction"] = correction
    found = sample(network(True), networks.pndm(), networks.noise(3), settings, **given)
    torch.testing.assert_close(found, pool.samples, rtol=1e-3, atol=1e-3)
    del given["correction"]
    wrong = sample(network(True), networks.pndm(), networks.noise(3), settings, **given)
    assert (wrong - pool.samples).abs().mean() > 0.1


def test_a_corrected_network_is_nearer_to_full_precision_and_keeps_its_correction(tmp_path):
    unet, pool = corrected()
    correction = correction_of(unet)
    with torch.no_grad():
        plain = [unet(latents, t).sample for latents, t in zip(pool.latents, pool.timesteps, strict=True)]
    fixed = [correction(int(t), p, 0.0)[0] for t, p in zip(pool.timesteps, plain, strict=True)]
    assert (torch.stack(fixed) - pool.noise).norm() < (torch.stack(plain) - pool.noise).norm()
    save_quantized(unet, tmp_path / "q.safetensors", {})
    with pytest.warns(
        UserWarning, match=r"carries a noise correction.*pipeline\.scheduler = tfmq\.corrected_scheduler"
    ):
        loaded = load_quantized(tmp_path / "q.safetensors")
    kept = correction_of(loaded).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in unet.noise_correction.state_dict().items())
    ours, theirs = (
        sample(u, networks.scheduler(), networks.noise(), networks.SETTINGS, correction=correction_of(u))
        for u in (unet, loaded)
    )
    assert torch.equal(ours, theirs)


# -- never lost ------------------------------------------------------------------------------------------------------


def corrected(scheduler=networks.scheduler):
    """A coarse network that carries a correction, and the pool it was measured on."""
    unet = networks.unconditional()
    pool = collect_calibration(unet, scheduler(), networks.noise(), networks.SETTINGS, batch=4)
    quantize_(unet, Precision(3, 32), networks.recipe(weight_range="minmax"), pool, networks.generator())
    assert correction_of(unet) is None
    with pytest.warns(UserWarning, match="carries a noise correction"):
        attach_correction(unet, measure_correction(unet, pool, images=4, batch=4))
    return unet, pool


def drawn(unet, scheduler, steps=5, **options):
    return sample(unet, scheduler, networks.noise(), SamplingSettings(steps), **options)


def test_a_carried_correction_is_applied_unless_another_is_given():
    unet, _ = corrected()
    carried = drawn(unet, networks.scheduler())
    assert torch.equal(carried, drawn(unet, networks.scheduler(), correction=correction_of(unet)))
    uncorrected = drawn(unet, networks.scheduler(), correction=lambda timestep, noise, eta: (noise, eta))
    unet.noise_correction = None
    assert torch.equal(drawn(unet, networks.scheduler()), uncorrected)
    assert not torch.allclose(carried, uncorrected, atol=1e-3)


@pytest.mark.parametrize("steps", [4, 6, 10, 1])
def test_another_schedule_is_refused_even_where_its_steps_are_known(steps):
    unet, _ = corrected()
    message = r"measured for the 5 time steps \[1, 201, 401, 601, 801\], and the schedule has \[1\b.*: sample with"
    with pytest.raises(ValueError, match=message):
        drawn(unet, networks.scheduler(), steps)
    with pytest.raises(ValueError, match=message):
        drawn(unet, networks.scheduler(), steps, correction=correction_of(unet))
    with pytest.raises(ValueError, match=message):
        corrected_scheduler(networks.scheduler(), unet).set_timesteps(steps)


@pytest.mark.parametrize(
    ("scheduler", "eta"), [(networks.scheduler, 0.0), (networks.scheduler, 1.0), (networks.pndm, 0.0)]
)
def test_the_stock_pipeline_with_a_corrected_scheduler_gives_the_same_images(scheduler, eta):
    unet, _ = corrected(scheduler)
    decoder = networks.first_stage()
    plain = scheduler()
    pipeline = LDMPipeline(vqvae=decoder, unet=unet, scheduler=plain)
    pipeline.scheduler = corrected_scheduler(plain, unet)
    pipeline.set_progress_bar_config(disable=True)
    given = {"batch_size": 4, "num_inference_steps": 5, "eta": eta, "output_type": "np"}
    torch.manual_seed(1)  # this pipeline draws the noise of its steps from the global generator
    images = pipeline(generator=networks.generator(), **given).images
    start = torch.randn(4, 3, 8, 8, generator=networks.generator())
    torch.manual_seed(1)
    step_noise = torch.stack([torch.randn(4, 3, 8, 8) for _ in range(5)])
    latents = sample(unet, plain, start, SamplingSettings(5, eta), step_noise=step_noise)
    own = (decoder.decode(latents / 0.7).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(own, images, atol=1e-6)
    pipeline.scheduler = plain
    torch.manual_seed(1)
    uncorrected = pipeline(generator=networks.generator(), **given).images
    assert np.abs(uncorrected - images).max() > 1e-3


def test_nothing_is_corrected_twice():
    unet, _ = corrected()
    scheduler = corrected_scheduler(networks.scheduler(), unet)
    with pytest.raises(ValueError, match="give the plain scheduler"):
        drawn(unet, copy.deepcopy(scheduler))
    with pytest.raises(ValueError, match="corrects the noise already"):
        corrected_scheduler(scheduler, unet)
    with pytest.raises(ValueError, match="carries no noise correction: use the scheduler as it is"):
        corrected_scheduler(networks.scheduler(), networks.unconditional())
