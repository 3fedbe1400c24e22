"""What a quantisation has learned is kept and found again: after a stop, and by another that begins alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.suite import discover
from tests.tfmq import networks
from tfmq import session, workspace
from tfmq.network.backbone import backbone_of
from tfmq.network.calibration import CalibrationSet, Spaced, collect_calibration
from tfmq.network.unet import UNet
from tfmq.passes import Pass, Recipe, low_rank, predicted_step_sizes, reconstruction
from tfmq.passes.block_reconstruction import BlockReconstruction
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.temporal_cache import TemporalCache
from tfmq.passes.weight_ranges import WeightRanges
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.session import SECONDS, Session
from tfmq.workspace import FolderWorkspace, Workspace

ROUNDING = RoundingConfig(iterations=3, batch=8, learning_rate=1e-2)
STEP_SIZES = StepSizeConfig(iterations=2, batch=8)
BLOCKS = [block.path for block in backbone_of(networks.unconditional()).blocks]


class Memory(Workspace):
    """A workspace in memory, of units that are put once; it stops the run after so many."""

    keeps = True

    def __init__(self, units: dict[str, dict[str, Tensor]] | None = None, most: int | None = None) -> None:
        self.units = dict(units or {})
        self.most = most

    def get(self, address: str) -> dict[str, Tensor] | None:
        return self.units.get(address)

    def put(self, address: str, tensors: dict[str, Tensor]) -> None:
        assert address not in self.units, "two units of one address"
        if len(self.units) == self.most:
            raise KeyboardInterrupt
        self.units[address] = {name: tensor.clone() for name, tensor in tensors.items()}


@cache
def pool() -> CalibrationSet:
    return networks.pool(networks.unconditional())


def run(
    recipe: Recipe,
    precision: str = "w4a8",
    kept: Workspace | None = None,
    build: Callable[[], UNet] = networks.unconditional,
    recorded: CalibrationSet | None = None,
    seed: int = 0,
) -> SimpleNamespace:
    """A quantisation: the network's state, what the generator goes on with, and the report."""
    unet, generator = build(), torch.Generator().manual_seed(seed)
    given = (recipe, pool() if recorded is None else recorded, generator)
    report = quantize_(unet, Precision.parse(precision), *given, workspace=kept)
    return SimpleNamespace(state=unet.state_dict(), generator=generator.get_state(), report=report)


def assert_same(found: SimpleNamespace, expected: SimpleNamespace) -> None:
    """Bit for bit, and at the same cost."""
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(found.state[key], tensor) for key, tensor in expected.state.items())
    assert torch.equal(found.generator, expected.generator)
    assert found.report.cost == expected.report.cost
    assert [replace(spent, seconds=0) for spent in found.report.passes] == [
        replace(spent, seconds=0) for spent in expected.report.passes
    ]


def recipe_of(name: str) -> Recipe:
    """A method's recipe with few iterations."""
    default = discover.method(name).config()
    few = {f.name: 2 for f in dataclasses.fields(default) if "iterations" in f.name and getattr(default, f.name)}
    return replace(default, **few).recipe()


RECIPES = {
    "blocks": networks.recipe(rounding=ROUNDING, step_sizes=STEP_SIZES),
    "temporal": networks.recipe(rounding=ROUNDING, temporal=ROUNDING, scales="temporal", split_shortcuts=True),
    "cached": (TemporalCache("all"), *networks.recipe(rounding=ROUNDING)),
    # Which learns activation step sizes for each of two widths.
    "mixed": recipe_of("ptqd_mixed"),
}


