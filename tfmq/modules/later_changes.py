"""What a quantised network refuses when it is evaluated, traced or loaded into."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tfmq.modules.fake_quantize import StepTracker
from tfmq.modules.layers import QuantizedLayer

# None on networks whose adapters were unloaded.
UNLOADED = "_hf_peft_config_loaded"


def guard(network: nn.Module, tracker: StepTracker) -> None:
    """Let ``network``, whose layers are quantised, refuse what its quantisation would be lost by.

    That is tracing that fixes the time step, fused adapters, and weights without codes.
    """
    network.register_forward_pre_hook(partial(check_traced, tracker), prepend=True, with_kwargs=True)
    network.register_forward_pre_hook(refuse_fused_adapters)
    network.register_load_state_dict_pre_hook(refuse_plain_weights)


def check_traced(tracker: StepTracker, network: nn.Module, inputs: tuple, named: dict) -> None:
    """Raise ValueError where ``torch.export`` would have to follow a time step that is looked up: a forward pre-hook.

    ``torch.compile`` looks it up between two graphs; with ``fullgraph=True`` it refuses, with the message given here.
    """
    tables = len(tracker.steps) > 0
    if torch.compiler.is_exporting():
        timestep = named["timestep"] if "timestep" in named else inputs[1]
        if tables or (isinstance(timestep, torch.Tensor) and not torch.compiler.is_dynamo_compiling()):
            way = "use torch.compile" if tables else "give the time step as an int"
            raise ValueError(f"torch.export cannot follow the time step, which this network looks up in Python: {way}")
    elif tables and torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(
            msg="this quantised network looks its time step up in Python: compile it without fullgraph=True"
        )


def adapted(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that an adapter has put around a layer (peft's tuner layers), by the path of that layer."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module._modules.get("base_layer"), nn.Module)
    }


def refuse_fused_adapters(network: nn.Module, inputs: tuple) -> None:
    """Raise ValueError if an adapter was fused into quantised weights: a forward pre-hook of a quantised network.

    Of adapters that are unloaded nothing is left but a mark of diffusers', and what they have done to the weights:
    after them the weights are compared with their codes once.
    """
    if "peft_config" not in vars(network):
        if vars(network).get(UNLOADED, False) is None:
            _refuse_changed_weights(network)
            delattr(network, UNLOADED)
        return
    for path, adapter in adapted(network).items():
        if getattr(adapter, "merged", False) and isinstance(adapter.base_layer, QuantizedLayer):
            raise ValueError(
                f"a LoRA is fused into {path}, whose weight is quantised: call unfuse_lora and tfmq.restore_weights, "
                "and use it attached; or fuse it into the full-precision network and quantise that"
            )


def _refuse_changed_weights(network: nn.Module) -> None:
    for path, layer in network.named_modules():
        if isinstance(layer, QuantizedLayer) and layer.codes is not None and not layer.consistent:
            raise ValueError(
                f"the weight of {path} is no longer that of its codes: a LoRA was fused into it, and then unloaded. "
                "Call tfmq.restore_weights for the quantised network, or fuse it into the full-precision one"
            )


def refuse_plain_weights(network: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Raise ValueError for a state that gives a quantised layer a weight without codes, before any of it is loaded.

    A load_state_dict pre-hook of a quantised network.
    """
    for path, layer in network.named_modules():
        name = f"{prefix}{path}"
        rounded = isinstance(layer, QuantizedLayer) and layer.codes is not None
        if rounded and f"{name}.weight" in state and f"{name}.codes" not in state:
            raise ValueError(
                f"the state has a weight for {path}, which is quantised, and no codes: load it into the full-precision "
                "network and quantise that"
            )
