"""What only a GPU can tell, in eight minutes: what runs, whether integers are exact, how fast, in how much memory.

`python -m benchmarks.upkeep.gpu_check` writes `results/devices/NAME.json`; `python -m benchmarks plan --like NAME`
plans with it. It needs torch with CUDA, what `pip install -e .[bench]` installs, and no network. Each part runs in a
process of its own, and has its own time: one that fails, or takes too long, is recorded with its error, and the others
go on. `--only PART...` runs some of them, and leaves the others in the file where these are of the same device,
versions and commit. Exit code 1 where one does not end well, or the file cannot be written; 2 without a GPU.
`--device cpu --tiny` runs all of it on tiny networks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.planning import devices
from benchmarks.planning.devices import DONE, FAILED, LATE, Device, Part
from benchmarks.runtime import environment, files
from benchmarks.runtime.devices import device_of
from benchmarks.suite.fields import read
from benchmarks.upkeep import INTERRUPTED, gpu_parts
from benchmarks.upkeep.gpu_parts import Setup

NO_GPU = 2
# In the order of what they are worth, with the seconds that each may take.
PARTS: Mapping[str, tuple[Callable[[Setup], dict[str, object]], int]] = {
    "agreement": (gpu_parts.agreement, 80),
    "speed": (gpu_parts.speed, 80),
    "learning": (gpu_parts.learning, 90),
    "smoke": (gpu_parts.smoke_run, 150),
    "shards": (gpu_parts.shards, 70),
}
# Of a part's time, what is left to end in after the last piece of work was begun.
LAST_SECONDS = 15
# What of an environment two equal ones may differ in: each part has one thread, and `modified` is looked at by itself.
UNCOMPARED = ("threads", "modified")


def run_part(name: str, device: torch.device, tiny: bool, seconds: float) -> Part:
    """Run a part in the current folder, in this process; whatever it raises is in what it returns."""
    do = PARTS[name][0]
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        found = do(gpu_parts.setup(device, tiny, seconds - LAST_SECONDS))
    except Exception as error:  # the other parts are worth running
        return Part(name, FAILED, time.monotonic() - start, gpu_parts.in_a_line(error))
    wrong = found.get("wrong", [])
    assert isinstance(wrong, list)
    return Part(name, FAILED if wrong else DONE, time.monotonic() - start, "; ".join(wrong[:3]), found)


def run_apart(name: str, device: torch.device, tiny: bool, seconds: float) -> Part:
    """Run a part in a process of its own, which is ended after its time: an error of CUDA stays in there."""
    start = time.monotonic()
    output = Path(f"{name}.json")
    command = [sys.executable, "-m", __spec__.name, "--part", name, "--device", device.type, "--seconds", str(seconds)]
    paths = os.pathsep.join(str(Path(path).resolve()) for path in (environment.ROOT, *filter(None, sys.path)))
    try:
        done = subprocess.run(
            [*command, *["--tiny"] * tiny],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            env=os.environ | {"PYTHONPATH": paths},
        )
    except subprocess.TimeoutExpired:
        return Part(name, LATE, time.monotonic() - start, f"ended after {seconds:.0f} s")
    if not output.is_file():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Part(name, FAILED, time.monotonic() - start, f"the process ended with code {done.returncode}: {last}")
    return read(Part, files.read_json(output), output.name)


def check(
    device: torch.device,
    tiny: bool,
    names: list[str],
    folder: Path = devices.FOLDER,
    run: Callable[[str, torch.device, bool, float], Part] = run_apart,
) -> Device:
    """Run some parts and write what they find after each, so that nothing is lost where all is ended.

    The others are those of the file that is there, if it is of the same device and code; else a line says that it is
    begun anew. Raises OSError, before the first, where the file cannot be written.
    """
    called = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", called.lower()).strip("-") + ("-tiny" if tiny else "")
    found = Device(slug, called, tiny, environment.describe(device))
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    found = dataclasses.replace(found, parts=_kept(found, names, folder))
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        os.chdir(scratch)
        try:
            gpu_parts.write_suite(Path())
            for name in names:
                print(f"{name} ...", flush=True)
                part = run(name, device, tiny, PARTS[name][1])
                parts = {each.name: each for each in (*found.parts, part)}
                found = dataclasses.replace(found, parts=tuple(parts[each] for each in PARTS if each in parts))
                found.save(folder)
                print(f"{name}: {part.status} in {part.seconds:.0f} s {part.error}".rstrip(), flush=True)
        finally:
            os.chdir(before)
    return found


def _kept(found: Device, names: Collection[str], folder: Path) -> tuple[Part, ...]:
    """The parts besides ``names`` of the device's file in ``folder``, which stay where it is of the same code."""
    path = folder / f"{found.name}.json"
    if not path.is_file() or set(names) == set(PARTS):
        return ()
    try:
        before = read(Device, files.read_json(path), path.name)
    except ValueError as error:
        print(f"{path.name} cannot be read and is begun anew: {error}", flush=True)
        return ()
    others = tuple(part for part in before.parts if part.name in PARTS and part.name not in names)
    old, new = before.environment, found.environment
    differ = [what for what in new if what not in UNCOMPARED and old.get(what) != new[what]]
    uncommitted = any(each.get("commit") is None or each.get("modified") for each in (old, new))
    if not others or not (differ or uncommitted):
        return others
    why = f"other {', '.join(differ)}" if differ else "code that no commit has"
    print(f"{path.name} is begun anew, without its other parts: {why}", flush=True)
    return ()


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upkeep.gpu_check", description=__doc__)
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="what to check (default: cuda); cpu needs --tiny"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to see that all parts run")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=tuple(PARTS), help="these parts alone")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: networks of full size take a CPU hours")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU that torch sees: nothing was checked (--device cpu --tiny tries the check itself)")
        return NO_GPU
    device = device_of(options.device)
    if options.part:
        part = run_part(options.part, device, options.tiny, options.seconds)
        files.write_json(Path(f"{options.part}.json"), asdict(part))
        return 0
    try:
        found = check(device, options.tiny, options.only)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what the finished parts have found is kept", file=sys.stderr)
        return INTERRUPTED
    print(f"{devices.FOLDER / found.name}.json")
    print(json.dumps({part.name: part.status for part in found.parts}))
    return 0 if all(part.status == DONE for part in found.parts if part.name in options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
