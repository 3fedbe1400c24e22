"""A draw of rows that the pool does not hold: its samples with new noise, as many as are asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tfmq.network.calibration import CalibrationSet
from tfmq.network.rows import CalibrationRows
from tfmq.settings import check_counts


@dataclass(frozen=True)
class FreshNoise:
    """Samples of the pool noised anew: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, at steps of the schedule at random.

    Many parameters that learn on few rows fit these rows alone. Of the rows drawn here no two are alike.

    Attributes:
        rows: how many; under guidance both halves are counted.
    """

    rows: int

    def __post_init__(self) -> None:
        check_counts(self, "rows", least=2)

    def __call__(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """The rows. Raises ValueError for a pool that was recorded with a ControlNet."""
        if pool.residuals:
            raise ValueError(
                "the pool was recorded with a ControlNet, whose residuals follow the latents, and FreshNoise makes "
                "latents of its own: record it without, or draw Spaced rows"
            )
        count = self.rows if pool.unconditional is None else self.rows // 2
        image = torch.arange(count) % pool.images
        step = torch.randint(pool.steps, (count,), generator=generator)
        clean = pool.samples[image]
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        alpha = pool.alphas[step].to(clean).view(-1, *[1] * (clean.dim() - 1))
        latents = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        rows = pool.rows(step, image)
        return replace(rows, latents=latents if len(rows) == count else torch.cat([latents, latents]))
