"""Every scheduler of diffusers is sampled as a stock pipeline does, or refused with its name and a reason."""

from __future__ import annotations

import copy
import inspect
import threading
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    schedulers,
)

from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.modules.cache import cached_projections
from tfmq.network.backbone import backbone_of
from tfmq.network.calibration import Spaced, collect_calibration
from tfmq.network.conditioning import Conditioning
from tfmq.network.sampling import SamplingSettings, sample
from tfmq.network.schedulers import EXACT, REFUSED
from tfmq.numerics.draws import GivenNoise
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.correction import MeasureCorrection, corrected_scheduler, correction_of, ddim_sigma, reduced_sigma
from tfmq.passes.temporal_cache import TemporalCache
from tfmq.passes.training import noised
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NAMES = sorted(name for name in dir(schedulers) if name.endswith("Scheduler"))
BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
STEPS, IMAGES = 4, 2
KARRAS = {"use_karras_sigmas": True}


def build(name: str, **options: object) -> SchedulerMixin:
    if name == "DPMSolverSinglestepScheduler":
        options["lower_order_final"] = True
    return getattr(diffusers, name)(**BETAS, **options)


def context() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(IMAGES, 5, 12, generator=torch.Generator().manual_seed(2)), torch.zeros(IMAGES, 5, 12)


def stock(unet: torch.nn.Module, scheduler: SchedulerMixin, scale: float = 3.0, eta: float = 0.0) -> SimpleNamespace:
    """What StableDiffusionPipeline makes: latents, and the noise that it started from and that each step drew.

    It sets the scheduler's ``steps_offset`` to 1 and ``clip_sample`` to False, in place.
    """
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = copy.deepcopy(scheduler)
    generator, drawn, step, given = networks.generator(), [], pipeline.scheduler.step, context()

    def recorded(output: torch.Tensor, *args: object, **options: object) -> object:
        before = generator.get_state()
        result = step(output, *args, **options)
        source = torch.Generator()
        source.set_state(before)
        moved = not torch.equal(before, generator.get_state())
        drawn.append(torch.randn(output.shape, generator=source) if moved else torch.full(output.shape, torch.nan))
        return result

    recorded.__signature__ = inspect.signature(step)
    pipeline.scheduler.step = recorded
    latents = pipeline(
        prompt_embeds=given[0],
        negative_prompt_embeds=given[1],
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        eta=eta,
        generator=generator,
        output_type="latent",
    ).images
    start = torch.randn(IMAGES, 3, 8, 8, generator=networks.generator())
    return SimpleNamespace(latents=latents, start=start, drawn=torch.stack(drawn))


def ours(unet: torch.nn.Module, scheduler: SchedulerMixin, made: SimpleNamespace, scale: float = 3.0, eta: float = 0.0):
    settings = SamplingSettings(STEPS, eta, scale)
    return sample(unet, scheduler, made.start, settings, conditioning=Conditioning(*context()), step_noise=made.drawn)


def test_every_scheduler_of_diffusers_is_in_the_table():
    assert sorted([*EXACT, *REFUSED]) == NAMES


@pytest.mark.parametrize("name", EXACT)
def test_it_makes_the_images_of_the_stock_pipeline(name):
    """With all that the network may predict, all spacings of steps, and noise where the pipeline draws any."""
    unet, parameters = networks.conditional(), inspect.signature(getattr(diffusers, name).__init__).parameters
    cases = [{"prediction_type": each} for each in EXACT[name].predictions]
    cases += [{option: True} for option in OPTIONS if option in parameters]
    cases += [{"timestep_spacing": each} for each in ("trailing", "leading") if "timestep_spacing" in parameters]
    cases += [{"algorithm_type": "sde-dpmsolver++"}] if EXACT[name].adds_noise == "sde" else []
    for case in cases:
        for eta in (0.0, 0.7) if EXACT[name].adds_noise == "eta" and "prediction_type" in case else (0.0,):
            scheduler = build(name, **case)
            made = stock(unet, scheduler, eta=eta)
            torch.manual_seed(len(case))
            before = torch.get_rng_state()
            torch.testing.assert_close(ours(unet, scheduler, made, eta=eta), made.latents, rtol=1e-5, atol=1e-4)
            assert torch.equal(torch.get_rng_state(), before), "nothing is drawn from the global generator"
            draws = (~made.drawn.isnan()).flatten(1).all(1)
            assert draws.any() == (eta > 0 or EXACT[name].adds_noise == "always" or "algorithm_type" in case)


