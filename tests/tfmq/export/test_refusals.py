"""What an export refuses, each with one line; and that nothing runs in floating point unseen."""

from __future__ import annotations

import builtins

import pytest
import torch

from tests.tfmq import networks
from tfmq.export import openvino
from tfmq.export.checks import chosen_timesteps
from tfmq.export.description import InputShape
from tfmq.export.kernels import check_integer, executed_kernels, expected_kernels, summary
from tfmq.export.openvino import export_openvino, warn_without_vnni
from tfmq.export.roughly import quantize_roughly_
from tfmq.export.runner import ExportedNetwork
from tfmq.network.backbone import backbone_of
from tfmq.passes.grids import Grids
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import Protocol
from tfmq.precision import Precision

ov = pytest.importorskip("openvino", reason="OpenVINO executes the networks: pip install tfmq-bench[deploy]")

SHAPE = InputShape(batch=2, height=8, width=8, tokens=5)
DYNAMIC = (Grids(dynamic_activations=True), WeightRanges(), RoundToNearest())


@pytest.fixture(scope="module")
def rough():
    network = networks.unconditional()
    quantize_roughly_(network, Precision.parse("w8a8"), [1, 401])
    return network


@pytest.fixture(scope="module")
def exported(rough, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export_openvino(rough, folder, SHAPE)
    return folder


def refused(network, match, folder, **options):
    with pytest.raises(ValueError, match=match) as caught:
        export_openvino(network, folder, SHAPE, **options)
    assert "\n" not in str(caught.value)
    assert not any(folder.iterdir())


def test_networks_that_no_integer_kernel_executes(tmp_path):
    refused(networks.unconditional(), "not quantised: call quantize_", tmp_path)
    network, *_ = networks.quantized(DYNAMIC, "w8a8")
    refused(network, r"conv_in cannot be executed in integers: .* \(dynamic\)", tmp_path)
    network, *_ = networks.quantized(networks.recipe(), "w4a32")
    refused(network, "activations are in full precision", tmp_path)
    network, *_ = networks.quantized(networks.recipe(), Precision(8, 12))
    refused(network, "has 12 bits, and integer kernels take at most 8", tmp_path)
    network, *_ = networks.quantized(networks.recipe(), Precision(8, 8, 16))
    refused(network, "an operand has 16 bits", tmp_path, timesteps=[1])


def test_time_steps(rough, tmp_path):
    network, *_ = networks.quantized(networks.recipe(), "w8a8")
    refused(network, "does not say at which time steps", tmp_path)
    refused(rough, r"calibrated for the time steps \[1, 401\], and \[7\] are not", tmp_path, timesteps=[7, 401])
    assert chosen_timesteps(network, torch.tensor([5, 3, 5])).tolist() == [3, 5]
    with pytest.raises(ValueError, match="timesteps is empty"):
        chosen_timesteps(network, [])


def test_a_folder_that_cannot_be_written(rough, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write in .*file: .*give a folder"):
        export_openvino(rough, tmp_path / "file", SHAPE)


def test_a_missing_package_is_named(rough, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "openvino":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: export_openvino(rough, tmp_path, SHAPE), lambda: ExportedNetwork(tmp_path)):
        with pytest.raises(ValueError, match=r"pip install tfmq-bench\[deploy\]"):
            call()


def test_a_layer_in_floating_point_is_named_and_stops_the_export(rough, exported, tmp_path, monkeypatch):
    expected = expected_kernels(rough, backbone_of(rough))
    model = ov.Core().read_model(exported / "openvino_model.xml")
    in_float = ov.Core().compile_model(model, "CPU", {"LP_TRANSFORMS_MODE": False, "INFERENCE_PRECISION_HINT": "f32"})
    found = executed_kernels(in_float, expected)
    assert not any(row.integer for row in found)
    assert all("f32" in row.reason or "not say" in row.reason for row in found if row.planned)
    with pytest.raises(ValueError, match=r"49 of 49 layers .* conv_in \(conv2d\): OpenVINO runs it in \w+_f32"):
        check_integer(found)
    monkeypatch.setattr(openvino, "compile_model", lambda folder: in_float)
    refused(rough, "would run in floating point", tmp_path)
    assert "0 of 49 layers" in summary(export_openvino(rough, tmp_path, SHAPE, allow_float=True))


def test_layers_that_were_left_out_say_why(tmp_path):
    protocol = Protocol("own", {"boundary": 32, "attention_products": 32}, inputs={"shortcuts": 32})
    network, *_ = networks.quantized(networks.recipe(), "w8a8", protocol=protocol)
    found = {(row.path, row.kind): row for row in export_openvino(network, tmp_path, SHAPE, [1])}
    assert "leaves this out (boundary)" in found["conv_in", "conv2d"].reason
    assert any("leaves its input out" in row.reason for row in found.values())
    assert sum(row.integer for row in found.values()) > 20
    run, x = ExportedNetwork(tmp_path, threads=1), networks.noise(2)
    with torch.no_grad():
        expected = network(x, 1).sample
    assert (run(x, 1).sample - expected).norm() < 0.1 * expected.norm()


def test_inputs_of_the_runner(exported, tmp_path):
    run, x = ExportedNetwork(exported, threads=1), networks.noise(2)
    with pytest.raises(ValueError, match=r"sample is of shape \(4, 3, 8, 8\), and the network was exported for \(2"):
        run(networks.noise(4), 1)
    with pytest.raises(ValueError, match="no table for time step 7"):
        run(x, 7)
    with pytest.raises(ValueError, match="takes no condition"):
        run(x, 1, torch.zeros(2, 5, 12))
    with pytest.raises(ValueError, match="takes no added_cond_kwargs"):
        run(x, 1, added_cond_kwargs={"text": 1})
    with pytest.raises(ValueError, match="sample holds NaN or infinity at time step 401"):
        run(torch.full_like(x, torch.nan), 401)
    (output,) = run(x.double(), torch.tensor(401), cross_attention_kwargs=None, return_dict=False)
    assert output.dtype == torch.float64
    with pytest.raises(ValueError, match="holds no exported network"):
        ExportedNetwork(tmp_path)
    (tmp_path / "export.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        ExportedNetwork(tmp_path)


def test_an_older_processor_is_warned_of(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : avx2 avx512f\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="no VNNI instructions"):
        warn_without_vnni(cpuinfo)
    cpuinfo.write_text("flags : avx2 avx512_vnni\n", encoding="utf-8")
    warn_without_vnni(cpuinfo)
    warn_without_vnni(tmp_path / "other system")


def test_roughly_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="activations in full precision"):
        quantize_roughly_(networks.unconditional(), Precision.parse("w8a32"), [1])
