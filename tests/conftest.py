"""What all tests share: the repository's root, and one thread, so that numbers do not depend on the machine."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def root() -> Path:
    return Path(__file__).parents[1]
