"""An exported network in the place of the one it was made from, in stock diffusers pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import load_file
from torch import Tensor

from tfmq.export.description import Description
from tfmq.export.kernels import check_integer, executed_kernels
from tfmq.export.openvino import CORRECTION, compile_model, load_openvino
from tfmq.numerics.finite import all_finite
from tfmq.numerics.steps import exact_steps
from tfmq.passes.correction import NoiseCorrection, attach_correction


class ExportedNetwork:
    """Runs an exported network with integer kernels: ``pipeline.unet = ExportedNetwork(folder)``.

    A pipeline of a DiT has it as ``pipeline.transformer``.

    Attributes:
        config: of the network whose place it takes.
        dtype, device: float32 on the CPU.
        stands_for: the class of that network; `tfmq.sample` takes it in the network's place.
        description: what is exported.
        kernels: how each layer and attention product executes on this machine.
        noise_correction: that the network carries (PTQD), for `tfmq.corrected_scheduler`, or None.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, folder: str | Path, threads: int | None = None, allow_float: bool = False) -> None:
        """Load and compile, which takes seconds.

        Args:
            folder: what `export_openvino` wrote.
            threads: None for as many as torch takes.
            allow_float: load also where quantised layers would run in floating point on this machine.

        Raises:
            ValueError: there is no export in ``folder``, a layer would run in floating point, or OpenVINO is missing.
        """
        load_openvino()
        folder = Path(folder)
        self.description = Description.read(folder)
        self.config = FrozenDict(self.description.config)
        self.stands_for = self.description.network_class
        self._compiled = compile_model(folder, threads)
        self.kernels = executed_kernels(self._compiled, self.description.kernels)
        if not allow_float:
            check_integer(self.kernels)
        self._request = self._compiled.create_infer_request()
        self.noise_correction: NoiseCorrection | None = None
        if self.description.corrected:
            state = load_file(folder / CORRECTION)
            steps, channels = state["biases"].shape
            correction = NoiseCorrection(steps, channels, predicts_noise="predicts" not in state)
            correction.load_state_dict(state)
            attach_correction(self, correction)

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        condition: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **unused: None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The predicted noise, as the network that it stands for gives it.

        Args:
            sample: latents (B, C, H, W).
            timestep: one for all rows, () or (B,).
            condition, encoder_hidden_states, class_labels: context (B, tokens, D) or classes (B,), by any one name.
            unused: what pipelines pass as None.

        Raises:
            ValueError: inputs of other shapes than it was exported for, an unknown time step, or an argument that the
                exported network does not take.
        """
        given = [name for name, value in unused.items() if value is not None]
        if given:
            raise ValueError(f"the exported network takes no {given[0]}: leave it out")
        found = [each for each in (condition, encoder_hidden_states, class_labels) if each is not None]
        if len(found) > 1:
            raise ValueError("give the condition once: as encoder_hidden_states or as class_labels")
        described = self.description
        step = _single(timestep)
        if not all_finite(sample):
            raise ValueError(f"sample holds NaN or infinity at time step {step}, which would become codes unseen")
        inputs = [_checked("sample", sample, described.latents).float(), self._index(step)]
        if described.condition is None and found:
            raise ValueError(f"a {described.network_class} takes no condition: leave it out")
        if described.condition is not None:
            if not found:
                raise ValueError(f"the exported network is conditioned: give {described.condition} beside the latents")
            context = _checked("condition", found[0], described.condition)
            inputs.append(context.float() if len(described.condition) > 1 else context.long())
        results = self._request.infer([tensor.detach().contiguous().numpy() for tensor in inputs])
        output = torch.from_numpy(results[0].copy()).to(sample.dtype)
        if not all_finite(output):
            raise ValueError(f"the exported network put out NaN or infinity at time step {step}")
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def parameters(self) -> Iterator[Tensor]:
        """None: they are the compiled model's own."""
        return iter(())

    def _index(self, step: int | float) -> Tensor:
        """The index (1,) of a time step."""
        steps = self.description.timesteps
        if step not in steps:
            raise ValueError(
                f"no table for time step {step}: this network was exported for the {len(steps)} steps {list(steps)}; "
                "sample with that schedule, or export for yours"
            )
        return torch.tensor([steps.index(int(step))])


def _single(timestep: Tensor | float | int) -> int | float:
    """The time step that all rows are at."""
    values = exact_steps(timestep).reshape(-1).unique()
    if len(values) != 1:
        raise ValueError(f"the rows are at different time steps {values.tolist()}: give one for all")
    return values[0].item()


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} is of shape {tuple(tensor.shape)}, and the network was exported for {shape}: export for yours"
        )
    return tensor.cpu()
