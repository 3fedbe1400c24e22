"""How much less work does the recommended recipe need to reach the error of an earlier version's TFMQ-DM?

`python -m benchmarks.upkeep.earlier --task emoji-ldm4` quantises a task's network by TFMQ-DM as it was at a commit, in
a process of its own, and by today's recommended recipe with more and more calibration, all on one thread. All get the
same calibration pool, and their noise error is measured as `python -m benchmarks study` does, on the same noise, which
no cell uses. CPU seconds are those of the whole quantisation.

The commit has to be one of this repository's history whose `tfmq` and `baselines` quantise diffusers' UNets as c6241a7
did; it knows no transformers. Its packages are unpacked into a temporary folder. Nothing is kept of a run that is
stopped.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from benchmarks.report.tables.markdown import table
from benchmarks.runtime import environment
from benchmarks.stages import study
from benchmarks.stages._setup import seed_of, task_of
from benchmarks.suite import params
from tfmq.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.suite.params import Suite
    from benchmarks.suite.tasks import Task
    from tfmq.passes import Recipe

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c6241a7"
PACKAGES = ("tfmq", "baselines")
IMAGES = 64
METHOD = "recommended"
# Of the recommended recipe, from the cheapest to its default.
VARIANTS: tuple[dict[str, object], ...] = (
    {"rows": 320, "range_images": 16},
    {"rows": 320, "range_images": 16, "range_margin": 0.2},
    {"range_images": 16, "range_margin": 0.2},
    {},
)
# Runs with the earlier packages on its path; arguments are the folder of the job and that of the network.
EARLIER = """
import json, sys, time
from pathlib import Path
import diffusers, torch
from safetensors.torch import load_file, save_file
from baselines import _brecq, tfmq
from tfmq.calibration import CalibrationSet
from tfmq.plan import SHARED
from tfmq.precision import Precision
from tfmq.sampling import SamplingSettings

torch.set_num_threads(1)
folder, checkpoint = map(Path, sys.argv[1:])
job = json.loads((folder / "job.json").read_text())
pool = CalibrationSet(**load_file(folder / "pool.safetensors"), settings=SamplingSettings(*job["sampling"]))
held_out = CalibrationSet(**load_file(folder / "held_out.safetensors"), settings=pool.settings)
name = json.loads((checkpoint / "config.json").read_text())["_class_name"]
network = getattr(diffusers, name).from_pretrained(checkpoint)
config, generator = tfmq.Config(**job["settings"]), torch.Generator().manual_seed(job["seed"])
start = time.process_time()
_brecq.quantize(network, pool, Precision.parse(job["precision"]), config, generator, SHARED)
seconds = time.process_time() - start
noise = []
with torch.no_grad():
    for step in range(held_out.steps):
        rows = held_out.rows(torch.full((held_out.images,), step), torch.arange(held_out.images))
        given = () if rows.context is None else (rows.context,)
        predicted = network(rows.latents, held_out.timesteps[step], *given).sample
        if held_out.unconditional is not None:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + job["sampling"][2] * (conditional - unconditional)
        noise.append(predicted)
