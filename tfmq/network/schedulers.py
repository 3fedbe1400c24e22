"""Which schedulers of diffusers are sampled exactly as stock pipelines do, what each draws, and which are refused.

`tests/tfmq/network/test_schedulers.py` compares every one with a stock pipeline; `docs/schedulers.md` is the table.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import SchedulerMixin
from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction"]
# When a scheduler adds noise: never, where eta is above 0, where its algorithm is one of ``sde-...``, or always.
Adds = Literal["never", "eta", "sde", "always"]


@dataclass(frozen=True)
class Exact:
    """A scheduler that is sampled as stock pipelines do.

    Attributes:
        adds_noise: when its steps add noise, which is then taken from ``step_noise``.
        predictions: what a network may predict.
    """

    adds_noise: Adds
    predictions: tuple[Prediction, ...] = ("epsilon", "sample", "v_prediction")


NO_SAMPLE: tuple[Prediction, ...] = ("epsilon", "v_prediction")
EXACT = {
    "DDIMParallelScheduler": Exact("eta"),
    "DDIMScheduler": Exact("eta"),
    "DDPMParallelScheduler": Exact("always"),
    "DDPMScheduler": Exact("always"),
    "DEISMultistepScheduler": Exact("never"),
    "DPMSolverMultistepScheduler": Exact("sde"),
    "DPMSolverSinglestepScheduler": Exact("sde"),
    "EulerAncestralDiscreteScheduler": Exact("always", NO_SAMPLE),
    "EulerDiscreteScheduler": Exact("never"),
    "HeunDiscreteScheduler": Exact("never"),
    "KDPM2AncestralDiscreteScheduler": Exact("always", NO_SAMPLE),
    "KDPM2DiscreteScheduler": Exact("never", NO_SAMPLE),
    "LCMScheduler": Exact("always"),
    "LMSDiscreteScheduler": Exact("never"),
    "PNDMScheduler": Exact("never", NO_SAMPLE),
    "SASolverScheduler": Exact("always"),
    "TCDScheduler": Exact("eta"),
    "UniPCMultistepScheduler": Exact("never"),
}
FLOW = "it is for flow matching, whose latents have no cumulative alpha"
TOKENS = "it works on tokens, not on latents"
EDM = "it scales latents as EDM does, where the network's input has no cumulative alpha"
CONSISTENCY = "it is for consistency models, whose steps do not start from predicted noise"
VIDEO = "it is for video transformers, which are not supported"
INVERSE = "it runs from an image to noise"
TREE = "it draws from a Brownian tree of its own, so that noise can not be given"
REFUSED = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "CMStochasticIterativeScheduler": CONSISTENCY,
    "CogVideoXDDIMScheduler": VIDEO,
    "CogVideoXDPMScheduler": VIDEO,
    "ConsistencyDecoderScheduler": CONSISTENCY,
    "CosineDPMSolverMultistepScheduler": TREE,
    "DDIMInverseScheduler": INVERSE,
    "DDPMWuerstchenScheduler": "its time steps are shares of the schedule, which are not supported",
    "DPMSolverMultistepInverseScheduler": INVERSE,
    "DPMSolverSDEScheduler": TREE,
    "DiscreteDDIMScheduler": TOKENS,
    "EDMDPMSolverMultistepScheduler": EDM,
    "EDMEulerScheduler": EDM,
    "EntropyBoundScheduler": TOKENS,
    "FlowMapEulerDiscreteScheduler": FLOW,
    "FlowMatchEulerDiscreteScheduler": FLOW,
    "FlowMatchHeunDiscreteScheduler": FLOW,
    "FlowMatchLCMScheduler": FLOW,
    "HeliosDMDScheduler": FLOW,
    "HeliosScheduler": FLOW,
    "IPNDMScheduler": "it has no cumulative alphas",
    "KarrasVeScheduler": EDM,
    "LTXEulerAncestralRFScheduler": FLOW,
    "MiniMaxH3Scheduler": FLOW,
    "PiflowScheduler": FLOW,
    "RFD4ProteinaScheduler": FLOW,
    "RePaintScheduler": "each of its steps needs the image and the mask that it paints into",
    "SCMScheduler": FLOW,
    "ScoreSdeVeScheduler": "it corrects between steps, with evaluations of its own",
    "ScoreSdeVpScheduler": "its steps take a score, and its time steps are shares of the schedule",
    "UnCLIPScheduler": "its steps have to be told the next time step",
    "VQDiffusionScheduler": TOKENS,
}


def check_scheduler(scheduler: SchedulerMixin) -> Exact:
    """How a scheduler is sampled; a class that extends a known one is sampled as that.

    Raises ValueError, with name and reason, for one that can not be sampled exactly as stock pipelines do.
    """
    name = type(scheduler).__name__
    for parent in type(scheduler).__mro__:
        if parent.__name__ in REFUSED:
            raise ValueError(f"{name} is not supported: {REFUSED[parent.__name__]}; {_ADVICE}")
        if parent.__name__ in EXACT:
            exact = EXACT[parent.__name__]
            _check_config(scheduler, name, exact)
            return exact
    raise ValueError(f"{name} is not known: {_ADVICE}")


_ADVICE = f"take one of {', '.join(EXACT)}"


def _check_config(scheduler: SchedulerMixin, name: str, exact: Exact) -> None:
    config = scheduler.config
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        raise ValueError(f"{name} is set to flow matching, whose latents have no cumulative alpha: {_ADVICE}, without")
    predicts = prediction_of(scheduler)
    if predicts not in exact.predictions:
        raise ValueError(f"{name} takes no network that predicts {predicts}: it takes {', '.join(exact.predictions)}")
    if str(config.get("variance_type")).startswith("learned"):
        raise ValueError(
            f"{name} takes the variance from the network (variance_type {config.variance_type}), of which only the "
            "prediction is kept: set variance_type to fixed_small or fixed_large"
        )


def prediction_of(scheduler: SchedulerMixin) -> str:
    """What the network predicts: ``epsilon``, ``sample`` or ``v_prediction``."""
    found = scheduler.config.get("prediction_type", "epsilon")
    return "sample" if found == "original_sample" else found


def is_ddim(scheduler: SchedulerMixin) -> bool:
    """Whether eta is DDIM's."""
    return any(parent.__name__ in ("DDIMScheduler", "DDIMParallelScheduler") for parent in type(scheduler).__mro__)