@pytest.mark.parametrize("name", EXACT)
def test_what_the_stock_scheduler_does_not_take_is_refused_before_anything_is_computed(name):
    for predicts in {"epsilon", "sample", "v_prediction"} - set(EXACT[name].predictions):
        with pytest.raises((NotImplementedError, ValueError)):
            stock(networks.conditional(), build(name, prediction_type=predicts))
        with pytest.raises(ValueError, match=f"{name} takes no network that predicts {predicts}"):
            sample(None, build(name, prediction_type=predicts), networks.noise(), networks.SETTINGS)


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_with_name_and_reason_before_anything_is_computed(name):
    scheduler = object.__new__(getattr(schedulers, name))
    for run in (sample, lambda *args: collect_calibration(*args, batch=2)):
        with pytest.raises(ValueError, match=f"{name} is not supported: .*take one of DDIMParallelScheduler"):
            run(None, scheduler, networks.noise(), networks.SETTINGS)


def test_flow_matching_learned_variances_and_unknown_schedulers_are_refused_too():
    class Own(SchedulerMixin):
        pass

    for scheduler, reason in (
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "set to flow matching"),
        (DDPMScheduler(variance_type="learned_range"), "variance_type learned_range"),
        (Own(), "Own is not known: take one of"),
    ):
        with pytest.raises(ValueError, match=reason):
            sample(None, scheduler, networks.noise(), networks.SETTINGS)


def test_the_page_of_schedulers_says_what_the_table_says():
    page = (Path(__file__).parents[3] / "docs" / "schedulers.md").read_text(encoding="utf-8")
    words = {"never": "none", "eta": "with eta > 0", "sde": "with an `sde-` algorithm", "always": "each step"}
    for name, exact in EXACT.items():
        assert f"| `{name}` | {words[exact.adds_noise]} | {', '.join(exact.predictions)} |" in page
    for name, reason in REFUSED.items():
        assert f"| `{name}` | {reason} |" in page


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler])
def test_a_scheduler_that_adds_noise_needs_it_and_the_same_call_gives_the_same_images(kind):
    unet, scheduler = networks.unconditional(), kind(**BETAS)
    with pytest.raises(ValueError, match=rf"{kind.__name__} adds noise and needs step_noise, .* \(5, 4, 3, 8, 8\)"):
        sample(unet, scheduler, networks.noise(), networks.SETTINGS)
    with pytest.raises(ValueError, match=r"of shape \(5, 4, 3, 8, 8\), and it is of shape \(5, 3, 8, 8\)"):
        sample(unet, scheduler, networks.noise(), networks.SETTINGS, step_noise=torch.zeros(5, 3, 8, 8))
    given = torch.randn(5, 4, 3, 8, 8, generator=networks.generator())
    first, again, other = (
        sample(unet, scheduler, networks.noise(), networks.SETTINGS, step_noise=noise)
        for noise in (given, given, -given)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_ddpm_makes_the_images_of_its_own_pipeline():
    unet, scheduler = networks.unconditional(), DDPMScheduler(**BETAS)
    pipeline = DDPMPipeline(unet, copy.deepcopy(scheduler))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, generator=networks.generator(), num_inference_steps=4, output_type="np").images
    generator = networks.generator()
    start, drawn = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(4, 2, 3, 8, 8, generator=generator)
    found = sample(unet, scheduler, start, SamplingSettings(4), step_noise=drawn)
    found = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, images, atol=1e-5)


def test_given_noise_is_that_of_one_thread_and_of_one_draw():
    torch.manual_seed(0)
    expected, noise, seen = torch.randn(2, 3), torch.arange(6.0).view(2, 3), []
    torch.manual_seed(0)
    with GivenNoise(noise):
        thread = threading.Thread(target=lambda: seen.append(torch.randn(2, 3)))
        thread.start()
        thread.join()
        assert torch.equal(torch.randn((2, 3)), noise)
        with pytest.raises(ValueError, match="given for one draw, and draw 2"):
            torch.randn((2, 3))
        with pytest.raises(ValueError, match="torch.rand draws something else"):
            torch.rand(2)
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.5])
def test_guidance_sets_in_above_1_as_in_the_stock_pipeline(scale):
    unet, scheduler = networks.conditional(), networks.scheduler()
    made = stock(unet, scheduler, scale)
    torch.testing.assert_close(ours(unet, scheduler, made, scale), made.latents, rtol=1e-5, atol=1e-5)
    conditioning = Conditioning(*context())
    pool = collect_calibration(
        unet, scheduler, made.start, SamplingSettings(STEPS, 0.0, scale), batch=2, conditioning=conditioning
    )
    assert (pool.unconditional is None) == (scale <= 1)


