"""What `generate` leaves of a cell beside its images and `score` reads: `outcome.json`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from benchmarks.suite.record import Value


@dataclass(frozen=True)
class Pass:
    """What one pass of a quantisation has spent, as in `tfmq.session.Spent`."""

    name: str
    seconds: float
    unet_evaluations: int
    optimizer_steps: int


@dataclass(frozen=True)
class Layer:
    """How a layer is treated, as in `tfmq.plan.Coverage`."""

    path: str
    kind: str
    weight_bits: int
    activation_bits: int
    reason: str


@dataclass(frozen=True)
class Quantized:
    """What quantising a cell's network gave; for full precision only sizes and memory are set.

    Attributes:
        size_mib, full_precision_size_mib: of the network's weights as stored.
        peak_memory_mib: most memory that the process held.
        passes: what each has spent, in order.
        coverage: every layer.
        details: what the method tells of its own choices; of full precision, under ``tf32``, `TensorFloat32` where its
            task asks for that.
    """

    size_mib: float
    full_precision_size_mib: float
    peak_memory_mib: float
    passes: tuple[Pass, ...] = ()
    coverage: tuple[Layer, ...] = ()
    details: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorFloat32:
    """How far full precision in TF32 is from itself in float32, on the same noise.

    Attributes:
        images: that were drawn in both, the first ones; 0 where the device has no TF32, and all are in float32.
        mean, largest: over these, of ||a - b|| / ||b|| of the final latents a in TF32 and b in float32.
        feature_distance: of the images, with its interval, as `benchmarks.suite.record.Value`; None before `score`.
    """

    images: int = 0
    mean: float = 0.0
    largest: float = 0.0
    feature_distance: Value | None = None


@dataclass(frozen=True)
class Made:
    """How a cell's images were made.

    Attributes:
        device: its name.
        environment: versions and processor.
        sample_seconds: of all batches together.
        images: SHA-256 of the folder of images.
    """

    device: str
    environment: dict[str, object]
    sample_seconds: float
    images: str
    quantized: Quantized


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        status: ``measured`` or ``not applicable``.
        reason: why it was not measured, or an empty text.
        settings: of the method, resolved.
        inputs: name -> SHA-256 of what the cell was made from.
        made: None where there is nothing.
    """

    status: str
    reason: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    made: Made | None = None

    def to_json(self) -> dict[str, object]:
        """As JSON holds it; `benchmarks.suite.fields.read` is the way back."""
        return dataclasses.asdict(self)
