"""The tiny suite, for the tests of this folder."""

from tests.benchmarks.tiny_suite import generate, prepared, run, score, suite

__all__ = ["generate", "prepared", "run", "score", "suite"]
