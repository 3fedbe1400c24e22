"""What a suite will cost, counted by hand and compared with files that were really written."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from safetensors.torch import load_file
from timm.models import create_model

import baselines.nearest
from benchmarks.features.efficientnet_lite0 import EfficientNetLite0
from benchmarks.planning import page, planner
from benchmarks.planning.planner import Item, KnownNetwork, Planner, Rate
from benchmarks.suite import params
from tests.tfmq import networks
from tfmq.checkpoint import save_quantized
from tfmq.network.sampling import predict_noise
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.plan import SHARED
from tfmq.precision import Precision
from tfmq.quantization import quantize_

RATE = Rate("a test", rows=2, seconds=0.5, operations=10**12)
TASK = {
    "version": 1,
    "family": "ldm",
    "checkpoint": "data/toy",
    "statistics": "toy.npz",
    "resolution": 32,
    "scheduler": "ddim",
    "steps": 5,
    "eta": 0.0,
    "guidance_scale": 1.0,
    "images": 7,
    "batch": 3,
    "calibration_images": 4,
    "reference_images": 10,
    "evaluator": "inception",
}
METHODS = {"nearest": {"steps": 2, "images": 3}, "prev": {"steps": 2, "images": 3, "iterations": 9, "batch": 4}}


def planned_for(kind="unconditional", precisions=("w4a8",), seeds=1, protocol="shared", backend="simulated", **task):
    settings = networks.KINDS[kind].settings
    if kind != "unconditional":
        task |= {"prompts": "prompts", "guidance_scale": settings.guidance_scale}
    table = {"protocol": protocol, "tasks": ["toy"], "precisions": list(precisions), "methods": list(METHODS)}
    table |= {"seeds": dict.fromkeys(precisions, seeds), "backend": backend}
    document = {"name": "s", "tasks": {"toy": TASK | task}, "tables": {"leaderboard": table}, "methods": METHODS}
    suite = params.parse(document)
    scheduler = networks.KINDS[kind].scheduler()
    scheduler.set_timesteps(settings.steps)
    unet = networks.KINDS[kind].build().to("meta")
    network = KnownNetwork(unet, scheduler.timesteps, tokens=5)
    return Planner(suite, suite.tasks["toy"], network, RATE)


def items(*args, **changes):
    return {item.name: item for item in planned_for(*args, **changes).items()}


def evaluations_of(planned, row):
    """What each pass of a row evaluates, by the plan of its memory, after its items were planned."""
    return {name: cost.unet_evaluations for name, cost in planned.held[row, True].costs}


def test_steps_are_counted_as_by_hand():
    planned = planned_for(seeds=2)
    found = {item.name: item for item in planned.items()}
    assert list(found) == [
        "calibrate",
        "reference",
        "full_precision",
        "nearest/w4a8",
        "nearest/w4a8-s1",
        "prev/w4a8",
        "prev/w4a8-s1",
    ]
    assert found["calibrate"].calibration == found["calibrate"].evaluations == 2 * 5 * 4
    assert found["reference"].reference == 5 * 10
    assert found["full_precision"].sampling == 5 * 7 and found["full_precision"].images == 7
    nearest, prev = found["nearest/w4a8"], found["prev/w4a8"]
    assert (nearest.quantising, nearest.optimizer_steps) == (2 * 3, 0)
    # 6 rows wait in two streams; activation ranges are those of all 5 steps of 4 images. 12 blocks and 2 time layers.
    assert prev.quantising == 2 * 6 + 5 * 4
    passes = {"weight ranges": 0, "block reconstruction": 2 * 6, "activation ranges": 5 * 4}
    assert evaluations_of(planned, "prev") == passes
    passes = {"weight ranges": 0, "round to nearest": 0, "activation ranges": 2 * 3}
    assert evaluations_of(planned, "nearest") == passes
    blocks = len(planner.backbone_of(networks.unconditional()).blocks)
    assert prev.optimizer_steps == 9 * (blocks + 2)
    assert nearest.sampling == prev.sampling == 5 * 7 + 5 * 3, "images, and errors on the first batch"
    assert nearest.seconds == pytest.approx(0.5 * (6 + planner.QUANTIZED * 50))
    assert prev.seconds == pytest.approx(0.5 * (32 + planner.QUANTIZED * 50 + planner.LEARNED * 9 * 4))


def test_what_cells_learn_alike_is_learned_once():
    """Roundings are those of all widths of activations, but of each calibration seed and width of weights."""
    found = items(precisions=["w4a8", "w4a32", "w8a8"], seeds=2)
    learning = 0.5 * planner.LEARNED * 9 * 4
    for name in ("prev/w4a8", "prev/w4a8-s1", "prev/w8a8"):
        assert found[name].seconds == pytest.approx(0.5 * 32 + found[name].drawing + learning) and not found[name].note
    for name in ("prev/w4a32", "prev/w4a32-s1"):
        assert found[name].seconds == pytest.approx(0.5 * found[name].quantising + found[name].drawing)
        assert found[name].note == f"learns what {name.replace('a32', 'a8')} has learned"
        assert found[name].optimizer_steps == found["prev/w4a8"].optimizer_steps, "as its record will have it"


def test_learning_takes_less_on_a_gpu():
    assert RATE.learned == planner.LEARNED
    assert replace(RATE, on_cpu=False).learned == replace(RATE, assumed=0.1).learned == planner.LEARNED_ON_GPU


def test_full_precision_in_tf32_is_drawn_in_float32_too_for_the_check():
    """What was measured of TF32 is what it takes; a CPU has none, and rounds are in float32."""
    fast = replace(RATE, on_cpu=False, tf32=0.25)
    planned = replace(planned_for(tf32=True), rate=fast)
    full, *_ = planned.suite.cells()
    item = planned.full_precision()
    assert item.sampling == 5 * (7 + 7) and item.images == 7
    assert item.seconds == item.drawing == pytest.approx(0.5 * 5 * (0.25 * 7 + 7))
    assert item.note == "in TF32, an evaluation as 0.25; 7 in float32 too"
    many = replace(planned_for(tf32=True, images=1000, batch=100), rate=fast).full_precision()
    assert many.sampling == 5 * (1000 + 300), "three batches hold 256 images"
    usual = planned_for().full_precision()
    assert planned_for(tf32=True).full_precision() == usual and not usual.note
    assert replace(planned, drawn={full: 7.0}).full_precision() == usual
    assert replace(planned_for(), rate=fast).full_precision() == usual


def test_rounds_draw_what_they_need_and_follow_all_of_it():
    planned = planned_for()
    full, nearest, prev = planned.suite.cells()
    drawn = replace(planned, drawn={full: 6.0, nearest: 3.0, prev: 6.0})
    found = {item.name: item for item in drawn.items()}
    assert (found["full_precision"].sampling, found["full_precision"].images) == (5 * 6, 6)
    assert (found["nearest/w4a8"].sampling, found["prev/w4a8"].sampling) == (5 * 2 * 3, 5 * 2 * 6)
    assert found["prev/w4a8"].quantising == {item.name: item for item in planned.items()}["prev/w4a8"].quantising


def test_guidance_doubles_and_pndm_visits_a_step_twice():
    planned = planned_for("text")
    found = {item.name: item for item in planned.items()}
    assert found["calibrate"].calibration == 2 * 6 * 4 and found["full_precision"].sampling == 2 * 6 * 7
    assert evaluations_of(planned, "prev")["activation ranges"] == 2 * 6 * 4


def test_weights_alone_need_no_ranges():
    assert items(precisions=["w4a32"])["nearest/w4a32"].quantising == 0


def test_what_does_not_apply_costs_nothing():
    nearest = items(protocol="published")["nearest-published/w4a8"]
    assert nearest.note == "not applicable" and nearest.evaluations == nearest.disk == nearest.seconds == 0


def test_what_cannot_be_executed_costs_nothing():
    found = items(backend="executed", precisions=["w4a8", "w4a32"])
    assert found["nearest-executed/w4a8"].quantising > 0
    weights_alone = found["nearest-executed/w4a32"]
    assert weights_alone.note == "not applicable" and weights_alone.evaluations == 0


@pytest.mark.parametrize("kind", ["unconditional", "text"])
def test_disk_is_what_the_files_take(kind, tmp_path):
    at_hand = planned_for(kind)
    unet = networks.KINDS[kind].build()
    pool = networks.KINDS[kind].pool(unet)
    assert at_hand.pool_bytes == sum(tensor.nbytes for tensor in pool.tensors.values())
    method, precision = baselines.nearest.METHOD, Precision.parse("w4a8")
    recipe = method.config(**METHODS["nearest"]).recipe()
    quantize_(unet, precision, recipe, pool, networks.generator())
    save_quantized(unet, tmp_path / "quantized.safetensors", {})
    size = planner.checkpoint_bytes(at_hand.network.unet, precision, recipe, SHARED)
    written = sum(tensor.nbytes for tensor in load_file(tmp_path / "quantized.safetensors").values())
    assert size == pytest.approx(written, rel=0.02)
    assert at_hand.cell(at_hand.suite.cells()[1]).disk == 7 * 32 * 32 * 3 + size


def test_what_is_kept_of_an_image_is_what_the_evaluator_puts_out():
    network = EfficientNetLite0(create_model("tf_efficientnet_lite0", pretrained=False).eval())
    with torch.no_grad():
        features, maps = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert planner.KEPT["efficientnet_lite0"] == sum(tensor.numel() for tensor in (*vars(features).values(), *maps))


def test_hours_of_another_device_follow_from_its_rate():
    timed, other = (replace(planned_for(), rate=replace(RATE, on_cpu=False)) for _ in range(2))
    other = replace(other, rate=replace(RATE, assumed=RATE.seconds / 4))
    for ours, theirs in zip(timed.items(), other.items(), strict=True):
        assert ours.seconds == 4 * theirs.seconds and ours.memory == theirs.memory
    text = page.plan({"toy": other.items()}, {"toy": other.rate})
    assert "An evaluation of 1 TFLOP is taken to last 0.125 s (8 TFLOP/s); it took 0.5 s on a test" in text


def allocated(do):
    """Most bytes that the CPU's allocator has held at once while something runs, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        do()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("kind", networks.KINDS)
