"""Quantised networks in the stock pipelines whose inputs the library knows: SDXL, LCM, inpainting, ControlNet."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.tfmq import networks
from tests.tfmq.pipelines import CASES, Case
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.execution import executing
from tfmq.modules.integer_products import cpu_is_exact
from tfmq.network.backbone import evaluate
from tfmq.network.calibration import Spaced
from tfmq.network.sampling import sample
from tfmq.passes.reconstruction import RoundingConfig
from tfmq.precision import Precision
from tfmq.quantization import quantize_

FEW = RoundingConfig(iterations=3, batch=4)


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@torch.no_grad()
def test_sampling_makes_the_latents_of_the_stock_pipeline(case):
    pipeline = case.build()
    expected = case.run(pipeline, "latent")
    start, steps = case.noise()
    found = sample(
        pipeline.unet,
        pipeline.scheduler,
        start,
        case.settings,
        conditioning=case.condition(pipeline),
        step_noise=steps,
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_calibration_rows_are_the_calls_of_the_stock_pipeline(case):
    """Every input of every call, in full precision, is in the rows of the pool."""
    pipeline, calls = case.build(), []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        added = kwargs.get("added_cond_kwargs") or {}
        lists = {
            f"down_block_additional_residuals.{i}": part
            for i, part in enumerate(kwargs.get("down_block_additional_residuals") or ())
        }
        given = {name: kwargs.get(name) for name in ("timestep_cond", "mid_block_additional_residual")}
        given = {name: value for name, value in given.items() if value is not None} | added | lists
        calls.append((args[0], args[1], kwargs["encoder_hidden_states"], given))

    handle = pipeline.unet.register_forward_pre_hook(record, with_kwargs=True)
    case.run(pipeline, "latent")
    handle.remove()
    pool = case.pool(pipeline)
    assert len(calls) == pool.steps
    for step, (latents, timestep, context, given) in enumerate(calls):
        rows = pool.rows(torch.tensor([step]), torch.tensor([0]))
        order = slice(None) if len(rows) == 1 else torch.tensor([1, 0])  # a pipeline has the unconditional half first
        rows = rows[order]
        assert (rows.timesteps == timestep).all()
        torch.testing.assert_close(rows.context, context)
        inputs = dict(rows.inputs)
        if "channels" in inputs:
            torch.testing.assert_close(inputs.pop("channels"), latents[:, 4:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rows.latents, latents[:, :4], rtol=1e-4, atol=1e-4)
        assert set(inputs) == set(given)
        for name, value in given.items():
            torch.testing.assert_close(inputs[name], value.to(inputs[name].dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["w8a8", "w4a8"])
def test_a_quantised_network_makes_the_images_of_its_pipeline(case, precision, tmp_path):
    pipeline = case.build()
    expected = case.run(pipeline)
    pool = case.pool(pipeline)
    full = copy.deepcopy(pipeline.unet)
    recipe = networks.recipe(rounding=FEW, temporal=FEW, scales="temporal", data=Spaced(None, 1))
    report = quantize_(pipeline.unet, Precision.parse(precision), recipe, pool, networks.generator())
    assert all(row.weight_bits < 32 for row in report.coverage if row.kind in ("conv2d", "linear"))
    found = case.run(pipeline)
    assert not torch.equal(found, expected)
    if precision == "w8a8":
        rows = pool.spaced(3, 1)
        given = rows.latents, rows.timesteps, rows.context, rows.inputs
        exact, quantised = evaluate(full, *given), evaluate(pipeline.unet, *given)
        assert (quantised - exact).norm() < 0.05 * exact.norm()
    save_quantized(pipeline.unet, tmp_path / "q.safetensors", {})
    pipeline.unet = load_quantized(tmp_path / "q.safetensors")
    torch.testing.assert_close(case.run(pipeline), found)
    if cpu_is_exact():
        pipeline.unet = executing(pipeline.unet)
        assert (case.run(pipeline) - found).norm() < 0.1 * found.norm()
    pipeline.unet = full
    torch.testing.assert_close(case.run(pipeline), expected)
