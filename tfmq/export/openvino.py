"""A quantised network as an OpenVINO model that runs in integer kernels, from its own codes and scales.

The executable twin of the network (`tfmq.export.network`) is traced and converted; OpenVINO's low-precision
transformations make integer kernels of it. What is exported is compiled at once, and every layer is looked up in the
compiled graph: one that would run in floating point fails the export.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata as packages
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tfmq.export.checks import check_executable, chosen_timesteps
from tfmq.export.description import Description, InputShape, plain_config, writable
from tfmq.export.kernels import Kernel, check_integer, executed_kernels, expected_kernels
from tfmq.export.layers import Weight
from tfmq.export.network import ExecutableNetwork
from tfmq.network.backbone import Network, backbone_of
from tfmq.passes.correction import correction_of

if TYPE_CHECKING:
    import openvino

MODEL, CORRECTION = "openvino_model.xml", "correction.safetensors"
NIBBLE = 4
MISSING = "OpenVINO is not installed: pip install tfmq-bench[deploy]"
VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


def export_openvino(
    network: Network,
    folder: str | Path,
    shape: InputShape,
    timesteps: Tensor | Sequence[int] | None = None,
    metadata: Mapping[str, object] | None = None,
    allow_float: bool = False,
) -> list[Kernel]:
    """Write a quantised network as an OpenVINO model: `openvino_model.xml`, its `.bin`, and `export.json`.

    Activations keep their ranges, weights their codes and scales: the arithmetic is that of the simulation, and results
    differ by the rounding of floats. Weights of at most 4 bits take 4 bits in the file, and 8 where they are executed.
    What depends on the time step alone is computed ahead for each of ``timesteps``.

    Args:
        network: quantised; it is left as it is.
        folder: made if need be; an export that is there is replaced.
        shape: of the inputs.
        timesteps: (S,), those that the network will be evaluated at; None takes those it was calibrated for.
        metadata: facts to keep in `export.json`, such as a checkpoint's.
        allow_float: export also where quantised layers would run in floating point.

    Returns:
        How each layer and attention product executes.

    Raises:
        ValueError: the network is not quantised, or in a way that integer kernels do not execute; the time steps are
            not known; nothing can be written in ``folder``; a quantised layer would run in floating point; or OpenVINO
            is not installed. The folder is then as it was.
    """
    load_openvino()
    backbone = backbone_of(network)
    check_executable(network, backbone)
    steps = chosen_timesteps(network, timesteps)
    folder = writable(folder)
    made = Path(mkdtemp(prefix=".export-", dir=folder))
    try:
        _convert(network, shape, steps, made)
        kernels = executed_kernels(compile_model(made), expected_kernels(network, backbone))
        if not allow_float:
            check_integer(kernels)
        correction = correction_of(network)
        if correction is not None:
            save_file(correction.state_dict(), made / CORRECTION)
        described = Description(
            target="openvino",
            network_class=type(network).__name__,
            config=plain_config(network),
            latents=shape.latents(network),
            condition=shape.condition(network, backbone.condition),
            timesteps=tuple(steps.tolist()),
            kernels=tuple(kernels),
            versions={name: packages.version(name) for name in ("openvino", "torch", "diffusers")},
            metadata=metadata or {},
            corrected=correction is not None,
        )
        described.write(made)
        for path in made.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return kernels


def load_openvino() -> None:
    """Raise ValueError if OpenVINO is not installed."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        raise ValueError(MISSING) from None


def compile_model(folder: str | Path, threads: int | None = None) -> openvino.CompiledModel:
    """Compile the exported model of ``folder`` for the CPU: with ``threads``, or as many as torch takes."""
    import openvino

    core = openvino.Core()
    warn_without_vnni()
    model = core.read_model(Path(folder) / MODEL)
    _unpack_weights(model)
    settings = {
        # In bfloat16, which some processors would take, results differ in the third digit.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
    }
    return core.compile_model(model, "CPU", settings)


