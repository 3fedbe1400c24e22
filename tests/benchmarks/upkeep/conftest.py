"""The tiny suite, for the tests of this folder, and Ctrl-C as it was before a command took it over."""

import signal

import pytest

from benchmarks.upkeep.everything import ENDINGS
from tests.benchmarks.tiny_suite import generate, prepared, run, score, suite

__all__ = ["generate", "prepared", "run", "score", "suite"]


@pytest.fixture(autouse=True)
def interrupts():
    """These tests can be stopped as ever."""
    before = {ending: signal.getsignal(ending) for ending in ENDINGS}
    yield
    for ending, handler in before.items():
        signal.signal(ending, handler)
