"""What a task is: a checkpoint, how to sample from it, and how the samples are scored."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from benchmarks.suite import discover

SCHEDULERS = ("ddim", "ddim_quad", "pndm", "euler")
# Those that take eta; steps of the others add no noise.
WITH_ETA = ("ddim", "ddim_quad")
# Images of full precision that are drawn in float32 too, where TF32 draws them.
CHECKED = 256


@dataclass(frozen=True)
class Task:
    """A checkpoint, how to sample from it, and how the samples are scored.

    Paths are relative to the suite's folder.

    Attributes:
        version: goes up with every change that moves numbers; results of different versions are never compared.
        family: a file of `benchmarks/models`, which loads the ``checkpoint``.
        checkpoint: folder of the full-precision model.
        resolution: pixels a side of the images.
        scheduler: ``ddim``; ``ddim_quad``, whose time steps have evenly spaced square roots up to that of 800;
            ``pndm``, which evaluates the network once more, twice at the second time step; or ``euler``.
        steps: denoising steps.
        eta: share of the noise that a DDIM step adds, from 0 (deterministic) to 1.
        guidance_scale: of classifier-free guidance; 1 for none.
        images: scored for each cell.
        batch: images sampled at once; part of the task, since rounding differs between batch sizes.
        calibration_images: of a calibration pool.
        reference_images: full-precision samples that give the distribution to compare with; 0 for none.
        evaluator: a file of `benchmarks/features`, which sees all images.
        dataset: a file of `benchmarks/datasets`, which reads ``data``.
        data: folder of the real images that samples are compared with.
        data_images: how many of them, from the first; None for all.
        statistics: published moments of a data set; with ``data`` too, images are compared with these moments and the
            features of ``data``.
        second_evaluator: gives one more distance to the data.
        prompts: folder with ``calibration.txt`` and ``evaluation.txt``, a prompt a line; None without conditioning.
        clip: folders of the CLIPs that score how well images match their prompts.
        tf32: whether a GPU may draw the images of full precision in TF32, as PyTorch's convolutions are by default. All
            else is in float32: calibration, quantised networks, the trajectory that their errors are measured along,
            reference samples, and what is drawn in rounds. A device without TF32 draws in float32.
    """

    name: str
    version: int
    family: str
    checkpoint: str
    resolution: int
    scheduler: str
    steps: int
    eta: float
    guidance_scale: float
    images: int
    batch: int
    calibration_images: int
    reference_images: int
    evaluator: str
    dataset: str | None = None
    data: str | None = None
    data_images: int | None = None
    statistics: str | None = None
    second_evaluator: str | None = None
    prompts: str | None = None
    clip: tuple[str, ...] = ()
    tf32: bool = False

    @property
    def checked_batches(self) -> int:
        """How many batches of full precision are drawn in float32 too, where TF32 draws them: the first ones."""
        return -(-min(CHECKED, self.images) // self.batch)

    def described(self) -> dict[str, object]:
        """The fields, as records hold them: `tf32` only where it is true, so that records from before it stay valid."""
        return {name: value for name, value in asdict(self).items() if name != "tf32" or value}

    def __post_init__(self) -> None:
        counts = ("images", "batch", "calibration_images", "data_images")
        for name in ("version", "resolution", "steps", *counts):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"task {self.name}: {name} is {value}, but must be at least 1")
        if self.reference_images < 0:
            raise ValueError(f"task {self.name}: reference_images is {self.reference_images}, but must be at least 0")
        if (self.dataset is None) != (self.data is None):
            raise ValueError(f"task {self.name}: give dataset and data together: what reads it, and where it lies")
        if self.data is None and self.statistics is None:
            raise ValueError(f"task {self.name}: give dataset and data, or statistics, to compare images with")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"task {self.name}: eta is {self.eta}, but must be from 0 (deterministic) to 1")
        if self.scheduler not in SCHEDULERS:
            raise discover.unknown(f"scheduler of task {self.name}", self.scheduler, SCHEDULERS, "Choose one of them.")
        if self.guidance_scale < 0:
            raise ValueError(f"task {self.name}: guidance_scale is {self.guidance_scale}, but must be at least 0")
        if self.eta > 0 and self.scheduler not in WITH_ETA:
            raise ValueError(f"task {self.name}: eta is {self.eta}, but {self.scheduler} adds no noise: give 0")
        if self.prompts is None:
            if self.clip:
                raise ValueError(f"task {self.name}: clip scores how images match prompts, but there are no prompts")
            if self.guidance_scale != 1:
                raise ValueError(
                    f"task {self.name}: guidance_scale is {self.guidance_scale}, but without prompts only 1"
                )