def test_memory_of_sampling_is_what_a_prediction_allocates(kind):
    """Of a batch of 16, so that activations are more than the weights of a layer."""
    planned, known, images = planned_for(kind, batch=16), networks.KINDS[kind], 16
    unet = known.build()
    given = networks.noise(images), torch.tensor(1), known.conditioning(images), known.settings.guidance_scale
    with torch.no_grad():
        predict_noise(unet, *given)
        taken = allocated(lambda: predict_noise(unet, *given))
    counted = planned.sampling_memory - planned.network.bytes
    assert counted == pytest.approx(taken, rel=0.25)
    assert planned.full_precision().memory == planned.network.bytes + counted


def test_memory_grows_with_the_batch_and_with_what_waits():
    small, large = items(), items(batch=6)
    assert large["full_precision"].memory > small["full_precision"].memory
    found = items()
    assert found["prev/w4a8"].memory > found["nearest/w4a8"].memory > found["full_precision"].memory


def test_a_pass_that_does_not_say_what_it_holds_is_shown(monkeypatch):
    @dataclass(frozen=True)
    class Odd(ActivationRanges):
        def memory(self, shapes, rows):
            return None

    @dataclass(frozen=True)
    class Config(baselines.nearest.Config):
        def recipe(self):
            *others, ranges = super().recipe()
            return *others, Odd(ranges.data)

    usual = items()["nearest/w4a8"]
    monkeypatch.setattr(baselines.nearest, "METHOD", replace(baselines.nearest.METHOD, config=Config))
    planned = planned_for().items()
    (found,) = (item for item in planned if item.name == "nearest/w4a8")
    assert found == replace(usual, memory=None)
    text = page.plan({"toy": planned}, {"toy": RATE})
    assert re.search(r"\| nearest/w4a8 .*\| +\? \|", text) and re.search(r"\| total .*at least", text)


def test_the_text_has_a_line_a_step_and_sums_up():
    downloads = [Item("fetch it", disk=None), Item("fetch that", disk=3 * 2**30)]
    planned = {"downloads": downloads, "toy": planned_for().items()}
    text = page.plan(planned, {"toy": RATE})
    top, *tables = text.split("\n## ")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables[1].splitlines() if line[:1] == "|"]
    rows = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines}
    assert rows["prev/w4a8"]["Quantising"] == "32" and rows["prev/w4a8"]["Reference"] == "–"
    assert re.search(r"\| fetch it .*\| +\? \|", tables[0]) and re.search(r"\| total .* 3.00 .*at least", tables[0])
    whole = planner.total("total", planned["toy"])
    assert rows["total"]["Sampling"] == f"{whole.sampling:,}" == str(35 + 2 * 50)
    assert re.search(rf"\| toy +\| +{whole.evaluations:,} \|", top) and re.search(r"\| all .*at least", top)
    assert text.endswith("An evaluation of 1 TFLOP took 0.5 s on a test, 2 at once (2 TFLOP/s).")
    assert whole.memory == max(item.memory for item in planned["toy"])
    assert planner.total("total", planned["downloads"]).note == "at least"
