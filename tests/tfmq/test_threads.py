"""One quantised network that several threads call at different time steps computes as it does for one thread."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.tfmq import networks
from tfmq.modules.fake_quantize import FakeQuantize, StepTracker
from tfmq.network.sampling import predict_noise, sample
from tfmq.network.unet import UNet
from tfmq.passes.correction import MeasureCorrection
from tfmq.passes.temporal_cache import TemporalCache

PER_STEP = networks.recipe(scales="per_step", weight_range="minmax")
CACHED = (TemporalCache("all"), *networks.recipe(weight_range="minmax"))
SOME_CACHED = (*networks.recipe(scales="temporal", weight_range="minmax"), TemporalCache("step"))


def wrong_outputs(unet: UNet, timesteps: list[Tensor | int], calls: int, threads: int = 2) -> int:
    """How many of so many calls, from threads that begin together, differ from what one thread computes."""
    inputs = [networks.noise(2, seed) for seed in range(len(timesteps))]
    with torch.no_grad():
        expected = [unet(x, t).sample for x, t in zip(inputs, timesteps, strict=True)]
    together = threading.Barrier(threads)

    def call(thread: int) -> int:
        wrong = 0
        together.wait()
        with torch.no_grad():
            for number in range(thread, calls, threads):
                chosen = (number // threads + thread) % len(timesteps)
                wrong += not torch.equal(unet(inputs[chosen], timesteps[chosen]).sample, expected[chosen])
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(call, range(threads)))


@pytest.mark.parametrize("recipe", [PER_STEP, CACHED, SOME_CACHED], ids=["ranges", "cache", "selection"])
def test_two_threads_at_different_steps_compute_what_one_does(recipe):
    unet, _, pool, _ = networks.quantized(recipe)
    assert wrong_outputs(unet, pool.timesteps.unique().tolist(), 200) == 0


def test_rows_of_different_steps_in_four_threads():
    unet, _, pool, _ = networks.quantized(PER_STEP)
    first, second, third, *_ = pool.timesteps.unique().tolist()
    pairs = [torch.tensor(pair) for pair in ((first, second), (second, first), (third, third), (second, third))]
    assert wrong_outputs(unet, pairs, 100, threads=4) == 0


def test_images_of_an_attention_some_at_a_time_in_two_threads(monkeypatch):
    monkeypatch.setattr("tfmq.modules.attention.QuantizedAttention.most_bytes", 1)
    unet, _, pool, _ = networks.quantized(PER_STEP)
    first, second, *_ = pool.timesteps.unique().tolist()
    assert wrong_outputs(unet, [torch.tensor([first, second]), torch.tensor([second, first])], 60) == 0


def test_two_samplers_share_a_network_with_a_correction():
    with pytest.warns(UserWarning, match="carries a noise correction"):
        unet, _, _, _ = networks.quantized((*PER_STEP, MeasureCorrection(4, 4)))
    starts = [networks.noise(2, seed) for seed in range(4)]
    expected = [sample(unet, networks.scheduler(), start, networks.SETTINGS) for start in starts]
    scheduler = networks.scheduler()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda start: sample(unet, scheduler, start, networks.SETTINGS), starts))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_replicas_share_what_tells_the_step_but_not_the_step():
    """As DataParallel makes them: other tensors, the same hooks and quantisers' settings, a thread for each."""
    unet, _, pool, _ = networks.quantized(PER_STEP)
    timesteps = pool.timesteps.unique()[:2].tolist()
    replicas = [copy.copy(unet) for _ in timesteps]
    x = networks.noise(2)
    with torch.no_grad():
        expected = [unet(x, t).sample for t in timesteps]
    together = threading.Barrier(2)

    @torch.no_grad()
    def call(replica: UNet, timestep: int) -> list[Tensor]:
        together.wait()
        return [replica(x, timestep).sample for _ in range(30)]

    with ThreadPoolExecutor(2) as threads:
        for found, right in zip(threads.map(call, replicas, timesteps), expected, strict=True):
            assert all(torch.equal(each, right) for each in found)


def in_thread(function: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


def told(*steps: int) -> StepTracker:
    tracker = StepTracker()
    tracker.steps = torch.tensor(steps)
    return tracker


def test_a_thread_that_was_told_nothing_gets_the_latest_step():
    """So do threads of a backward pass, in which checkpointed blocks are computed anew."""
    tracker = told(1, 401, 801)
    tracker.set(401)
    assert in_thread(lambda: (tracker.index, tracker.current)) == (1, 401)
    in_thread(lambda: tracker.set(801))
    assert (tracker.index, tracker.current) == (1, 401)
    assert in_thread(lambda: (tracker.index, tracker.current)) == (2, 801)


def test_a_part_of_a_batch_leaves_the_step_as_it_was():
    tracker = told(1, 401, 801)
    tracker.set(401)
    with pytest.raises(KeyError), tracker.at(2):
        assert tracker.index == 2 and in_thread(lambda: tracker.index) == 1
        raise KeyError
    assert tracker.index == 1

    def narrowed() -> object:
        with tracker.at(0):
            inside = tracker.index
        return inside, tracker.index

    assert in_thread(narrowed) == (0, 1)
    tracker.set(801)
    assert in_thread(lambda: tracker.index) == 2


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_a_copied_network_has_a_step_of_its_own(twin_of):
    unet, _, pool, _ = networks.quantized(PER_STEP)
    first, second, *_ = pool.timesteps.unique().tolist()
    x = networks.noise(2)
    with torch.no_grad():
        expected = unet(x, first).sample
        twin = twin_of(unet)
        assert twin.step_tracker is not unet.step_tracker and twin.step_tracker.current == first
        quantizers = [part for part in twin.modules() if isinstance(part, FakeQuantize)]
        assert all(quantizer.tracker is twin.step_tracker for quantizer in quantizers)
        twin(x, second)
        assert unet.step_tracker.current == first and twin.step_tracker.current == second
        assert torch.equal(twin(x, first).sample, expected)


def test_gradients_of_checkpointed_blocks_are_those_of_the_step():
    unet, _, pool, _ = networks.quantized(PER_STEP)
    x = networks.noise(2).requires_grad_()
    (expected,) = torch.autograd.grad(unet(x, pool.timesteps[0]).sample.square().sum(), x)
    unet.enable_gradient_checkpointing()
    unet.train()
    (found,) = torch.autograd.grad(unet(x, pool.timesteps[0]).sample.square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_a_compiled_block_looks_its_step_up():
    unet, _, pool, _ = networks.quantized(PER_STEP)
    block, x, time = unet.mid_block.resnets[0], torch.randn(2, 32, 4, 4), torch.randn(2, 64)
    compiled, found = torch.compile(block, backend="eager"), []
    with torch.no_grad():
        for timestep in pool.timesteps[:3]:
            unet.step_tracker.set(timestep)
            found.append(block(x, time))
            torch.testing.assert_close(compiled(x, time), found[-1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[0], found[1])


def test_guided_calls_of_two_threads():
    kind = networks.KINDS["class"]
    unet = kind.build()
    unet, _, pool, _ = networks.quantized(PER_STEP, build=kind.build, recorded=kind.pool(unet))
    conditioning, timesteps = kind.conditioning(2), pool.timesteps.unique()

    def call(number: int) -> Tensor:
        with torch.no_grad():
            return predict_noise(unet, networks.noise(2), timesteps[number % len(timesteps)], conditioning, 3.0)

    expected = [call(number) for number in range(len(timesteps))]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(call, range(40)))
    assert all(torch.equal(each, expected[number % len(timesteps)]) for number, each in enumerate(found))
