"""Quantise a network of diffusers in place: what `quantize_` checks, and the order in which it runs a recipe."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tfmq.network.backbone import Backbone, Network, backbone_of, check_further_inputs, check_inputs
from tfmq.network.calibration import CalibrationSet
from tfmq.network.number_types import cast_back, in_float32, number_type, pool_in_float32
from tfmq.network.rows import CalibrationRows
from tfmq.numerics.finite import all_finite
from tfmq.passes import Recipe
from tfmq.plan import SHARED, Protocol, amended_plan, check_unquantized, insert_quantizers, quantized_layers
from tfmq.precision import FULL, Precision
from tfmq.pretrained import attach
from tfmq.session import QuantizationReport, Session
from tfmq.state import check_finished, check_unchanged
from tfmq.workspace import Workspace

# What a network takes besides latents and time steps, and how many dimensions that has.
CONDITIONS = {
    "none": ("no condition", 0),
    "context": ("a context (rows, tokens, channels)", 3),
    "class": ("classes (rows,)", 1),
}


def quantize_(
    network: Network,
    precision: Precision,
    recipe: Recipe,
    pool: CalibrationSet,
    generator: torch.Generator,
    protocol: Protocol = SHARED,
    workspace: Workspace | None = None,
) -> QuantizationReport:
    """Quantise ``network`` in place; it keeps working in any diffusers pipeline.

    If a pass measures a noise correction (PTQD, ``tfmq.passes.correction``), a stock pipeline applies it only with a
    ``corrected_scheduler``.

    A network in float16, bfloat16 or float64 is quantised as its copy in float32 would be, and cast back at the end.

    Args:
        recipe: passes of `tfmq.passes`, in the order in which they run.
        pool: what the passes draw their calibration rows from, recorded on ``network`` with the schedule that it will
            be sampled with.
        generator: the only source of randomness; the same state gives the same network.
        protocol: which layers are quantised.
        workspace: keeps what is learned, so that a run that was stopped goes on; None keeps nothing.

    Raises:
        ValueError: weights or activations hold NaN or infinity, activations are constant, there are no calibration
            rows, or they do not match the network's inputs or do not fit in memory, the recipe leaves a layer
            unquantised, or the network is quantised already, or of a structure or in number types that are not
            supported. After this or any other error the network computes what it did before, and the generator is where
            it was.
    """
    check_arguments(network, precision, workspace)
    backbone = backbone_of(network)
    plan = amended_plan(network, backbone, precision, recipe, protocol)
    state, pool = generator.get_state(), pool_in_float32(pool)
    drawn = [step.draw(pool, generator) for step in recipe]
    for step, rows in zip(recipe, drawn, strict=True):
        if rows is not None:
            check_rows(network, backbone, rows, step.name)
    network.eval().requires_grad_(False)
    given = copy.deepcopy(network)
    full = in_float32(given)
    session = Session(network, full, backbone, plan, precision, protocol, pool, generator, workspace or Workspace())
    with restored_on_failure(network, given, generator, state):
        if full is not given:
            network.float()
        insert_quantizers(network, plan)
        for step, rows in zip(recipe, drawn, strict=True):
            with session.running(step, rows):
                step.run(session, None if rows is None else rows.to(network.device))
        check_finished(network)
        if full is not given:
            cast_back(network, given, {f"{path}.weight" for path in quantized_layers(network)})
        attach(network)
    session.report.network = network
    return session.report


def check_arguments(network: Network, precision: Precision, workspace: Workspace | None) -> None:
    """Raise ValueError for what cannot be quantised, such as a parameter that holds NaN or infinity."""
    if workspace is not None and not isinstance(workspace, Workspace):
        raise ValueError(f"workspace is {workspace!r}: give a FolderWorkspace of a folder, or None")
    if precision.weight_bits == FULL:
        raise ValueError(f"precision {precision} leaves the weights in full precision: there is nothing to quantise")
    check_unquantized(network)
    number_type(network)
    check_unchanged(network)
    for name, parameter in network.named_parameters():
        if not all_finite(parameter):
            raise ValueError(f"{name} holds NaN or infinity: the checkpoint is damaged, fetch or convert it again")


def check_rows(network: Network, backbone: Backbone, rows: CalibrationRows, name: str) -> None:
    """Raise ValueError if the pass of that ``name`` has drawn no rows, or rows that ``network`` cannot take."""
    if not len(rows):
        raise ValueError(f"{name} draws no calibration row from the pool: let it draw at least one")
    takes, dims = CONDITIONS[backbone.condition]
    if (0 if rows.context is None else rows.context.dim()) != dims:
        has = "nothing" if rows.context is None else f"something of shape {tuple(rows.context.shape)}"
        raise ValueError(
            f"the pool is conditioned on {has}, and a {type(network).__name__} takes {takes}: record it on this network"
        )
    check_inputs(network, rows.latents, rows.context, rows.inputs)
    check_further_inputs(network, rows.inputs)


@contextmanager
def restored_on_failure(network: Network, full: Network, generator: torch.Generator, state: Tensor) -> Iterator[None]:
    """If anything is raised inside, make ``network`` the full-precision ``full`` again, in place.

    The generator goes back to ``state``, so that the same call finds in its workspace what was learned. The submodules
    are then those of ``full``; references to the earlier ones are stale.
    """
    try:
        yield
    except BaseException:
        vars(network).clear()
        vars(network).update(vars(full))
        generator.set_state(state)
        raise