save_file({"noise": torch.stack(noise)}, folder / "noise.safetensors")
(folder / "seconds.json").write_text(json.dumps(seconds))
"""


@dataclass(frozen=True)
class Measured:
    """One quantisation: what it was, its CPU seconds, and its noise error."""

    what: str
    seconds: float
    error: float


def unpack(commit: str, folder: Path) -> None:
    """The packages of a commit, in ``folder``. Raises ValueError where this repository does not have them."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, "--", *PACKAGES]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(
            f"git archive {commit}: {done.stderr.decode().strip()}. Give a commit of this repository; a shallow clone"
            " gets the others with `git fetch --unshallow`"
        )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def by_earlier(tree: Path, bench: study.Bench, precision: str, settings: Mapping[str, object]) -> Measured:
    """TFMQ-DM as the packages in ``tree`` do it. Raises ValueError where they cannot."""
    task = bench.task
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The fields that it knows are all of a UNet's pool.
        known = ("latents", "timesteps", "noise", "samples", "alphas", "context", "unconditional")
        for pool, file in ((bench.calibration(0), "pool"), (bench.held_out, "held_out")):
            tensors = {key: pool.tensors[key].contiguous() for key in known if key in pool.tensors}
            save_file(tensors, folder / f"{file}.safetensors")
        job = {
            "precision": precision,
            "sampling": [task.steps, task.eta, task.guidance_scale],
            "settings": dict(settings),
            "seed": seed_of(task.name, task.version, "quantize", 0),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        checkpoint = Path(task.checkpoint).absolute() / "unet"
        command = [sys.executable, "-c", EARLIER, str(folder), str(checkpoint)]
        done = subprocess.run(command, cwd=tree, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            raise ValueError(f"the earlier version could not quantise {task.name}: {last}")
        predicted = load_file(folder / "noise.safetensors")["noise"]
        exact = bench.held_out.noise
        errors = (predicted - exact).flatten(2).norm(dim=2) / exact.flatten(2).norm(dim=2)
        seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    return Measured(f"TFMQ-DM then, {settings['iterations']} iterations", seconds, errors.mean().item())


def variants(suite: Suite, task: Task, precision: str) -> dict[str, tuple[study.Point, Recipe]]:
    """What the recommended recipe is measured with, by its label: each of `VARIANTS` that is unlike those before it.

    Raises ValueError for a precision that does not exist, or that the recipe does not apply to.
    """
    Precision.parse(precision)
    found: dict[str, tuple[study.Point, Recipe]] = {}
    seen = []
    for settings in VARIANTS:
        what = "Recommended" + "".join(f", {name} {value}" for name, value in settings.items())
        point = study.Point(what, METHOD, settings, "shared", precision, 0)
        recipe = study.recipe_of(suite, task, point)
        if recipe not in seen:
            found[what] = point, recipe
            seen.append(recipe)
    return found


def page(task: str, precision: str, earlier: Sequence[Measured], recommended: Sequence[Measured]) -> str:
    """A table: what each took, and its share of the seconds of each earlier run whose error it reaches."""
    rows = []
    for one in (*earlier, *recommended):
        row = {"What": one.what, "Noise error": f"{one.error:.4f}", "CPU seconds": f"{one.seconds:.1f}"}
        for other in earlier:
            reaches = one.error <= other.error and one is not other
            row[f"Share of {other.what.rpartition(', ')[2]}"] = f"{one.seconds / other.seconds:.1%}" if reaches else ""
        rows.append(row)
    return f"## {task}, {precision}\n\n{table(rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upkeep.earlier", description=__doc__)
    parser.add_argument(
        "--task", nargs="+", default=["emoji-ldm4"], help="tasks whose network is a UNet (default: emoji-ldm4)"
    )
    parser.add_argument("--precision", default="w4a8", help="such as w8a8 (default: w4a8)")
    parser.add_argument("--commit", default=COMMIT, help=f"whose TFMQ-DM is compared with (default: {COMMIT})")
    parser.add_argument(
        "--iterations",
        nargs="+",
        type=int,
        default=[400],
        metavar="N",
        help="of the earlier TFMQ-DM, one run each (default: 400); other settings are those of the suite's rows",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        suite = params.load(Path("params.yaml"))
        tasks = [task_of(suite, name) for name in options.task]
        for task in tasks:
            if not (Path(task.checkpoint) / "unet").is_dir():
                raise ValueError(f"{task.checkpoint} has no unet: the earlier version quantises no other network")
        chosen = {task.name: variants(suite, task, options.precision) for task in tasks}
        with tempfile.TemporaryDirectory() as name:
            tree = Path(name)
            unpack(options.commit, tree)
            machine = environment.machine()
            print(f"{machine['cpu']}, {machine['instructions']}, one thread, torch {torch.__version__}", flush=True)
            for task in tasks:
                bench = study.Bench(task, IMAGES)
                earlier, recommended = [], []
                for iterations in tqdm(options.iterations, "TFMQ-DM then"):
                    settings = suite.settings(task.name, "tfmq") | {"iterations": iterations}
                    earlier.append(by_earlier(tree, bench, options.precision, settings))
                for what, (point, recipe) in tqdm(chosen[task.name].items(), "recommended now"):
                    found = bench.measure(point, recipe)
                    recommended.append(Measured(what, found["cpu_seconds"], found["noise_error"]["value"]))
                print(page(task.name, options.precision, earlier, recommended), flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
