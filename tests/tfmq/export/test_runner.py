"""An exported network in the place of the one it was made from."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTPipeline, LDMPipeline

from tests.tfmq import networks
from tests.tfmq.export.executed import SHAPE, quantized
from tests.tfmq.export.kernels import difference
from tfmq.export.description import InputShape
from tfmq.export.openvino import export_openvino
from tfmq.export.runner import ExportedNetwork
from tfmq.network.sampling import sample

pytest.importorskip("openvino", reason="OpenVINO executes the networks: pip install tfmq-bench[deploy]")


def test_it_runs_in_stock_pipelines_and_in_the_own_loop(tmp_path):
    network, _, pool = quantized("tfmq", "w8a8", "deployable")
    export_openvino(network, tmp_path, SHAPE)
    run = ExportedNetwork(tmp_path, threads=1)
    assert (run.dtype, run.device.type, run.config.in_channels) == (torch.float32, "cpu", 3)
    expected = sample(network, networks.scheduler(), networks.noise(4), networks.SETTINGS)
    found = sample(run, networks.scheduler(), networks.noise(4), networks.SETTINGS)
    assert difference(found, expected) < 0.2
    images = []
    for unet in (network, run):
        pipeline = LDMPipeline(networks.first_stage(), network, networks.scheduler())
        pipeline.unet = unet
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(4, generator, num_inference_steps=5, output_type="np").images)
    assert abs(images[0] - images[1]).mean() < 0.05


def test_it_runs_in_the_pipeline_of_a_transformer(tmp_path):
    network, _, pool = quantized("tfmq", "w8a8", "deployable", "transformer")
    export_openvino(network, tmp_path, InputShape(2, 8, 8), pool.timesteps)
    pipeline = DiTPipeline(network, networks.first_stage(), networks.scheduler())
    pipeline.transformer = ExportedNetwork(tmp_path, threads=1)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1], 2.0, torch.Generator().manual_seed(0), 5, "np").images
    assert images.shape[0] == 1 and images.std() > 0
