"""What the tests of learning share: the recorded runs of released code, and how close a run has to come to them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from tests.tfmq.oracle import described, read, regularizer, said, settings, tensors
from tfmq.numerics.rounding import annealed_beta
from tfmq.passes import reconstruction
from tfmq.passes.reconstruction import RoundingConfig

BLOCK, TIME = "09a_block_reconstruction", "09b_time_embedding_reconstruction"


def bits(case):
    return int(*read(settings(case), "#-bit affine weights"))


def rounding_config(case):
    text = settings(case)
    iterations, batch = tensors(case)["idx"].shape
    return RoundingConfig(
        iterations=iterations,
        batch=batch,
        learning_rate=read(text, "Adam (?:with learning rate )?#")[0],
        regularizer_weight=read(text, "rounding weight #")[0],
        warmup=read(text, "warm-up #")[0],
    )


def recorded_betas(case):
    """`annealed_beta` between the recorded ends."""
    start, end = read(settings(case), r"\bb # to #")
    return partial(annealed_beta, start=start, end=end)


@contextmanager
def learning(case) -> Iterator[pytest.MonkeyPatch]:
    """While the loop that learns has the recorded betas."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "annealed_beta", recorded_betas(case))
        yield patch


def learned_layers(case):
    """The original names of the layers whose rounding was learned, in their order."""
    matches = [re.fullmatch(r"(.*)\.alpha_end", name) for name in described(case)["tensors"]]
    return [match[1] for match in matches if match]


def seed(case):
    """The seed of the originals' batches, which they drew from torch's global generator; ours has one of its own."""
    return int(*read(said(case, "idx"), "seeded by #"))


def tolerance(case, pattern):
    """Numbers of the case's tolerance, which may be that of another case."""
    text = described(case)["tolerance"]
    return read(described(BLOCK)["tolerance"] if text == "as 09a" else text, pattern)


def assert_starts_alike(loss, name, case):
    (relative,) = tolerance(case, "loss.nearest and loss.soft_start relative #")
    torch.testing.assert_close(loss, tensors(case)[name], rtol=relative, atol=0)


class Recorded:
    """What happens while ``learn_rounding`` runs on the case's ``layers``; wrap the loss in ``watch``."""

    def __init__(self, layers, case):
        self.layers, self.config, self.beta = layers, rounding_config(case), recorded_betas(case)
        self.reconstruction, self.penalty, self.alphas = [], [], []

    def watch(self, loss):
        def watched(rows):
            self.roundings = [layer.rounding for layer in self.layers]
            self.alphas.append([rounding.alpha.detach().clone() for rounding in self.roundings])
            value = loss(rows)
            beta = self.beta(len(self.reconstruction) + 1, self.config.iterations, self.config.warmup)
            penalty = 0.0 if beta is None else sum(float(regularizer(r.h, beta)) for r in self.roundings)
            self.reconstruction.append(value.item())
            self.penalty.append(self.config.regularizer_weight * penalty)
            return value

        return watched


def assert_learned_as_well_as_published(loss, case):
    values = tensors(case)
    (factor,) = tolerance(case, "at most # times the largest of loss.hard_end")
    worst = max(values["loss.hard_end"], values["loss.hard_end_other_seeds"].max())
    assert loss <= factor * worst and loss < values["loss.nearest"]


def assert_follows_published_trace(recorded, case):
    values = tensors(case)
    pattern = r"trace.\* relative # for the first # iterations, alpha_after_# absolute # for at least # percent"
    relative, first, after, absolute, percent = tolerance(case, pattern)
    first = slice(0, int(first))
    for found, name in ((recorded.reconstruction, "rec"), (recorded.penalty, "round")):
        torch.testing.assert_close(torch.tensor(found[first]), values[f"trace.{name}"][first], rtol=relative, atol=0)
    torch.testing.assert_close(torch.tensor(recorded.penalty), values["trace.round"], rtol=relative, atol=1e-6)
    ends = [rounding.alpha for rounding in recorded.roundings]
    # Adam turns the float error of a gradient near 0 into a step of its own, so a few alphas may part.
    for stage, alphas in ((f"after_{int(after)}", recorded.alphas[int(after)]), ("end", ends)):
        for name, alpha in zip(learned_layers(case), alphas, strict=True):
            close = (alpha - values[f"{name}.alpha_{stage}"]).abs() <= absolute
            assert close.float().mean() >= percent / 100
