"""A quantised checkpoint is rebuilt from its file alone, bit for bit, or refused with one clear line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tfmq import networks
from tfmq.checkpoint import (
    full_precision_bytes,
    load_quantized,
    pack,
    packed_bytes,
    read_metadata,
    save_quantized,
    unpack,
)
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, quantize_


@pytest.fixture
def quantized():
    unet = networks.unconditional()
    pool = networks.pool(unet)
    rows = pool.spaced(5, 4)
    config = QuantizationConfig(split_shortcuts=True, activation_scales="per_step")
    quantize_(unet, Precision.parse("w4a8"), config, rows, rows, pool.timesteps, networks.generator())
    return unet


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [6, 7])
def test_packing_is_reversible_and_tight(bits, count):
    codes = torch.randint(0, 2**bits, (count, 3), dtype=torch.uint8, generator=networks.generator())
    packed = pack(codes, bits)
    assert len(packed) == (codes.numel() + 1) // 2 if bits <= 4 else len(packed) == codes.numel()
    assert torch.equal(unpack(packed, bits, codes.shape), codes)


@torch.no_grad()
def test_saved_and_reloaded_is_bit_for_bit_the_same(quantized, tmp_path):
    path = tmp_path / "q.safetensors"
    save_quantized(quantized, path, {"method": "nearest"})
    loaded = load_quantized(path)
    x, steps = networks.noise(), torch.tensor([801, 1, 401, 201])
    assert torch.equal(loaded(x, steps).sample, quantized(x, steps).sample)
    assert read_metadata(path) == {"method": "nearest"}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="no activation range for time step 2"):
        loaded(x, 2)


def test_size_is_that_of_four_bit_codes(quantized, tmp_path):
    path = tmp_path / "q.safetensors"
    save_quantized(quantized, path, {})
    with safe_open(path, "pt") as file:
        assert file.get_tensor("mid_block.resnets.0.conv1.codes").numel() == 32 * 32 * 9 // 2
    assert packed_bytes(quantized) < path.stat().st_size < 0.5 * full_precision_bytes(quantized)


@pytest.mark.parametrize("keep", [4, 100, 20_000])
def test_truncated_file_is_refused(quantized, tmp_path, keep):
    path = tmp_path / "q.safetensors"
    save_quantized(quantized, path, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_quantized(path)


def test_other_files_and_missing_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no quantised checkpoint"):
        load_quantized(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a quantised checkpoint"):
        load_quantized(tmp_path / "other.safetensors")


def test_tensors_that_do_not_match_the_description_are_named(quantized, tmp_path):
    path = tmp_path / "q.safetensors"
    save_quantized(quantized, path, {})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    codes = tensors.pop("conv_in.codes")
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"missing \['conv_in.codes'\]"):
        load_quantized(path)
    save_file(tensors | {"conv_in.codes": codes[:-1]}, path, metadata)
    with pytest.raises(ValueError, match="does not match its description"):
        load_quantized(path)
    save_file(tensors | {"conv_in.codes": codes}, path, metadata | {"unet_class": json.dumps("os.system")})
    with pytest.raises(ValueError, match="known are UNet2DModel"):
        load_quantized(path)