@pytest.mark.parametrize(
    "scheduler",
    [
        build("EulerDiscreteScheduler", **KARRAS),
        build("HeunDiscreteScheduler", use_exponential_sigmas=True),
        build("LMSDiscreteScheduler", **KARRAS),
        build("KDPM2DiscreteScheduler"),
        build("EulerDiscreteScheduler", timestep_spacing="linspace"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_fractional_steps_stay_as_the_pipeline_feeds_them(scheduler, tmp_path):
    unet = networks.unconditional()
    settings = SamplingSettings(4)
    recorded = collect_calibration(unet, scheduler, networks.noise(2), settings, batch=2)
    stepped = copy.deepcopy(scheduler)
    stepped.set_timesteps(4)
    assert torch.equal(recorded.timesteps.double(), torch.as_tensor(stepped.timesteps).double())
    # Noise levels of the schedule, interpolated between those of the training schedule.
    training = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().log().double().numpy()
    sigma = np.exp(np.interp(recorded.timesteps.double().numpy(), np.arange(1000), training))
    np.testing.assert_allclose(recorded.alphas[:-1], 1 / (1 + sigma**2), rtol=2e-3)
    assert recorded.alphas[-1] == 1
    if not recorded.timesteps.is_floating_point():
        return
    ranges = ActivationRanges(Spaced(None, 2), per_step=True)
    passes = (TemporalCache("all"), WeightRanges("minmax"), RoundToNearest(), ranges)
    unet, full, _, _ = networks.quantized(passes, "w8a8", recorded=recorded)
    save_quantized(unet, tmp_path / "q.safetensors", {})
    loaded = load_quantized(tmp_path / "q.safetensors")
    backbone = backbone_of(full)
    for network in (unet, loaded):
        for step in stepped.timesteps:
            network.step_tracker.set(step)
            features = backbone.temporal_features(full, step[None])
            for path, exact in zip(backbone.time_projections, features, strict=True):
                table = cached_projections(network)[path]
                torch.testing.assert_close(table.features(network.step_tracker.index), exact, rtol=0, atol=0.01)
        whole = int(stepped.timesteps[1])
        with pytest.raises(ValueError, match=f"no activation range for time step {whole}:"):
            network(networks.noise(2), whole)
    expected, found = (sample(each, scheduler, networks.noise(2), settings) for each in (unet, loaded))
    assert torch.equal(expected, found)


def test_whole_schedules_keep_whole_steps_and_a_fraction_is_none_of_them():
    unet, _, recorded, _ = networks.quantized(networks.recipe(scales="temporal"))
    assert recorded.timesteps.dtype == unet.step_tracker.steps.dtype == torch.int64
    step = int(recorded.timesteps[1])
    unet(networks.noise(2), float(step))
    with pytest.raises(ValueError, match=rf"no activation range for time step {step}\.25"):
        unet(networks.noise(2), step + 0.25)
    euler = build("EulerDiscreteScheduler", timestep_spacing="leading")
    pool = collect_calibration(networks.unconditional(), euler, networks.noise(1), SamplingSettings(2), batch=1)
    assert pool.timesteps.dtype == torch.int64


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_training_aims_at_what_the_network_predicts(predicts):
    """At the pool's own latents and noise, the target is what the network is defined to predict."""
    scheduler = DDIMScheduler.from_config(networks.scheduler().config, prediction_type=predicts)
    recorded = collect_calibration(networks.unconditional(), scheduler, networks.noise(), networks.SETTINGS, batch=4)
    rows, target = noised(recorded, 16, networks.generator())
    generator = networks.generator()
    image, _ = (torch.randint(4 + each, (16,), generator=generator) for each in (0, 1))
    clean, noise = recorded.samples[image], torch.randn(16, 3, 8, 8, generator=generator)
    expected = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": scheduler.get_velocity(clean, noise, rows.timesteps),
    }[predicts]
    torch.testing.assert_close(rows.latents, scheduler.add_noise(clean, noise, rows.timesteps))
    torch.testing.assert_close(target, expected)


def test_ptqd_reduces_the_noise_of_v_prediction_by_its_own_coefficient(tmp_path):
    """A prediction with noise of a deviation d, and sigma' added, is a step as noisy as DDIM's with sigma."""
    scheduler = DDIMScheduler.from_config(networks.scheduler().config, prediction_type="v_prediction")
    scheduler.set_timesteps(5)
    step, eta, deviation = int(scheduler.timesteps[0]), 1.0, 0.3
    alpha = scheduler.alphas_cumprod[step].item()
    previous = scheduler.alphas_cumprod[int(scheduler.timesteps[1])].item()
    sigma = ddim_sigma(alpha, previous, eta)
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    taken = [scheduler.step(each, step, zero, eta=eta, variance_noise=zero).prev_sample.item() for each in (zero, one)]
    expected = (sigma**2 - ((taken[1] - taken[0]) * deviation) ** 2) ** 0.5
    weights = (-((1 - alpha) ** 0.5), alpha**0.5)
    assert reduced_sigma(sigma, alpha, previous, deviation, weights) == pytest.approx(expected, rel=1e-5)
    assert reduced_sigma(sigma, alpha, previous, deviation) != pytest.approx(expected, rel=1e-2)

    settings, added = SamplingSettings(5, 1.0), torch.randn(5, 4, 3, 8, 8, generator=networks.generator())
    recorded = collect_calibration(
        networks.unconditional(), scheduler, networks.noise(), settings, batch=4, step_noise=added
    )
    with pytest.warns(UserWarning, match="noise correction"):
        unet = networks.quantized((*networks.recipe(), MeasureCorrection()), "w4a4", recorded=recorded)[0]
        save_quantized(unet, tmp_path / "q.safetensors", {})
        loaded = load_quantized(tmp_path / "q.safetensors")
    correction, kept = correction_of(unet), correction_of(loaded)
    index = int((correction.timesteps == step).nonzero())
    slope, spread = correction.slopes[index].item(), correction.deviations[index].item()
    _, reduced = kept(step, torch.zeros(1, 3, 8, 8), eta)
    wanted = (max(sigma**2 - ((taken[1] - taken[0]) * spread / (1 + slope)) ** 2, 0)) ** 0.5 / sigma
    assert reduced == pytest.approx(wanted, rel=1e-4)
    assert torch.equal(correction.predicts, kept.predicts)


def test_a_correction_of_the_eta_of_ddim_is_none_of_tcd():
    unet, scheduler = networks.unconditional(), build("TCDScheduler")
    given = {"step_noise": torch.zeros(5, 4, 3, 8, 8), "correction": lambda timestep, noise, eta: (noise, eta)}
    with pytest.raises(ValueError, match="TCDScheduler means another"):
        sample(unet, scheduler, networks.noise(), SamplingSettings(5, 0.5), **given)
    sample(unet, scheduler, networks.noise(), SamplingSettings(5), **given)


def test_a_correction_of_fractional_steps_is_found_in_a_stock_pipeline(tmp_path):
    scheduler, settings = build("EulerDiscreteScheduler", **KARRAS), SamplingSettings(4)
    recorded = collect_calibration(networks.unconditional(), scheduler, networks.noise(2), settings, batch=2)
    with pytest.warns(UserWarning, match="noise correction"):
        unet = networks.quantized((*networks.recipe(), MeasureCorrection()), "w4a8", recorded=recorded)[0]
        save_quantized(unet, tmp_path / "q.safetensors", {})
        loaded = load_quantized(tmp_path / "q.safetensors")
    wrapped, latents = corrected_scheduler(scheduler, loaded), networks.noise(2)
    wrapped.set_timesteps(4)
    latents = latents * wrapped.init_noise_sigma
    with torch.no_grad():
        for step in wrapped.timesteps:
            latents = wrapped.step(
                loaded(wrapped.scale_model_input(latents, step), step).sample, step, latents
            ).prev_sample
    assert correction_of(loaded).timesteps.dtype == torch.float32
    torch.testing.assert_close(latents, sample(unet, scheduler, networks.noise(2), settings))
