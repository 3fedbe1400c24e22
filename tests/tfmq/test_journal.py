"""A quantisation that was stopped goes on after the last unit, and ends as if it had never been stopped."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tfmq.journal import Effort, journaled, learn_unit

from benchmarks.suite import discover
from tests.tfmq import networks
from tfmq.network.unet import UNetLayout
from tfmq.passes import reconstruction
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.plan import SHARED
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, quantize_

ROUNDING = RoundingConfig(iterations=3, batch=8, learning_rate=1e-2)
STEP_SIZES = StepSizeConfig(iterations=2, batch=8)
W4A8 = Precision.parse("w4a8")


class Memory(dict):
    """A journal in memory, of units that are put once; it stops the run after so many."""

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.most = most

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        assert key not in self, "two units of one name"
        if len(self) == self.most:
            raise KeyboardInterrupt
        self[key] = {name: tensor.clone() for name, tensor in tensors.items()}


def quantize(config: QuantizationConfig):
    unet = networks.unconditional()
    pool = networks.pool(networks.unconditional())
    rows, generator = pool.spaced(5, 4), networks.generator()
    report = quantize_(unet, W4A8, config, rows, rows, pool.timesteps, generator)
    return unet.state_dict(), generator.get_state(), report.effort


def method(name: str):
    """A method's recipe with few iterations."""
    found = discover.method(name)
    default = found.config()
    few = {f.name: 2 for f in dataclasses.fields(default) if "iterations" in f.name and getattr(default, f.name)}
    unet = networks.unconditional()
    pool, generator = networks.pool(unet), networks.generator()
    report = found.quantize(unet, pool, W4A8, dataclasses.replace(default, **few), generator, SHARED)
    return unet.state_dict(), generator.get_state(), report.effort


RUNS = {
    "blocks": lambda: quantize(QuantizationConfig(rounding=ROUNDING, step_sizes=STEP_SIZES)),
    "temporal": lambda: quantize(
        QuantizationConfig(rounding=ROUNDING, temporal=ROUNDING, activation_scales="temporal", split_shortcuts=True)
    ),
    "cached": lambda: quantize(QuantizationConfig(rounding=ROUNDING, caching="all")),
    # Which learns activation step sizes for each of two widths.
    "mixed": lambda: method("ptqd_mixed"),
}


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets longer with every unit that is learned."""
    learned = []
    for name in ("learn_rounding", "learn_step_sizes"):
        original = getattr(reconstruction, name)
        patch.setattr(reconstruction, name, lambda *given, learn=original: (learned.append(1), learn(*given))[1])
    return learned


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_to_the_same_network(name, monkeypatch):
    run = RUNS[name]
    state, generator, effort = run()
    whole = Memory()
    with journaled(whole):
        kept_state, kept_generator, kept_effort = run()
    assert kept_state.keys() == state.keys()
    assert all(torch.equal(kept_state[key], tensor) for key, tensor in state.items()), "keeping changes nothing"
    assert torch.equal(kept_generator, generator) and kept_effort == effort
    units = list(whole)
    # After the first unit, in the middle, one before the end, and with nothing left to learn.
    for most in (1, len(units) // 2, len(units) - 1, len(units)):
        journal = Memory(most)
        if most < len(units):
            with pytest.raises(KeyboardInterrupt), journaled(journal):
                run()
        else:
            journal |= whole
        assert list(journal) == units[:most]
        journal.most = None
        with monkeypatch.context() as patch, journaled(journal):
            learned = counted(patch)
            again, again_generator, again_effort = run()
        assert len(learned) == len(units) - most
        assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
        assert torch.equal(again_generator, generator) and again_effort == effort
        assert again_effort.journaled_seconds > 0


def test_every_unit_is_kept():
    """The temporal block and all blocks, and with step sizes the embedding layers and all blocks again."""
    blocks = [block.path for block in UNetLayout.of(networks.unconditional()).blocks]
    embedding = ["time_embedding.linear_1", "time_embedding.linear_2"]
    journal = Memory()
    with journaled(journal):
        quantize(QuantizationConfig(rounding=ROUNDING, temporal=ROUNDING, step_sizes=STEP_SIZES))
    expected = [f"weights-{path}" for path in ["temporal", *blocks]]
    expected += [f"activations-{path}" for path in [*embedding, *blocks]]
    assert [key.partition("-")[2] for key in journal] == expected


def test_the_seconds_of_what_was_kept_count():
    journal = Memory()
    with journaled(journal):
        quantize(QuantizationConfig(rounding=ROUNDING))
    for tensors in journal.values():
        tensors["seconds"] = torch.tensor(1000.0)
    unet = networks.unconditional()
    pool = networks.pool(networks.unconditional())
    rows = pool.spaced(5, 4)
    with journaled(journal):
        config = QuantizationConfig(rounding=ROUNDING)
        report = quantize_(unet, W4A8, config, rows, rows, pool.timesteps, networks.generator())
    assert 1000 * len(journal) < report.seconds["weights"] < 1000 * len(journal) + 500
    assert report.seconds["activations"] < 500


def test_outside_nothing_is_kept():
    journal = Memory()
    with journaled(journal):
        pass
    learn_unit("unit", lambda: [0.0], dict, lambda kept: None, networks.generator(), Effort())
    assert not journal
