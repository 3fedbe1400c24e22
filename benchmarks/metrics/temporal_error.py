"""Error of the time embedding: what quantisation does to the signal that tells the UNet its step."""

import torch

from benchmarks.metrics import Evidence, Metric, Value


def compute(evidence: Evidence, generator: torch.Generator) -> Value | None:
    """1 - cosine of time projections to full precision, mean over steps and projections; None where not measured.

    No image enters, and every step and projection is measured rather than drawn: nothing varies from sample to sample,
    so the interval has no width. `n` counts steps times projections.
    """
    if evidence.temporal_error is None:
        return None
    value = evidence.temporal_error.double().mean().item()
    return Value(value=value, low=value, high=value, n=evidence.temporal_error.numel())


METRIC = Metric(
    name="temporal_error", position=100, label="Temporal error", better="lower", digits=6, compute=compute, paired=True
)
