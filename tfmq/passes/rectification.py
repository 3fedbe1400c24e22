"""ReLU in the place of SiLU, and fine-tuning that lets the network bear it.

Outputs of ReLU are not negative and many of them are 0, which hardware can skip. A network that was trained with SiLU
predicts something else with it, so that all its parameters are tuned, in full precision, before they are quantised.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from tqdm.auto import tqdm

from tfmq.cost import Shapes, run_through
from tfmq.live_bytes import FusedAttention, LiveBytes
from tfmq.modules.rectified import Rectified
from tfmq.network.backbone import Backbone, Network, evaluate
from tfmq.network.calibration import CalibrationSet, Draw, Spaced
from tfmq.network.rows import CalibrationRows
from tfmq.network.sampling import guides
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.noise_distillation import guide, is_both_halves, predictions, relative_error
from tfmq.passes.reconstruction import ADAM_TENSORS, Losses, random_batches
from tfmq.plan import QuantizationPlan, quantized_layers
from tfmq.session import Session
from tfmq.settings import check_counts, check_positive


@dataclass(frozen=True)
class Rectification(Pass[CalibrationRows]):
    """Put ReLU in the place of SiLU in residual blocks and before the last layer, and tune the network end to end.

    Targets are the predictions of the network as it was given, and the loss of a row is the norm of its error relative
    to that of its target; under guidance, where both halves of each row are drawn, guided predictions are compared. All
    parameters learn by Adam, in full precision, and the learning rate falls to 0 along a cosine. SiLU stays in the
    time-embedding network and in diffusion transformers, where it acts on no pixel. Goes before weights get their
    ranges.

    Attributes:
        iterations: optimiser steps; with 0 there is ReLU without tuning.
        batch: rows in each, both halves counted.
        learning_rate: at the start.
        data: which rows of the pool.
    """

    iterations: int = 1000
    batch: int = 16
    learning_rate: float = 5e-4
    data: Draw = Spaced(20, 128)

    sees_activations = False

    def __post_init__(self) -> None:
        check_counts(self, "batch")
        check_counts(self, "iterations", least=0)
        check_positive(self, "learning_rate")

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """See `Pass`."""
        return replace(plan, rectified=silu_over_pixels(network))

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`. Raises ValueError for weights with ranges already, and for a loss of NaN or infinity."""
        network, rectified = session.network, session.plan.rectified
        for path, layer in quantized_layers(network).items():
            if layer.ranged or layer.codes is not None:
                raise ValueError(f"the weight of {path} has a range already: let {self.name} come before")
        if not rectified or not self.iterations:
            return
        student = copy.deepcopy(session.full)
        for path in rectified:
            student.set_submodule(path, Rectified())
        learned = dict(student.named_parameters())
        scale = session.pool.settings.guidance_scale
        guided = guides(session.full, scale) and is_both_halves(rows)

        def learn() -> list[float]:
            targets = predictions(session.full, rows, self.batch)
            return tune(student, rows, targets, scale if guided else None, self, session.generator)

        @torch.no_grad()
        def restore(kept: dict[str, Tensor]) -> None:
            for name, parameter in learned.items():
                parameter.copy_(kept[name])

        session.learn("network", learn, lambda: dict(learned), restore)
        session.count_evaluations(len(rows))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(learned[name])

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        if not shapes.plan.rectified or not self.iterations:
            return Cost()
        return Cost(len(rows), self.iterations, self.iterations * min(self.batch, len(rows)))

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        if not shapes.plan.rectified or not self.iterations:
            return Memory()
        targets = sum(row.nbytes for row in rows.latents[:1]) * len(rows)
        return Memory(targets + max(shapes.evaluated(rows, self.batch, shapes.full), tuning_bytes(shapes, rows, self)))


def silu_over_pixels(network: Network) -> tuple[str, ...]:
    """Paths of the activation functions SiLU of residual blocks and before the last layer of a network."""
    blocks = [path for path, module in network.named_modules() if isinstance(module, ResnetBlock2D)]
    found = [f"{path}.nonlinearity" for path in blocks]
    found += ["conv_act"] if getattr(network, "conv_norm_out", None) is not None else []
    return tuple(path for path in found if isinstance(network.get_submodule(path), nn.SiLU))


def rectified_inputs(plan: QuantizationPlan, network: Network, backbone: Backbone) -> set[str]:
    """Paths of the layers whose input ``plan`` makes the output of a ReLU; ``network`` still has SiLU."""

    def feeding(path: str) -> str:
        return "conv_act" if path == "conv_out" else f"{path.rpartition('.')[0]}.nonlinearity"

    return {path for path in backbone.silu_inputs(network) if feeding(path) in plan.rectified}


def tune(
    network: Network,
    rows: CalibrationRows,
    targets: Tensor,
    guidance: float | None,
    config: Rectification,
    generator: torch.Generator,
) -> list[float]:
    """Tune all parameters of ``network`` to predict ``targets`` for ``rows``, in place; returns the losses.

    Under ``guidance``, a scale, rows are both halves of each pair, and the guided predictions are compared.
    """
    pairs, batch = len(rows), config.batch
    if guidance is not None:
        pairs, batch = len(rows) // 2, max(1, config.batch // 2)
        targets = guide(targets, guidance)
    network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iterations)
    batches, losses = random_batches(pairs, batch, config.iterations, generator), Losses()
    with torch.enable_grad():
        for index in tqdm(batches, desc=config.name, total=config.iterations, disable=None):
            part = rows[index if guidance is None else torch.cat([index, index + pairs])]
            found = evaluate(network, part.latents, part.timesteps.to(network.device), part.context, part.inputs)
            found = found if guidance is None else guide(found, guidance)
            loss = relative_error(found, targets[index], norm=1.0)
            losses.add(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.requires_grad_(False)
    return losses.read()


def tuning_bytes(shapes: Shapes, rows: CalibrationRows, config: Rectification) -> int:
    """What ``tune`` takes with the copy that is tuned, from the second iteration on."""
    with FusedAttention(), torch.enable_grad(), LiveBytes() as live:
        student = copy.deepcopy(shapes.full).requires_grad_(True)
        parameters = list(student.parameters())
        state = [torch.empty_like(parameter) for parameter in parameters for _ in range(ADAM_TENSORS)]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        stream = shapes.stream(rows, config.batch, student)
        stream.time, stream.step = stream.time_inputs()
        found = run_through(stream)
        loss = relative_error(found, torch.empty_like(found), norm=1.0)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
    del state
    return live.most
