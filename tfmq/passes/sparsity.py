"""How many inputs of convolutions are 0 behind ReLU, channel by channel and step by step, and what that would save.

SQ-DM (Fan et al., DAC 2025, arXiv 2501.15448) labels every channel at each time step as sparse or dense and sends it to
hardware of that kind, which skips what is 0 in sparse channels alone. Here the shares are counted; nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tfmq.cost import Shapes
from tfmq.network.backbone import Network, evaluate
from tfmq.network.calibration import CalibrationSet, Draw, Spaced
from tfmq.network.rows import CalibrationRows
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.rectification import rectified_inputs
from tfmq.plan import quantized_layers
from tfmq.session import Session
from tfmq.settings import check_counts, check_numbers
from tfmq.state import check_finished


@dataclass(frozen=True)
class MeasureSparsity(Pass[CalibrationRows]):
    """Count the zeros in the quantised inputs of convolutions behind ReLU; the network stays as it is.

    The report's details get numbers, means over all time steps of the rows:

    - ``zeros``: share of the multiplications of these convolutions that have a 0 for an input.
    - ``sparse_channels``: share of channels that are sparse, each as often as there are layers and steps.
    - ``switching_channels``: share of channels that are sparse at one of two successive steps and not at the other.
    - ``rectified_operations``: share of the multiplications of all layers that these convolutions make.
    - ``saved_operations``: share of the multiplications of all layers that would be skipped, if those with a 0 in a
      sparse channel were.
    - ``zeros_by_step``, ``sparse_channels_by_step``: the first two by time step.

    Without ReLU there is nothing to count, and only ``rectified_operations`` is told.

    Attributes:
        threshold: share of zeros from which on a channel is sparse at a step.
        data: which rows of the pool.
        batch: rows evaluated at once, all of one time step.
    """

    threshold: float = 0.3
    data: Draw = Spaced(None, 16)
    batch: int = 64

    def __post_init__(self) -> None:
        check_numbers(self, "threshold", least=0, most=1)
        check_counts(self, "batch")

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    @torch.no_grad()
    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`. Raises ValueError where the passes before have not quantised the whole network."""
        network = session.network
        check_finished(network, self.name)
        behind = rectified_inputs(session.plan, session.full, session.backbone)
        layers = quantized_layers(network)
        counted = sorted(path for path, layer in layers.items() if path in behind and isinstance(layer, nn.Conv2d))
        zeros, operations = count_zeros(network, counted, rows, self.batch)
        session.count_evaluations(len(rows))
        session.report.details |= summary(zeros, operations, self.threshold, rows.timesteps.unique())

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        return Cost(len(rows))

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        return Memory(shapes.evaluated(rows, self.batch))


def count_zeros(
    network: Network, counted: list[str], rows: CalibrationRows, batch: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Shares of zeros in the quantised inputs of some convolutions, and multiplications an image of all layers, by
    path.

    The shares are (S, channels) each, a row for each distinct time step of ``rows``, ascending. Padding does not count.
    """
    timesteps = rows.timesteps.unique().tolist()
    sums: dict[str, list[Tensor]] = {path: [] for path in counted}
    operations: dict[str, int] = {}
    now: dict[str, Tensor] = {}

    def of_input(path: str, quantized: Tensor) -> None:
        zeros = (quantized == 0).double().mean((2, 3)).sum(0).cpu()
        now[path] = now.get(path, 0) + zeros

    def of_layer(path: str, layer: nn.Conv2d | nn.Linear, output: Tensor) -> None:
        elements = output[0].numel()
        operations[path] = elements * layer.weight[0].numel()

    handles = []
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(lambda m, _, out, path=path: of_layer(path, m, out)))
        if path in sums:
            hook = module.input_quantizer.register_forward_hook(lambda _, __, out, path=path: of_input(path, out))
            handles.append(hook)
    try:
        for timestep in tqdm(timesteps, desc="sparsity", disable=None):
            own, now = rows[(rows.timesteps == timestep).nonzero().flatten()], {}
            for part in own.batches(batch):
                evaluate(network, part.latents, part.timesteps.to(network.device), part.context, part.inputs)
            for path, found in now.items():
                sums[path].append(found / len(own))
    finally:
        for handle in handles:
            handle.remove()
    return {path: torch.stack(found) for path, found in sums.items()}, operations


def summary(
    zeros: Mapping[str, Tensor], operations: Mapping[str, int], threshold: float, timesteps: Tensor
) -> dict[str, object]:
    """The numbers of `MeasureSparsity`, of what ``count_zeros`` finds at these time steps (S,).

    All channels of a convolution take part in equally many of its multiplications.
    """
    total = sum(operations.values())
    covered = sum(operations[path] for path in zeros)
    found: dict[str, object] = {"rectified_operations": covered / total}
    if not zeros:
        return found
    sparse = {path: share >= threshold for path, share in zeros.items()}
    labels = torch.cat([sparse[path] for path in zeros], 1)
    by_step = torch.stack([operations[path] * share.mean(1) for path, share in zeros.items()]).sum(0) / covered
    saved = sum(operations[path] * (share * sparse[path]).mean().item() for path, share in zeros.items())
    switched = (labels[1:] != labels[:-1]).double().mean().item() if len(labels) > 1 else 0.0
    return found | {
        "zeros": by_step.mean().item(),
        "sparse_channels": labels.double().mean().item(),
        "switching_channels": switched,
        "saved_operations": saved / total,
        "zeros_by_step": _by_step(timesteps, by_step),
        "sparse_channels_by_step": _by_step(timesteps, labels.double().mean(1)),
    }


def _by_step(timesteps: Tensor, values: Tensor) -> dict[str, float]:
    return {str(step): value for step, value in zip(timesteps.tolist(), values.tolist(), strict=True)}
