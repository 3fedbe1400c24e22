"""Memory is planned from shapes: what waits exactly, the rest as an estimate."""

from __future__ import annotations

import copy

import pytest
import torch
from tfmq.memory import planned_memory

from tests.tfmq import networks, originals
from tfmq.network.calibration import CalibrationRows
from tfmq.network.offload import stream_bytes, waiting_in
from tfmq.network.unet import UNet, UNetLayout
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.plan import quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, quantize_

W4A8 = Precision.parse("w4a8")
ROUNDING = RoundingConfig(iterations=1, batch=8)


def rows_of(unet: UNet, count: int = 20) -> CalibrationRows:
    rows = networks.pool(networks.unconditional()).spaced(5, 4)[:count]
    context = torch.zeros(len(rows), 5, 12) if hasattr(unet, "encoder_hid_proj") else None
    return CalibrationRows(rows.latents, rows.timesteps, context)


@pytest.mark.parametrize("build", [networks.unconditional, networks.conditional])
def test_a_row_takes_on_the_meta_device_what_it_takes_in_memory(build):
    unet = build()
    row = rows_of(unet, 1)
    planned = stream_bytes(copy.deepcopy(unet).to("meta"), UNetLayout.of(unet), row.to(torch.device("meta")))
    assert planned == stream_bytes(unet, UNetLayout.of(unet), row)


def test_a_row_of_the_bedrooms_network_takes_what_its_shapes_say():
    unet = originals.full_size("ldm4_lsun_bedrooms")
    row = CalibrationRows(torch.empty(1, 3, 64, 64, device="meta"), torch.tensor([1]))
    pixels = 64 * 64 * 4
    # The last stage of the way up: 448 channels come in, three times 224 wait on the stack, 224 go out.
    assert stream_bytes(unet, UNetLayout.of(unet), row) == (448 + 3 * 224 + 224) * pixels


def test_networks_and_waiting_rows_are_those_of_a_quantisation():
    unet = networks.unconditional()
    meta = copy.deepcopy(unet).to("meta")
    rows = rows_of(unet)
    config = QuantizationConfig(rounding=ROUNDING, memory_bytes=1)
    planned = planned_memory(meta, W4A8, config, rows, rows)
    assert planned.total == planned.networks + planned.waiting + planned.block and planned.block > 0
    allocated = []

    def allocate(elements: int, dtype: torch.dtype) -> torch.Tensor:
        allocated.append(elements * dtype.itemsize)
        return torch.empty(elements, dtype=dtype)

    with waiting_in(allocate):
        quantize_(unet, W4A8, config, rows, rows, rows.timesteps.unique(), networks.generator())
    assert max(allocated) < planned.waiting < sum(allocated)
    weights = sum(parameter.nbytes for parameter in unet.parameters())
    codes = sum(layer.codes.nbytes for layer in quantized_layers(unet).values())
    assert planned.networks == 2 * weights + codes


def test_rows_wait_and_batches_count_where_something_is_learned():
    meta = networks.unconditional().to("meta")
    rows = rows_of(meta)

    def planned(config: QuantizationConfig, count: int = 20, precision: Precision = W4A8):
        return planned_memory(meta, precision, config, rows[:count], rows[:4])

    nearest = planned(QuantizationConfig())
    assert nearest.waiting == 0 < nearest.block
    assert planned(QuantizationConfig(), precision=Precision.parse("w4a32")).block == 0
    learned = planned(QuantizationConfig(rounding=ROUNDING))
    assert learned.waiting == 2 * planned(QuantizationConfig(step_sizes=StepSizeConfig(1))).waiting
    assert learned.waiting == 2 * planned(QuantizationConfig(rounding=ROUNDING), 10).waiting
    assert learned.block > nearest.block and learned.networks == nearest.networks
    more = planned(QuantizationConfig(rounding=RoundingConfig(iterations=1, batch=16)))
    assert learned.block < more.block < 2 * learned.block


def test_networks_with_weights_are_refused():
    unet = networks.unconditional()
    rows = rows_of(unet)
    with pytest.raises(ValueError, match="on the meta device, and this one is on cpu"):
        planned_memory(unet, W4A8, QuantizationConfig(), rows, rows)


def test_attention_in_floating_point_takes_no_matrix_of_probabilities():
    unet = networks.conditional().to("meta")
    latents = torch.empty(8, unet.config.in_channels, 64, 64, device="meta")
    rows = CalibrationRows(latents, torch.arange(8), torch.empty(8, 5, 12, device="meta"))
    planned = planned_memory(unet, Precision.parse("w4a32"), QuantizationConfig(rounding=ROUNDING), rows, rows)
    assert planned.block < len(rows) * 4 * (64 * 64) ** 2
