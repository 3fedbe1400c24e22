"""Networks in integers against their simulation, and what cannot be executed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from tests.tfmq.networks import ALL_ROWS, KINDS, quantized, recipe, scheduler
from tests.tfmq.networks import pool as pool_of
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.execution import executed_coverage, executing
from tfmq.modules.in_cache import RowsFeedForward
from tfmq.modules.integer_products import cpu_is_exact
from tfmq.network.backbone import evaluate
from tfmq.passes.grids import Grids
from tfmq.passes.low_rank import LowRankBranches
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.state import coverage

pytestmark = pytest.mark.skipif(not cpu_is_exact(), reason="the 8-bit kernels of this processor are not exact")
RELATIVE = 1e-6

PRECISIONS = ["w8a8", "w4a8", "w4a4"]
SCALES = {"unconditional": "shared", "class": "temporal", "text": "per_step"}


@pytest.fixture(scope="module")
def network():
    """A quantised network and inputs of it, of a kind at a precision: made once each."""
    made = {}

    def get(kind: str, precision: str = "w8a8"):
        if (kind, precision) not in made:
            build = KINDS[kind].build
            pool = KINDS[kind].pool(build())
            passes = recipe(scales=SCALES[kind], split_shortcuts=True, weight_range="minmax")
            unet, full, *_ = quantized(passes, precision, build, pool)
            made[kind, precision] = unet, full, pool
        return made[kind, precision]

    return get


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_network_is_that_of_simulation(network, kind, precision):
    """Each layer and attention on the inputs that it has in simulation."""
    unet, _, pool = network(kind, precision)
    twin = executing(unet)
    seen = {}
    layers = {row.path for row in executed_coverage(twin) if row.kernel == "8-bit integers"}
    hooks = [
        unet.get_submodule(path).register_forward_hook(
            lambda module, args, given, output, path=path: seen.__setitem__(path, (args, given, output)),
            with_kwargs=True,
        )
        for path in layers
    ]
    timesteps = pool.timesteps[torch.tensor([0, 2, 4, 4])]
    evaluate(unet, pool.latents[2], timesteps, pool.context)
    for hook in hooks:
        hook.remove()
    assert set(seen) == layers and len(layers) == len({row.path for row in coverage(unet)})
    evaluate(twin, pool.latents[2], timesteps, pool.context)
    with torch.no_grad():
        errors = {
            path: ((twin.get_submodule(path)(*args, **given) - output).abs().max() / output.abs().max()).item()
            for path, (args, given, output) in seen.items()
        }
    products = {row.path for row in executed_coverage(twin) if row.kind == "attention products"}
    assert max(error for path, error in errors.items() if path not in products) < 2 * RELATIVE
    # In attention a tie of the probabilities may fall to the other side.
    assert sum(errors[path] > 1e-5 for path in products) <= 1 and max(errors[path] for path in products) < 0.02


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_as_far_from_full_precision_as_its_simulation(network, kind, precision):
    unet, full, pool = network(kind, precision)
    inputs = pool.latents[2], pool.timesteps[2], pool.context
    with torch.no_grad():
        simulated, executed, right = (evaluate(net, *inputs) for net in (unet, executing(unet), full))
    error = (simulated - right).norm()
    assert (executed - simulated).norm() < 0.5 * error
    assert (executed - right).norm() == pytest.approx(error.item(), rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_pipeline_and_the_simulation_stay_as_they_are(network, kind):
    unet, _, pool = network(kind)
    inputs = pool.latents[2], pool.timesteps[2], pool.context
    with torch.no_grad():
        before = evaluate(unet, *inputs)
        twin = executing(unet)
        assert type(twin) is type(unet) and twin.dtype == torch.float32 and twin.config == unet.config
        assert twin.step_tracker is not unet.step_tracker
        drawn = KINDS[kind].draw(twin)
        assert torch.isfinite(drawn).all()
        assert (drawn - KINDS[kind].draw(unet)).norm() < 0.1 * drawn.norm()
        assert torch.equal(evaluate(unet, *inputs), before)
        assert torch.equal(evaluate(copy.deepcopy(twin), *inputs), evaluate(twin, *inputs))
        again = pickle.loads(pickle.dumps(twin.conv_in))
        assert torch.equal(again(inputs[0]), twin.conv_in(inputs[0]))


def test_a_loaded_checkpoint_executes(network, tmp_path):
    unet, _, pool = network("class", "w4a8")
    save_quantized(unet, tmp_path / "q.safetensors", {})
    loaded = load_quantized(tmp_path / "q.safetensors")
    inputs = pool.latents[1], pool.timesteps[1], pool.context
    with torch.no_grad():
        assert torch.equal(evaluate(executing(loaded), *inputs), evaluate(executing(unet), *inputs))


def test_an_unconditional_network_depends_on_neither_batch_nor_threads(network):
    twin = executing(network("unconditional")[0])
    latents, timestep = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(401)
    threads = torch.get_num_threads()
    with torch.no_grad():
        whole = evaluate(twin, latents, timestep)
        assert torch.equal(torch.cat([evaluate(twin, part, timestep) for part in latents.split(4)]), whole)
        try:
            torch.set_num_threads(2)
            assert torch.equal(evaluate(twin, latents, timestep), whole)
        finally:
            torch.set_num_threads(threads)


def test_a_stock_pipeline_draws_with_an_executed_network(network):
    unet, *_ = network("unconditional")

    def drawn(net):
        pipeline = DDIMPipeline(net, DDIMScheduler.from_config(scheduler().config))
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipeline(2, generator, num_inference_steps=5, output_type="np").images)

    simulated, executed = drawn(unet), drawn(executing(unet))
    assert executed.shape == (2, 8, 8, 3)
    assert (executed - simulated).norm() < 0.05 * simulated.norm()


def test_feed_forward_parts_take_some_tokens_at_a_time(network):
    unet, _, pool = network("text")
    whole, parts = executing(unet), executing(unet)
    layers = [module for module in parts.modules() if isinstance(module, RowsFeedForward)]
    assert layers
    for module in layers:
        module.at_once = 5
    inputs = pool.latents[2], pool.timesteps[2], pool.context
    with torch.no_grad():
        assert torch.equal(evaluate(whole, *inputs), evaluate(parts, *inputs))


REFUSED = {
    "dynamic": ((Grids(dynamic_activations=True),), "w8a8", "the range of its input is dynamic"),
    "low rank": (
        (LowRankBranches(2, 1, 3, data=ALL_ROWS, batch=6),),
        "w8a8",
        "its low-rank branch computes in 16-bit floats",
    ),
    "wide": ((), "w8a16", "its input has more than 8 bits"),
    "weights alone": ((), "w8a32", "its weight or its input is not quantised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_executed_is_refused_by_name_or_stays_simulated(case):
    passes, precision, reason = REFUSED[case]
    build = KINDS["unconditional"].build
    usual = recipe(weight_range="minmax")
    if "32" in precision:
        usual = usual[:-1]
    unet, _, pool, _ = quantized((*passes, *usual), Precision.parse(precision), build, pool_of(build()))
    with pytest.raises(ValueError, match=rf"cannot be executed: {reason}"):
        executing(unet)
    twin = executing(unet, partly=True)
    simulated = [row for row in executed_coverage(twin) if row.kernel == "simulated in float32"]
    assert simulated and any(row.reason == reason for row in simulated) and all(row.reason for row in simulated)
    inputs = pool.latents[1], pool.timesteps[1]
    with torch.no_grad():
        torch.testing.assert_close(evaluate(twin, *inputs), evaluate(unet, *inputs), rtol=0.05, atol=0.05)


def test_what_is_not_quantised_or_not_in_float32_is_refused(network):
    with pytest.raises(ValueError, match="not quantised"):
        executing(KINDS["unconditional"].build())
    unet, *_ = network("unconditional")
    with pytest.raises(ValueError, match="computes in torch.float64"):
        executing(copy.deepcopy(unet).double())
    with pytest.raises(ValueError, match="does not execute"):
        executed_coverage(unet)
    with pytest.raises(ValueError, match="executes in integers: start from the full-precision one"):
        rows = pool_of(KINDS["unconditional"].build())
        quantize_(executing(unet), Precision.parse("w8a8"), recipe(), rows, torch.Generator())


def test_a_processor_whose_kernels_saturate_is_refused(network, monkeypatch):
    monkeypatch.setattr("tfmq.execution.cpu_is_exact", lambda: False)
    with pytest.raises(ValueError, match="VNNI instructions are missing"):
        executing(network("unconditional")[0])
