"""TDQ: networks that predict activation step sizes from the time step (So et al., NeurIPS 2023, arXiv 2306.02316).

Each activation quantiser has a small network of its own, from the sinusoidal encoding of the time step to one positive
number, the step size (scale) of its grid. A schedule has finitely many steps, so in the end the networks are evaluated
at each of them and dropped: what stays is a table in every quantiser.

Grids: outputs of SiLU have a fixed lower end, -0.2785, and unsigned codes; attention probabilities start at 0; all
other tensors have signed codes. So zero point = round(lower / step) everywhere, lower being 0.2785 or 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from tfmq.live_bytes import LiveBytes
from tfmq.modules.fake_quantize import FakeQuantize
from tfmq.network.backbone import Backbone, Network, evaluate
from tfmq.network.rows import CalibrationRows
from tfmq.numerics.affine import SMALLEST_SCALE, Grid, fake_quantize
from tfmq.passes.reconstruction import ADAM_TENSORS, Losses
from tfmq.plan import QuantizationPlan, activation_quantizers
from tfmq.settings import check_counts, check_numbers, check_positive

SILU_LOWER = 0.2785
WIDTH = 64


def with_silu_grids(plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
    """``plan`` with unsigned grids for outputs of SiLU and signed ones for all other inputs."""
    unsigned = backbone.silu_inputs(network)
    layers = {path: dataclasses.replace(layer, symmetric=path not in unsigned) for path, layer in plan.layers.items()}
    attentions = {path: dataclasses.replace(attention, symmetric=True) for path, attention in plan.attentions.items()}
    return dataclasses.replace(plan, layers=layers, attentions=attentions)


def lower_end(quantizer: FakeQuantize) -> float:
    """How far below 0 the quantiser's grid begins: 0.2785 for outputs of SiLU; 0 where the zero point is 0."""
    return 0.0 if quantizer.symmetric or quantizer.positive else SILU_LOWER


def initial_step(quantizer: FakeQuantize, mean: Tensor, deviation: Tensor) -> Tensor:
    """The static step size that the network of ``quantizer`` starts from, from mean and deviation of its input.

    With n = 2^bits - 1 levels, (|mean| + 3 deviation) / (n / 2 - 1) for signed and (mean + 16 deviation) / (n - 1) for
    unsigned grids, as in the released code; probabilities need no more than 1.
    """
    levels = 2**quantizer.bits - 1
    if quantizer.symmetric:
        return (mean.abs() + 3 * deviation) / (levels / 2 - 1)
    reach = mean + 16 * deviation
    return (reach.clamp_max(1) if quantizer.positive else reach) / (levels - 1)


class StepNetworks(nn.Module):
    """The networks of many quantisers, evaluated together: D -> 64 -> 64 -> 64 -> 1, ReLU between, softplus at the end.

    Hidden layers are initialised as He et al. do. Last layers have weight 0 and the bias that gives the static step
    size, so that learning starts from there.

    Args:
        initial: static step size of each of the Q quantisers, (Q,).
        features: D, channels of the encoding of the time step.

    Attributes:
        weights: four of (Q, inputs, outputs).
        biases: four of (Q, 1, outputs).
    """

    def __init__(self, initial: Tensor, features: int, generator: torch.Generator) -> None:
        super().__init__()
        count = len(initial)
        widths = (features, WIDTH, WIDTH, WIDTH)
        hidden = [
            torch.randn(count, inputs, outputs, generator=generator) * (2 / inputs) ** 0.5
            for inputs, outputs in zip(widths[:-1], widths[1:], strict=True)
        ]
        last = torch.zeros(count, WIDTH, 1)
        self.weights = nn.ParameterList([weight.to(initial.device) for weight in (*hidden, last)])
        start = inverse_softplus(initial).view(count, 1, 1)
        self.biases = nn.ParameterList([*(torch.zeros(count, 1, WIDTH, device=initial.device) for _ in hidden), start])

    def forward(self, encodings: Tensor) -> Tensor:
        """Step sizes (Q, N) at encodings (N, D)."""
        hidden = encodings.expand(len(self.weights[0]), *encodings.shape)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = torch.baddbmm(bias, hidden, weight).relu_()
        return F.softplus(torch.baddbmm(self.biases[-1], hidden, self.weights[-1])).squeeze(2) + SMALLEST_SCALE


