"""A quantised checkpoint is rebuilt from its file alone, bit for bit, or refused with one clear line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tfmq import networks
from tfmq import checkpoint
from tfmq.checkpoint import load_quantized, read_metadata, save_quantized
from tfmq.network.backbone import full_precision_bytes
from tfmq.packing import pack, packed_bytes, unpack


@pytest.fixture
def quantized():
    return networks.quantized(networks.recipe(split_shortcuts=True, scales="per_step"))[0]


@pytest.fixture
def saved(quantized, tmp_path):
    save_quantized(quantized, tmp_path / "q.safetensors", {})
    return tmp_path / "q.safetensors"


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


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    for read in (load_quantized, read_metadata):
        with pytest.raises(
            ValueError, match=r"q\.safetensors is not a quantised checkpoint .*, or damaged or truncated"
        ):
            read(saved)


def test_other_files_and_missing_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no quantised checkpoint .*none\.safetensors"):
        load_quantized(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path.name} is a folder: give the file"):
        load_quantized(tmp_path)
    (tmp_path / "text").write_text("a file of another kind, longer than the eight bytes of a header's size")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other.safetensors"):
        for read in (load_quantized, read_metadata):
            with pytest.raises(ValueError, match=f"{name} is not a quantised checkpoint"):
                read(tmp_path / name)
    save_file({"x": torch.zeros(1)}, tmp_path / "old.safetensors", {"format": "tfmq-quantized-2"})
    message = "is of format tfmq-quantized-2, and this version reads tfmq-quantized-3: quantise again"
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path / "old.safetensors")


def test_a_flipped_bit_is_noticed_wherever_it_is(saved):
    """In the size and the whole of the header, and in every tensor."""
    intact = saved.read_bytes()
    header = 8 + int.from_bytes(intact[:8], "little")
    tensors = json.loads(intact[8:header])
    description = tensors.pop("__metadata__")
    starts = [header + tensor["data_offsets"][0] for tensor in tensors.values()]
    places = [*range(8), *range(8, header, 331), *starts, len(intact) - 1]
    places += [intact.index(f'"{key}"'.encode()) + 1 for key in (*description, "__metadata__", "dtype", "shape")]
    for number, place in enumerate(places):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << number % 8
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"q\.safetensors (is|holds)"):
            load_quantized(saved)
    saved.write_bytes(intact)
    load_quantized(saved)


def test_tensors_that_do_not_match_the_description_are_named(saved):
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    codes = tensors.pop("conv_in.codes")
    save_file(tensors | {"conv_in.codes": codes}, saved, metadata)
    load_quantized(saved)
    save_file(tensors | {"conv_in.codes": codes ^ 1}, saved, metadata)
    with pytest.raises(ValueError, match="the tensors are not what their hash says"):
        load_quantized(saved)
    save_file(tensors | {"conv_in.codes": codes}, saved, metadata | {"steps": "[1, 2, 3, 4, 5]"})
    with pytest.raises(ValueError, match="the description is not what its hash says"):
        read_metadata(saved)
    checkpoint._write(saved, tensors, metadata)
    with pytest.raises(ValueError, match=r"missing \['conv_in.codes'\]"):
        load_quantized(saved)
    checkpoint._write(saved, tensors | {"conv_in.codes": codes[:-1]}, metadata)
    with pytest.raises(ValueError, match="does not match its description"):
        load_quantized(saved)
    checkpoint._write(saved, tensors | {"conv_in.codes": codes}, metadata | {"unet_class": json.dumps("os.system")})
    with pytest.raises(ValueError, match="known are UNet2DModel"):
        load_quantized(saved)


def test_what_is_not_wholly_quantised_is_not_saved(quantized, tmp_path):
    path = tmp_path / "q.safetensors"
    with pytest.raises(ValueError, match="the network is not quantised: call quantize_ first"):
        save_quantized(networks.unconditional(), path, {})
    quantizer = quantized.conv_in.input_quantizer
    quantizer.enabled = False
    with pytest.raises(ValueError, match=r"half quantised, conv_in\.input_quantizer is not: start again"):
        save_quantized(quantized, path, {})
    quantizer.enabled, quantizer.scale[2] = True, float("nan")
    with pytest.raises(ValueError, match=r"conv_in\.input_quantizer\.scale holds NaN or infinity"):
        save_quantized(quantized, path, {})
    quantizer.scale[2], quantized.conv_in.codes = 1.0, None
    with pytest.raises(ValueError, match=r"half quantised, conv_in is not: start again"):
        save_quantized(quantized, path, {})
    assert not list(tmp_path.iterdir())


def test_a_file_needs_a_folder_that_exists(quantized, tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*none/q\.safetensors: there is no folder .*none; give"):
        save_quantized(quantized, tmp_path / "none" / "q.safetensors", {})
    with pytest.raises(ValueError, match=f"cannot write .*{tmp_path.name}: it is a folder"):
        save_quantized(quantized, tmp_path, {})
