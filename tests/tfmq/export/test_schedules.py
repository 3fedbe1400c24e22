"""Exported networks and the time steps that they are sampled at."""

from __future__ import annotations

import pytest
import torch

from tests.tfmq import networks
from tests.tfmq.export.executed import SHAPE, quantized
from tests.tfmq.export.kernels import SATURATES, difference
from tfmq.export.openvino import export_openvino
from tfmq.export.runner import ExportedNetwork
from tfmq.network.sampling import sample
from tfmq.passes.correction import corrected_scheduler

pytest.importorskip("openvino", reason="OpenVINO executes the networks: pip install tfmq-bench[deploy]")


def test_a_noise_correction_goes_with_it(tmp_path):
    network, _, pool = quantized("ptqd", "w8a8")
    export_openvino(network, tmp_path, SHAPE, pool.timesteps)
    with pytest.warns(UserWarning, match="noise correction"):
        run = ExportedNetwork(tmp_path, threads=1)
    assert corrected_scheduler(networks.scheduler(), run) is not None
    expected = sample(network, networks.scheduler(), networks.noise(4), networks.SETTINGS)
    assert difference(sample(run, networks.scheduler(), networks.noise(4), networks.SETTINGS), expected) < 0.2


def test_some_of_the_time_steps_may_be_exported(tmp_path):
    network, _, pool = quantized("tfmq_per_step", "w8a8")
    steps = pool.timesteps.unique()
    export_openvino(network, tmp_path, SHAPE, steps[[1, 4]])
    run, x = ExportedNetwork(tmp_path, threads=1), networks.noise(4)
    for step in steps[[1, 4]]:
        with torch.no_grad():
            assert SATURATES or difference(run(x, step).sample, network(x, step).sample) < 0.08
    with pytest.raises(ValueError, match=r"exported for the 2 steps \["):
        run(x, steps[0])
    with pytest.raises(ValueError, match="different time steps"):
        run(x, steps[[1, 4, 1, 4]])
