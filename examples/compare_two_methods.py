"""Compare methods of baselines/ on an unconditional diffusers pipeline: error, size, time, and samples side by side.

python examples/compare_two_methods.py                     # round-to-nearest and TFMQ-DM at w4a8: minutes on a CPU
python examples/compare_two_methods.py --methods qdiffusion svdquant --precision w4a4 --picture out.png
python examples/compare_two_methods.py --tiny              # a random network: seconds
"""

import copy
import importlib
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import torch
from common import command_line, open_pipeline
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils import make_image_grid
from PIL import Image

import baselines
import tfmq

METHODS = sorted(path.stem for path in Path(baselines.__file__).parent.glob("[!_]*.py"))
COLUMNS = 4


def main() -> None:
    """Quantise a copy of the network with each method, and print a line for it."""
    parser = command_line(__doc__.partition("\n")[0])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["nearest", "tfmq"], help="files of baselines/"
    )
    parser.add_argument("--picture", type=Path, help="write samples here, a row for full precision and for each method")
    options = parser.parse_args()
    pipeline = open_pipeline(parser, options)
    full = pipeline.unet
    pool, trajectory = (record(pipeline, options.steps, options.images, seed) for seed in (0, 1))
    rows = samples(pipeline, full, options.steps) if options.picture else []

    print(f"{'method':24}{'noise error':>14}{'MiB':>10}{'seconds':>10}")
    for name in options.methods:
        method = importlib.import_module(f"baselines.{name}").METHOD
        if method.objection(options.precision):
            print(f"{method.label:24}does not apply: {method.objection(options.precision)}")
            continue
        recipe = shortened(method.config(), options.iterations).recipe()
        unet, generator = copy.deepcopy(full), torch.Generator().manual_seed(0)
        report = tfmq.quantize_(unet, options.precision, recipe, pool, generator)
        seconds = sum(report.seconds.values())
        print(f"{method.label:24}{noise_error(unet, trajectory):14.4f}{size_mib(unet):10.2f}{seconds:10.1f}")
        if options.picture:
            rows += samples(pipeline, unet, options.steps)
    if options.picture:
        make_image_grid(rows, len(rows) // COLUMNS, COLUMNS).save(options.picture)
        print(f"{options.picture}: the same noise in each column, full precision in the first row")


def record(pipeline: DiffusionPipeline, steps: int, images: int, seed: int) -> tfmq.CalibrationSet:
    """A full-precision sampling pass. Methods calibrate on one and are judged on another, from other noise."""
    config, generator = pipeline.unet.config, torch.Generator().manual_seed(seed)
    noise = torch.randn(images, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    return tfmq.collect_calibration(pipeline.unet, pipeline.scheduler, noise, tfmq.SamplingSettings(steps), batch=32)


def shortened(settings: baselines.Settings, iterations: int) -> baselines.Settings:
    """A method's settings, which are its paper's, with at most so many iterations."""
    names = [field.name for field in fields(settings) if field.name.endswith("iterations")]
    return replace(settings, **{name: min(iterations, getattr(settings, name)) for name in names})


@torch.no_grad()
def noise_error(unet: UNet2DModel, trajectory: tfmq.CalibrationSet) -> float:
    """||eps_hat - eps|| / ||eps|| at the points of a full-precision trajectory, mean over steps and images."""
    correction, errors = tfmq.correction_of(unet), []
    for latents, timestep, expected in zip(trajectory.latents, trajectory.timesteps, trajectory.noise, strict=True):
        found = unet(latents, timestep).sample
        if correction is not None:  # PTQD corrects the noise after the network has predicted it
            found, _ = correction(int(timestep), found, 0.0)
        errors.append((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1))
    return torch.stack(errors).mean().item()


def size_mib(unet: UNet2DModel) -> float:
    """The size of the quantised checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tfmq.save_quantized(unet, Path(folder) / "quantised.safetensors", {})
        return (Path(folder) / "quantised.safetensors").stat().st_size / 2**20


def samples(pipeline: DiffusionPipeline, unet: UNet2DModel, steps: int) -> list[Image.Image]:
    """Images that ``unet`` draws in the stock pipeline, from the same noise whichever it is."""
    corrected = tfmq.correction_of(unet) is not None
    scheduler = tfmq.corrected_scheduler(pipeline.scheduler, unet) if corrected else pipeline.scheduler
    drawing = type(pipeline)(**pipeline.components | {"unet": unet, "scheduler": scheduler})
    generator = torch.Generator().manual_seed(2)
    return drawing(batch_size=COLUMNS, num_inference_steps=steps, generator=generator).images


if __name__ == "__main__":
    main()