def counted(patch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many units of each kind have been learned from here on."""
    learned = {"learn_rounding": 0, "learn_step_sizes": 0}

    def counting(name: str, learn: Callable) -> Callable:
        def counted_learn(*given: object) -> list[float]:
            learned[name] += 1
            return learn(*given)

        return counted_learn

    for name in learned:
        patch.setattr(reconstruction, name, counting(name, getattr(reconstruction, name)))
    return learned


# -- a run that was stopped -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore:this network carries a noise correction")
def test_a_stopped_run_goes_on_to_the_same_network(name, monkeypatch):
    recipe = RECIPES[name]
    expected = run(recipe)
    whole = Memory()
    assert_same(run(recipe, kept=whole), expected)  # keeping changes nothing
    units = list(whole.units)
    # After the first unit, in the middle, one before the end, and with nothing left to learn.
    for most in (1, len(units) // 2, len(units) - 1, len(units)):
        kept = Memory(most=most)
        if most < len(units):
            with pytest.raises(KeyboardInterrupt):
                run(recipe, kept=kept)
        else:
            kept = Memory(whole.units)
        assert list(kept.units) == units[:most]
        kept.most, seconds = None, sum(tensors[SECONDS].item() for tensors in kept.units.values())
        with monkeypatch.context() as patch:
            learned = counted(patch)
            again = run(recipe, kept=kept)
        assert sum(learned.values()) == len(units) - most
        assert_same(again, expected)
        assert sum(again.report.seconds.values()) > seconds > 0


def test_every_unit_is_kept_once(monkeypatch):
    """The temporal block and all blocks, and with step sizes the embedding layers and all blocks again."""
    monkeypatch.setattr(Session, "address", lambda at, unit: f"{at.report.passes[-1].name}: {unit}")
    kept = Memory()
    run(networks.recipe(rounding=ROUNDING, temporal=ROUNDING, step_sizes=STEP_SIZES), kept=kept)
    expected = ["temporal reconstruction: temporal information block"]
    expected += [f"block reconstruction: {path}" for path in BLOCKS]
    expected += [f"step sizes: {path}" for path in ("time_embedding.linear_1", "time_embedding.linear_2", *BLOCKS)]
    assert list(kept.units) == expected


@pytest.mark.parametrize(
    ("name", "precision", "module", "work"),
    [("svdquant", "w4a4", low_rank, "truncate"), ("tdq", "w4a8", predicted_step_sizes, "fit_networks")],
)
def test_searches_and_step_networks_are_kept_too(name, precision, module, work, monkeypatch):
    """A branch's search tries six strengths, of which one truncation stays; the networks are fitted at once."""
    recipe, kept, calls = recipe_of(name), Memory(), []
    real = getattr(module, work)
    monkeypatch.setattr(module, work, lambda *given: calls.append(given) or real(*given))
    expected = run(recipe, precision)
    alone = len(calls)
    assert_same(run(recipe, precision, kept), expected)
    assert len(calls) == 2 * alone and kept.units
    calls.clear()
    assert_same(run(recipe, precision, kept), expected)
    assert len(calls) <= alone / 3


def test_the_seconds_of_what_was_kept_count():
    recipe, kept = networks.recipe(rounding=ROUNDING), Memory()
    run(recipe, kept=kept)
    for tensors in kept.units.values():
        tensors[SECONDS] = torch.tensor(1000.0)
    seconds = run(recipe, kept=kept).report.seconds
    assert 1000 * len(kept.units) < seconds["block reconstruction"] < 1000 * len(kept.units) + 500
    assert seconds["activation ranges"] < 500


def test_without_a_workspace_nothing_is_kept():
    nothing = Workspace()
    run(networks.recipe(rounding=ROUNDING), kept=nothing)
    assert nothing.get("") is None and not nothing.keeps
    assert nothing.put("here", {"x": torch.zeros(1)}) is None and nothing.get("here") is None


# -- runs that begin alike --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["w4a4", "w4a32"])
def test_recipes_that_begin_alike_share_what_they_learn(other, monkeypatch):
    """TFMQ-DM at 4-bit activations, or at none, learns no weight again that it has learned at 8 bits."""
    recipe, kept = recipe_of("tfmq"), Memory()
    expected = run(recipe, other)
    learned = counted(monkeypatch)
    run(recipe, "w4a8", kept)
    assert learned == {"learn_rounding": 1 + len(BLOCKS), "learn_step_sizes": 0}
    assert len(kept.units) == 1 + len(BLOCKS)
    found = run(recipe, other, kept)
    assert learned["learn_rounding"] == 1 + len(BLOCKS)
    assert_same(found, expected)


def test_step_sizes_of_another_width_are_learned_anew(monkeypatch):
    recipe, kept = networks.recipe(rounding=ROUNDING, step_sizes=STEP_SIZES), Memory()
    expected = run(recipe, "w4a4")
    run(recipe, "w4a8", kept)
    learned = counted(monkeypatch)
    assert_same(run(recipe, "w4a4", kept), expected)
    assert learned == {"learn_rounding": 0, "learn_step_sizes": 2 + len(BLOCKS)}


def test_another_recipe_shares_its_beginning(monkeypatch):
    """What comes after a unit does not decide it; what comes after another one does."""
    kept = Memory()
    run(networks.recipe(temporal=ROUNDING, rounding=ROUNDING), kept=kept)
    learned = counted(monkeypatch)
    run(networks.recipe(temporal=ROUNDING, rounding=ROUNDING, scales="per_step"), kept=kept)
    assert learned["learn_rounding"] == 0
    run(networks.recipe(temporal=ROUNDING, rounding=replace(ROUNDING, iterations=2)), kept=kept)
    assert learned["learn_rounding"] == len(BLOCKS), "the temporal block is that of before"
    run(networks.recipe(temporal=replace(ROUNDING, iterations=2), rounding=ROUNDING), kept=kept)
    assert learned["learn_rounding"] == 1 + 2 * len(BLOCKS), "blocks are learned around another temporal block"


def other_pool() -> CalibrationSet:
    noise = networks.noise(seed=5)
    return collect_calibration(networks.unconditional(), networks.scheduler(), noise, networks.SETTINGS, batch=4)


def recipe(**settings: object) -> Recipe:
    return networks.recipe(**{"rounding": ROUNDING} | settings)


OTHERS = {
    "weight width": lambda: {"precision": "w8a8"},
    "seed": lambda: {"seed": 1},
    "pool": lambda: {"recorded": other_pool()},
    "network": lambda: {"build": lambda: networks.unconditional(1)},
    "rounding": lambda: {"recipe": recipe(rounding=replace(ROUNDING, learning_rate=2e-2))},
    "rows": lambda: {"recipe": recipe(data=Spaced(4, 4))},
    "rows at once": lambda: {"recipe": recipe(batch=5)},
    "a pass before": lambda: {"recipe": recipe(weight_range="minmax")},
    "one more pass before": lambda: {"recipe": (WeightRanges("minmax"), *recipe())},
    "grids": lambda: {"recipe": recipe(split_shortcuts=True)},
}


@cache
def kept_by_a_run() -> dict[str, dict[str, Tensor]]:
    kept = Memory()
    run(recipe(), kept=kept)
    return kept.units


@pytest.mark.parametrize("other", OTHERS)
def test_nothing_is_shared_by_another(other, monkeypatch):
    kept, given = Memory(kept_by_a_run()), {"recipe": recipe()} | OTHERS[other]()
    learned = counted(monkeypatch)
    run(**given, kept=kept)
    units = len(BLOCKS) + 2
    assert learned["learn_rounding"] == units and len(kept.units) == 2 * units


def address(unit: str = "conv_in") -> str:
    """Of a unit that block reconstruction begins with."""
    unet = networks.unconditional()
    at = networks.session(unet, unet, pool())
    for step in recipe()[:2]:
        with at.running(step):
            pass
    with at.running(recipe()[2]):
        return at.address(unit)


def test_code_and_versions_decide(monkeypatch):
    """The code is that of the pass and of those before it, with all that they import."""
    expected = address()
    assert address() == expected != address("conv_out")
    files = []
    original = session.code_hash
    monkeypatch.setattr(session, "code_hash", lambda *paths: files.append(paths) or original(*paths))
    assert address() == expected
    assert [path.stem for path in files[0]] == ["block_reconstruction", "grids", "weight_ranges"]
    for owner, name, value in (
        (session, "code_hash", lambda *paths: "other code"),
        (session.torch, "__version__", "0.0"),
        (session.diffusers, "__version__", "0.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert address() != expected, name


def with_memory(given: Recipe, most: int) -> Recipe:
    """A recipe whose passes hold so many bytes of rows, those that stand inside another pass too."""

    def changed(step: Pass) -> Pass:
        settings = {"memory_bytes": most} if hasattr(step, "memory_bytes") else {}
        if hasattr(step, "step_sizes"):
            settings["step_sizes"] = with_memory(step.step_sizes, most)
        return replace(step, **settings)

    return tuple(changed(step) for step in given)


@pytest.mark.parametrize("name", ["blocks", "mixed"])
@pytest.mark.filterwarnings("ignore:this network carries a noise correction")
def test_memory_for_rows_does_not_matter(name, monkeypatch):
    kept = Memory()
    expected = run(RECIPES[name], kept=kept)
    learned = counted(monkeypatch)
    assert_same(run(with_memory(RECIPES[name], 2**28), kept=kept), expected)
    assert sum(learned.values()) == 0


def test_a_pass_without_a_file_is_refused_where_something_is_kept():
    """Nobody could tell whether its code has changed."""
    prompted = type("Prompted", (BlockReconstruction,), {"__module__": "a prompt"})
    recipe = networks.recipe(rounding=ROUNDING)
    given = tuple(prompted(ROUNDING, networks.ALL_ROWS) if type(s) is BlockReconstruction else s for s in recipe)
    run(given)
    message = "a pass that is defined at a prompt has no file .*: write it to a file, or quantise without a workspace"
    with pytest.raises(ValueError, match=message):
        run(given, kept=Memory())


# -- a folder ---------------------------------------------------------------------------------------------------------

TENSORS = {
    "codes": torch.arange(12, dtype=torch.uint8).view(3, 4),
    "scales": torch.linspace(0, 1, 6).view(2, 3).T,  # which is not contiguous
    "generator": torch.Generator().manual_seed(3).get_state(),
    "seconds": torch.tensor(1.5, dtype=torch.float64),
    "none": torch.empty(0),
}


def test_a_folder_gives_back_what_was_put(tmp_path):
    kept = FolderWorkspace(tmp_path / "new" / "folder")
    assert kept.get("a") is None and not (tmp_path / "new").exists()
    kept.put("a", TENSORS)
    kept.put("b", {"x": torch.ones(2)})
    for again in (kept, FolderWorkspace(tmp_path / "new" / "folder")):
        found = again.get("a")
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert again.get("c") is None
    assert sorted(path.name for path in kept.folder.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_folder_serves_a_run(tmp_path, monkeypatch):
    expected = run(recipe())
    run(recipe(), kept=FolderWorkspace(tmp_path))
    assert len(list(tmp_path.iterdir())) == len(BLOCKS) + 2
    learned = counted(monkeypatch)
    assert_same(run(recipe(), kept=FolderWorkspace(tmp_path)), expected)
    assert not learned["learn_rounding"]


@pytest.mark.parametrize("left", [0, 4, 60, -1])
def test_a_damaged_file_is_named(left, tmp_path):
    kept = FolderWorkspace(tmp_path)
    kept.put("a", TENSORS)
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged \(.*\): delete it, and it is learned again"):
        kept.get("a")


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def fails(tensors: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"the beginning of")
        raise OSError("no space left on device")

    kept = FolderWorkspace(tmp_path)
    kept.put("a", {"x": torch.ones(2)})
    monkeypatch.setattr(workspace, "save_file", fails)
    for address in ("a", "b"):
        with pytest.raises(OSError, match="no space left"):
            kept.put(address, {"x": torch.zeros(3)})
    assert torch.equal(kept.get("a")["x"], torch.ones(2)) and kept.get("b") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
