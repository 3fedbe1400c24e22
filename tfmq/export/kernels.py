"""What really executes: each layer of an exported network with the kernel that runs it.

After compilation OpenVINO names for each node of its graph the operations that it was made of and the kernel
(``primitiveType``), such as ``brgconv_avx512_I8``. The kernel is what decides: ``runtimePrecision`` names the type of a
node's input and says i8 also where a float kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tfmq.export.activations import BYTE
from tfmq.network.backbone import Backbone, Network
from tfmq.precision import FULL
from tfmq.state import coverage

if TYPE_CHECKING:
    import openvino

ROOT = "__module.network"
TABLE = "lookup table"
PRODUCTS = {"query-key product": "processor.scores", "probability-value product": "processor.outputs"}
MATRIX_NODES = ("Convolution", "FullyConnected", "MatMul", "GroupConvolution")


@dataclass(frozen=True)
class Kernel:
    """How one layer or attention product of an exported network is executed.

    Attributes:
        path: of the module in the network.
        kind: ``conv2d``, ``linear``, ``lookup table``, or which product of attention.
        weight_bits, activation_bits: 32 where not quantised; of the table's outputs, in full precision.
        kernel: the names of the kernels that run it, or an empty text before it is compiled.
        integer: whether all of these are integer kernels.
        reason: why it does not execute in integers, or an empty text.
    """

    path: str
    kind: str
    weight_bits: int
    activation_bits: int
    kernel: str = ""
    integer: bool = False
    reason: str = ""

    @property
    def planned(self) -> bool:
        """Whether it is meant to execute in integers."""
        bits = self.activation_bits if self.kind in PRODUCTS else max(self.activation_bits, self.weight_bits)
        return bits <= BYTE


def expected_kernels(network: Network, backbone: Backbone) -> list[Kernel]:
    """Every layer and attention product of a quantised network, before anything is compiled."""
    rows = []
    for row in coverage(network):
        path = row.path.removesuffix(".layer")
        if path in backbone.time_embedding:
            continue
        if path in backbone.time_projections:
            found = Kernel(path, TABLE, FULL, FULL, reason="it depends on the time step alone: computed ahead")
            if found not in rows:
                rows.append(found)
            continue
        rows.append(Kernel(row.path, row.kind, row.weight_bits, row.activation_bits, reason=row.reason))
    return rows


def executed_kernels(compiled: openvino.CompiledModel, expected: Sequence[Kernel]) -> list[Kernel]:
    """``expected`` with the kernels that a compiled model runs, and the reasons of those that are none of integers."""
    nodes = [_Node.of(node) for node in compiled.get_runtime_model().get_ordered_ops()]
    matrix = [node for node in nodes if node.layer in MATRIX_NODES]
    fused = [node for node in nodes if node.layer == "Subgraph"]
    found = []
    for row in expected:
        if row.kind == TABLE:
            found.append(replace(row, kernel="Gather"))
            continue
        if row.kind in PRODUCTS:
            # A fused attention is one node, with the operations of both products.
            prefix = f"{ROOT}.{row.path}.{PRODUCTS[row.kind]}/"
            kernels = _kernels(matrix, prefix) or _kernels(fused, prefix, f"{ROOT}.{row.path}.processor/")
        else:
            kernels = _kernels(matrix, f"{ROOT}.{row.path}.products.") or _kernels(matrix, f"{ROOT}.{row.path}/")
        integer = bool(kernels) and all(kernel.lower().endswith("i8") for kernel in kernels)
        reason = row.reason
        if row.planned and not integer:
            reason = f"OpenVINO runs it in {', '.join(kernels)}" if kernels else "OpenVINO does not say what runs it"
        found.append(replace(row, kernel=", ".join(kernels), integer=integer, reason="" if integer else reason))
    return found


def check_integer(kernels: Sequence[Kernel]) -> None:
    """Raise ValueError naming what was to execute in integers and does not."""
    planned = [row for row in kernels if row.planned]
    fell_back = [row for row in planned if not row.integer]
    if not planned or fell_back:
        named = "; ".join(f"{row.path} ({row.kind}): {row.reason}" for row in fell_back[:3])
        more = f"; and {len(fell_back) - 3} more" if len(fell_back) > 3 else ""
        raise ValueError(
            f"{len(fell_back)} of {len(planned)} layers and products would run in floating point: {named}{more}; "
            "allow_float=True (--allow-float) exports all the same"
        )


@dataclass(frozen=True)
class _Node:
    """A node of a compiled graph: its kind, its kernel, and the operations that it was made of."""

    layer: str
    kernel: str
    operations: tuple[str, ...]

    @classmethod
    def of(cls, node: openvino.Node) -> _Node:
        told = node.get_rt_info()
        layer, kernel, names = (
            told[key].value if key in told else "" for key in ("layerType", "primitiveType", "originalLayersNames")
        )
        return cls(layer, kernel, tuple(names.split(",")))


def _kernels(nodes: Sequence[_Node], *prefixes: str) -> list[str]:
    """The kernels of the nodes that have an operation under each of ``prefixes``, leaving out side sums."""
    kernels = []
    for node in nodes:
        names = [name for name in node.operations if ".box/" not in name and ".of_zero_point/" not in name]
        if all(any(name.startswith(prefix) for name in names) for prefix in prefixes):
            kernels.append(node.kernel)
    return sorted(set(kernels))


def summary(kernels: Sequence[Kernel]) -> str:
    """Counts of what executes in integers, and each exception with its reason, as text."""
    counted = [row for row in kernels if row.kind != TABLE]
    lines = [f"{sum(row.integer for row in counted)} of {len(counted)} layers and products execute in integers"]
    tables = len(kernels) - len(counted)
    if tables:
        lines.append(f"{tables} time projections are tables, looked up by time step")
    lines += [f"  in floating point: {row.path} ({row.kind}): {row.reason}" for row in counted if not row.integer]
    return "\n".join(lines)