def inverse_softplus(y: Tensor) -> Tensor:
    """The x at which log(1 + e^x) is y > 0."""
    return y + torch.log(-torch.expm1(-y))


@dataclass(frozen=True)
class ActivationSamples:
    """Values that the quantisers' inputs take on calibration rows.

    Attributes:
        values: (N, Q, K), K values of each quantiser's input drawn from each row.
        timesteps: (N,).
    """

    values: Tensor
    timesteps: Tensor

    def initial_steps(self, quantizers: dict[str, FakeQuantize]) -> Tensor:
        """Static step size of each quantiser, (Q,). Raises ValueError for an input that is constant."""
        deviations, means = torch.std_mean(self.values, dim=(0, 2))
        for (path, quantizer), deviation, mean in zip(quantizers.items(), deviations, means, strict=True):
            if deviation == 0 and not quantizer.positive:
                raise ValueError(
                    f"the activation at {path} is constant ({mean.item():g}) over the calibration set and has no range "
                    "to quantise: is a layer before it dead, or the calibration set too small?"
                )
        steps = [initial_step(q, m, d) for q, m, d in zip(quantizers.values(), means, deviations, strict=True)]
        return torch.stack(steps).clamp_min(SMALLEST_SCALE)


@torch.no_grad()
def sample_activations(
    network: Network, rows: CalibrationRows, values: int, batch: int, generator: torch.Generator
) -> ActivationSamples:
    """Draw ``values`` entries of every quantiser's unquantised input from each of ``rows``.

    Raises ValueError, with the path, if an input holds NaN or infinity.
    """
    quantizers = activation_quantizers(network)
    samples = torch.empty(len(rows), len(quantizers), values, device=rows.latents.device)
    present = slice(0)

    def record(position: int, path: str) -> Callable:
        def hook(quantizer: FakeQuantize, args: tuple[Tensor]) -> None:
            flat = args[0].flatten(1)
            index = torch.randint(flat.shape[1], (len(flat), values), generator=generator)
            drawn = flat.gather(1, index.to(flat.device))
            if not torch.isfinite(drawn).all():
                raise ValueError(f"the activation at {path} holds NaN or infinity{quantizer.tracker.where()}")
            samples[present, position] = drawn

        return hook

    hooks = [
        quantizer.register_forward_pre_hook(record(position, path))
        for position, (path, quantizer) in enumerate(quantizers.items())
    ]
    try:
        for start in tqdm(range(0, len(rows), batch), desc="activation samples", disable=None):
            present = slice(start, min(start + batch, len(rows)))
            part = rows[present]
            evaluate(network, part.latents, part.timesteps.to(network.device), part.context, part.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return ActivationSamples(samples, rows.timesteps)


@dataclass(frozen=True)
class FitConfig:
    """How networks are fitted to activations, by AdamW.

    Attributes:
        iterations: optimiser steps; 0 leaves the networks at the static step sizes.
        batch: calibration rows in each.
        learning_rate: annealed to 0 along a cosine.
        weight_decay: of all parameters.
    """

    iterations: int = 1000
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_counts(self, "iterations", least=0)
        check_counts(self, "batch")
        check_positive(self, "learning_rate")
        check_numbers(self, "weight_decay", least=0)


def fit_networks(
    networks: StepNetworks,
    quantizers: dict[str, FakeQuantize],
    samples: ActivationSamples,
    encode: Callable[[Tensor], Tensor],
    config: FitConfig,
    generator: torch.Generator,
) -> list[float]:
    """Minimise each quantiser's own squared error over rows; returns the sum over quantisers of the relative errors.

    All networks learn at once, each on mean |x - x_hat|^2 / mean |x|^2 of its quantiser alone.

    Args:
        encode: encoding (N, D) of time steps (N,).
    """
    timesteps, step = samples.timesteps.unique(return_inverse=True)
    encodings = encode(timesteps.to(samples.values.device))
    groups = _groups(quantizers, samples.values)
    optimizer = torch.optim.AdamW(
        networks.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(config.iterations, 1), eta_min=0.0)
    losses = Losses()
    with torch.enable_grad():
        for _ in tqdm(range(config.iterations), desc="step networks", disable=None):
            rows = torch.randint(len(step), (config.batch,), generator=generator)
            loss = _loss(networks, groups, encodings, step, rows)
            losses.add(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return losses.read()


def fitting_bytes(
    quantizers: dict[str, FakeQuantize], samples: ActivationSamples, encode: Callable[[Tensor], Tensor], batch: int
) -> int:
    """What ``fit_networks`` takes besides the samples, which are on the meta device, and what the networks do."""
    device = samples.values.device
    timesteps, step = samples.timesteps.unique(return_inverse=True)
    with torch.enable_grad(), LiveBytes() as live:
        encodings = encode(timesteps.to(device))
        networks = StepNetworks(torch.empty(len(quantizers), device=device), encodings.shape[1], torch.Generator())
        groups = _groups(quantizers, samples.values)
        state = [torch.empty_like(each) for each in networks.parameters() for _ in range(ADAM_TENSORS)]
        _loss(networks, groups, encodings, step, torch.arange(batch) % len(step)).backward()
    del state
    return live.most


def _groups(quantizers: dict[str, FakeQuantize], values: Tensor) -> list[_Group]:
    grids = dict.fromkeys(quantizer.grid for quantizer in quantizers.values())
    return [_Group.of(grid, quantizers, values) for grid in grids]


def _loss(networks: StepNetworks, groups: list[_Group], encodings: Tensor, step: Tensor, rows: Tensor) -> Tensor:
    """The sum of all quantisers' relative errors on ``rows``; ``step`` has each row's position among the encodings."""
    scales = networks(encodings).T[step[rows]]
    first, *others = (group.error(scales, rows) for group in groups)
    return sum(others, first)


@dataclass(frozen=True)
class _Group:
    """The quantisers of one grid: positions (G,), values (N, G, K), lower ends (G,), mean squares of values (G,)."""

    grid: Grid
    positions: Tensor
    values: Tensor
    lower: Tensor
    power: Tensor

    @classmethod
    def of(cls, grid: Grid, quantizers: dict[str, FakeQuantize], values: Tensor) -> _Group:
        members = [(i, lower_end(q)) for i, q in enumerate(quantizers.values()) if q.grid == grid]
        positions = torch.tensor([i for i, _ in members], device=values.device)
        own = values[:, positions]
        lower = torch.tensor([end for _, end in members], device=values.device)
        return cls(grid, positions, own, lower, own.square().mean((0, 2)).clamp_min(SMALLEST_SCALE**2))

    def error(self, scales: Tensor, rows: Tensor) -> Tensor:
        """Sum of the members' relative errors on ``rows``, with scales (rows, Q)."""
        x, scale = self.values[rows], scales[:, self.positions]
        zero_point = torch.round(self.lower / scale.detach())
        error = fake_quantize(x, scale[..., None], zero_point[..., None], self.grid).sub(x).square().mean((0, 2))
        return (error / self.power).sum()


def set_tables(quantizers: dict[str, FakeQuantize], scales: Tensor) -> None:
    """Give each quantiser its row of ``scales`` (Q, S) as the table over the finite set, and let it quantise.

    Gradients pass to ``scales``; the zero points are constants.
    """
    for quantizer, scale in zip(quantizers.values(), scales, strict=True):
        quantizer.scale = scale
        quantizer.zero_point = torch.round(lower_end(quantizer) / scale.detach())
        quantizer.enabled = True


@torch.no_grad()
def tabulate(networks: StepNetworks, quantizers: dict[str, FakeQuantize], encodings: Tensor) -> None:
    """Replace the networks by their values at ``encodings`` (S, D), one for each of the finite set of steps."""
    set_tables(quantizers, networks(encodings))
    for quantizer in quantizers.values():
        quantizer.scale = quantizer.scale.clone()  # of its own, not a view of all tables
