"""What was measured of a device, by `python -m benchmarks.upkeep.gpu_check`: a file each in ``results/devices``.

`python -m benchmarks plan --like NAME` plans with these numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from benchmarks.planning.planner import Rate
from benchmarks.runtime import environment, files
from benchmarks.suite import discover
from benchmarks.suite.fields import read

FOLDER = environment.ROOT / files.RESULTS / "devices"
FLOAT32, TF32, SIMULATED, EXECUTED = "float32", "TF32", "simulated", "executed"
TERA = 10**12
DONE, FAILED, LATE = "done", "failed", "out of time"


@dataclass(frozen=True)
class Speed:
    """One network, evaluated again and again.

    Attributes:
        network: its class, in diffusers.
        arithmetic: ``float32``, ``TF32``, ``simulated`` (in float32, at w8a8) or ``executed`` (in integers, at w8a8).
        rows: samples in a batch.
        samples_per_second: the median.
        teraflops: 10^12 floating-point operations a second, those of full precision.
        share_of_peak: of what the card's makers state for the arithmetic; None where that is not known.
    """

    network: str
    arithmetic: str
    rows: int
    samples_per_second: float
    teraflops: float
    share_of_peak: float | None = None


@dataclass(frozen=True)
class Part:
    """What came of one part of the check.

    Attributes:
        name: of it.
        status: ``done``, ``failed`` or ``out of time``.
        seconds: it took.
        error: what was raised, or an empty text.
        found: what it measured; of a part that ended early, nothing.
    """

    name: str
    status: str
    seconds: float
    error: str = ""
    found: dict[str, object] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """A device, and what the check has found of it.

    Attributes:
        name: of its file.
        device: what it calls itself.
        tiny: whether networks were tiny, so that no number means anything.
        environment: versions and processor.
        parts: of the check, in order.
    """

    name: str
    device: str
    tiny: bool
    environment: dict[str, object]
    parts: tuple[Part, ...] = ()

    def found(self, part: str) -> dict[str, object]:
        """What a part has measured; nothing where it was not done."""
        return next((each.found for each in self.parts if each.name == part and each.status == DONE), {})

    @property
    def speeds(self) -> tuple[Speed, ...]:
        """The speeds of all networks."""
        return tuple(read(Speed, each, "speeds") for each in self.found("speed").get("speeds", ()))

    def speed(self, network: str, arithmetic: str) -> Speed | None:
        """The speed of a network, or None where it was not measured."""
        return next((each for each in self.speeds if (each.network, each.arithmetic) == (network, arithmetic)), None)

    @property
    def learned(self) -> float | None:
        """What a row that is learned on takes, in evaluations of full precision; None where it was not measured."""
        found = self.found("learning").get("evaluations_a_learned_row")
        return found if isinstance(found, float) else None

    def save(self, folder: Path = FOLDER) -> Path:
        """Write the file; gives its path."""
        path = folder / f"{self.name}.json"
        files.write_json(path, dataclasses.asdict(self))
        return path


def load(name: str, folder: Path = FOLDER) -> Device:
    """What was measured of a device. Raises ValueError for one that was not, or whose numbers mean nothing."""
    known = sorted(path.stem for path in folder.glob("*.json"))
    if name not in known:
        raise discover.unknown(
            "device", name, known, f"`python -m benchmarks.upkeep.gpu_check` writes one to {folder.name}/ on a GPU."
        )
    path = folder / f"{name}.json"
    found = read(Device, files.read_json(path), path.name)
    if found.tiny:
        raise ValueError(f"{path.name} is of tiny networks, whose speed says nothing: measure it without --tiny")
    return found


def of(device: str, folder: Path = FOLDER) -> Device | None:
    """What was measured of the device that calls itself so, or None."""
    found = (read(Device, files.read_json(path), path.name) for path in sorted(folder.glob("*.json")))
    return next((each for each in found if each.device == device and not each.tiny and each.speeds), None)


def rate_on(rate: Rate, network: str, device: Device) -> Rate:
    """The rate of a network's evaluations on a device that was measured: also seconds, where another one was timed.

    A network of a class that was not measured takes the operations a second of the slowest one that was. Raises
    ValueError where none was.
    """
    measured = device.speed(network, FLOAT32) or min(
        (each for each in device.speeds if each.arithmetic == FLOAT32), key=lambda each: each.teraflops, default=None
    )
    if measured is None:
        raise ValueError(f"no speed was measured of {device.device}: run `python -m benchmarks.upkeep.gpu_check` there")
    changes = {} if rate.device == device.device else {"assumed": rate.operations / measured.teraflops / TERA}
    simulated = device.speed(measured.network, SIMULATED)
    if simulated is not None:
        changes["quantized"] = measured.samples_per_second / simulated.samples_per_second
    if device.learned is not None:
        changes["learning"] = device.learned
    fast = device.speed(measured.network, TF32)
    if fast is not None:
        changes["tf32"] = measured.samples_per_second / fast.samples_per_second
    return dataclasses.replace(rate, **changes)
