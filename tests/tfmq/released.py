"""What the tests of learning share: the recorded runs of released code, and how close a run has to come to them."""

from __future__ import annotations

import torch

from tests.tfmq.oracle import regularizer, tensors
from tfmq.numerics.rounding import annealed_beta
from tfmq.passes.reconstruction import RoundingConfig

BITS = 4
# The originals drew their batches from torch's global generator with this seed; ours has a generator of its own.
TIME, TIME_SEED = "09b_time_embedding_reconstruction", 11


def rounding_config(case):
    iterations, batch = tensors(case)["idx"].shape
    return RoundingConfig(iterations=iterations, batch=batch)


class Recorded:
    """What happens while ``learn_rounding`` runs on ``layers``; wrap the loss in ``watch``."""

    def __init__(self, layers, config):
        self.layers, self.config = layers, config
        self.reconstruction, self.penalty, self.after_10 = [], [], []

    def watch(self, loss):
        def watched(rows):
            self.roundings = [layer.rounding for layer in self.layers]
            if len(self.reconstruction) == 10:
                self.after_10 = [rounding.alpha.detach().clone() for rounding in self.roundings]
            value = loss(rows)
            beta = annealed_beta(len(self.reconstruction) + 1, self.config.iterations, self.config.warmup)
            penalty = 0.0 if beta is None else sum(float(regularizer(r.h, beta)) for r in self.roundings)
            self.reconstruction.append(value.item())
            self.penalty.append(self.config.regularizer_weight * penalty)
            return value

        return watched


def assert_learned_as_well_as_published(loss, values):
    worst = max(values["loss.hard_end"], values["loss.hard_end_other_seeds"].max())
    assert loss <= 1.02 * worst and loss < values["loss.nearest"]


def assert_follows_published_trace(recorded, names, values):
    first = slice(0, 50)
    for found, name in ((recorded.reconstruction, "rec"), (recorded.penalty, "round")):
        torch.testing.assert_close(torch.tensor(found[first]), values[f"trace.{name}"][first], rtol=1e-2, atol=0)
    torch.testing.assert_close(torch.tensor(recorded.penalty), values["trace.round"], rtol=1e-2, atol=1e-6)
    # Adam turns the float error of a gradient near 0 into a step of its own, so a few alphas may part.
    for rounding, alpha, name in zip(recorded.roundings, recorded.after_10, names, strict=True):
        for found, stage in ((alpha, "after_10"), (rounding.alpha, "end")):
            close = (found - values[f"{name}.alpha_{stage}"]).abs() <= 1e-3
            assert close.float().mean() >= 0.995