def adds_noise(scheduler: SchedulerMixin, eta: float) -> bool:
    """Whether the steps of a scheduler add noise. Raises ValueError as ``check_scheduler``."""
    kind = check_scheduler(scheduler).adds_noise
    if kind == "sde":
        return str(scheduler.config.algorithm_type).startswith("sde-")
    return eta > 0 if kind == "eta" else kind == "always"


def cumulative_alphas(scheduler: SchedulerMixin, timesteps: Tensor, steps: int | None = None) -> Tensor:
    """Cumulative alpha at each of ``timesteps`` and after the last: float64 (len(timesteps) + 1,).

    They are those of the training schedule at whole time steps, and after the last the scheduler's own
    ``final_alpha_cumprod`` (DDIM, PNDM), or 1. With fractional steps, or noise levels spaced by a rule of their own
    (``use_karras_sigmas`` and the like), they follow from the sigmas of the schedule of ``steps``: 1 / (1 + sigma^2).

    Raises ValueError for a scheduler without cumulative alphas (flow matching).
    """
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    if cumulative is None:
        raise ValueError(f"{type(scheduler).__name__} has no cumulative alphas: take a variance-preserving scheduler")
    if timesteps.is_floating_point() or any(scheduler.config.get(option) for option in _SPACINGS):
        return 1 / (1 + _sigmas(scheduler, len(timesteps) if steps is None else steps).square())
    final = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).reshape(1)
    return torch.cat([cumulative[timesteps].double().cpu(), final.double().cpu()])


_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def _sigmas(scheduler: SchedulerMixin, steps: int) -> Tensor:
    """The noise level at each evaluation of a schedule, and after the last, in float64."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    count = len(scheduler.timesteps)
    sigmas = torch.as_tensor(scheduler.sigmas).double().cpu()
    levels = sigmas[:count].clone()
    between = getattr(scheduler, "sigmas_interpol", None)
    if between is not None:  # every second evaluation is at a level between two of the schedule
        levels[1::2] = torch.as_tensor(between).double().cpu()[1:count:2]
    return torch.cat([levels, sigmas[-1:]])


def prediction_weights(prediction: str, alphas: Tensor) -> Tensor | None:
    """What a network predicts at cumulative alphas (steps,): (steps, 2), weights of the clean sample and of the noise.

    None where it predicts the noise itself; (1, 0) for ``sample``, (-sqrt(1 - a), sqrt(a)) for ``v_prediction``
    (Salimans and Ho 2022, arXiv 2202.00512).
    """
    if prediction == "epsilon":
        return None
    if prediction == "sample":
        return torch.tensor([1.0, 0.0], dtype=alphas.dtype).repeat(len(alphas), 1)
    return torch.stack([-(1 - alphas).sqrt(), alphas.sqrt()], 1)