def lacks_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor's sums of 8-bit products may saturate; False where nothing tells."""
    if not cpuinfo.is_file():
        return False
    text = cpuinfo.read_text(encoding="utf-8")
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return bool(flags) and not any(name in flags.split() for name in VNNI)


def warn_without_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Warn on a processor without 8-bit products that do not overflow: kernels there are slower, and may saturate."""
    if lacks_vnni(cpuinfo):
        warnings.warn(
            "this processor has no VNNI instructions: 8-bit kernels are slow here, and sums of their products may "
            "saturate, so that results are not those of the simulation",
            stacklevel=2,
        )


@torch.no_grad()
def _convert(network: Network, shape: InputShape, steps: Tensor, folder: Path) -> None:
    """Trace the network's executable twin and write it as an OpenVINO model."""
    import openvino

    twin = ExecutableNetwork(network, steps).eval()
    latents, condition = shape.latents(network), shape.condition(network, twin.condition)
    example = twin.example(latents, condition)
    with warnings.catch_warnings():
        # Sizes become constants where diffusers asks for them in Python; none of them depends on the batch.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)
        traced = torch.jit.trace(twin, example, check_trace=False)
        model = openvino.convert_model(traced, example_input=example)
    shapes = [list(latents), [1], *([] if condition is None else [list(condition)])]
    model.reshape({port: openvino.PartialShape(size) for port, size in zip(model.inputs, shapes, strict=True)})
    for port, name in zip(model.inputs, twin.ports, strict=True):
        port.get_tensor().set_names({name})
    _pack_weights(model, twin)
    openvino.save_model(model, folder / MODEL, compress_to_fp16=False)


def _pack_weights(model: openvino.Model, twin: ExecutableNetwork) -> None:
    """Store weights of at most 4 bits at 4 bits: codes, and a subtraction of their origin behind."""
    import openvino
    from openvino import opset13 as operations

    weights = {f"{path}.codes": part for path, part in twin.named_modules() if isinstance(part, Weight)}
    for constant in _constants(model, openvino.Type.i8):
        weight = weights.get(constant.get_friendly_name().removeprefix("self."))
        if weight is None or weight.bits > NIBBLE:
            continue
        spread = weight.origin.view(weight.scale.shape)
        codes = (weight.codes.to(torch.int16) + spread).to(torch.uint8).flatten().numpy()
        codes = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
        packed = openvino.Tensor(openvino.Type.u4, openvino.Shape(weight.codes.shape))
        packed.data[:] = codes[0::2] | (codes[1::2] << 4)
        stored = openvino.op.Constant(packed)
        stored.set_friendly_name(constant.get_friendly_name())
        origin = operations.constant(spread.to(torch.float32).numpy())
        for port in constant.output(0).get_target_inputs():
            convert = port.get_node()
            users = convert.output(0).get_target_inputs()
            centred = operations.subtract(operations.convert(stored, "f32"), origin)
            for user in users:
                user.replace_source_output(centred.output(0))


def _unpack_weights(model: openvino.Model) -> None:
    """Give weights that are stored at 4 bits 8 for execution, for which there are integer kernels."""
    import openvino
    from openvino import opset13 as operations

    for constant in _constants(model, openvino.Type.u4):
        shape = tuple(constant.get_output_shape(0))
        packed = np.asarray(constant.data, np.uint8).reshape(-1)
        codes = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[: int(np.prod(shape))].reshape(shape)
        for port in constant.output(0).get_target_inputs():
            (subtraction,) = {user.get_node() for user in port.get_node().output(0).get_target_inputs()}
            origin = subtraction.input_value(1).get_node().data
            values = (codes.astype(np.int16) - origin.astype(np.int16)).astype(np.int8)
            unpacked = operations.constant(values)
            unpacked.set_friendly_name(constant.get_friendly_name())
            convert = operations.convert(unpacked, "f32")
            for user in subtraction.output(0).get_target_inputs():
                user.replace_source_output(convert.output(0))


def _constants(model: openvino.Model, kind: openvino.Type) -> Iterator[openvino.op.Constant]:
    """The constants of a type in a model."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == kind:
            yield node
