"""Integers in torch, as `tfmq.executing` computes: norms, softmax and activation functions stay in float32."""

from __future__ import annotations

from benchmarks.backends import Backend
from tfmq.execution import check_processor, executing, not_executable
from tfmq.network.backbone import Network


def refusal(network: Network) -> str:
    """The first part of a network that cannot be executed, with its reason, and how many there are."""
    refused = not_executable(network)
    if not refused:
        return ""
    path, reason = next(iter(refused.items()))
    more = f", and {len(refused) - 1} parts more" if len(refused) > 1 else ""
    return f"cannot be executed in integers: in {path} {reason}{more}"


BACKEND = Backend(check_processor, refusal, executing)
