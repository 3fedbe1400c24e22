"""Quantise the UNet of an unconditional diffusers pipeline with TFMQ-DM, keep it in one file, and draw an image.

python examples/quantise_your_pipeline.py                  # the small suite's model: minutes on a CPU
python examples/quantise_your_pipeline.py my-pipeline --steps 50 --iterations 2000
python examples/quantise_your_pipeline.py --tiny           # a random network: seconds
"""

from pathlib import Path

import torch
from common import command_line, open_pipeline

import tfmq


def main() -> None:
    """From a pipeline to a quantised pipeline, in five steps."""
    parser = command_line(__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default="quantised.safetensors", help="the file to write")
    parser.add_argument("--workspace", type=Path, help="folder that keeps what is learned: a stopped run goes on there")
    options = parser.parse_args()
    pipeline = open_pipeline(parser, options)
    unet = pipeline.unet

    # 1. Draw some images in full precision, and record what the network sees at each step: the calibration pool.
    generator = torch.Generator().manual_seed(0)
    channels, size = unet.config.in_channels, unet.config.sample_size
    noise = torch.randn(options.images, channels, size, size, generator=generator)
    settings = tfmq.SamplingSettings(options.steps)
    pool = tfmq.collect_calibration(unet, pipeline.scheduler, noise, settings, batch=32)

    # 2. Say what is done to the network, in order. A recipe is a tuple of passes; this one is TFMQ-DM's.
    rounding = tfmq.RoundingConfig(options.iterations, batch=16, learning_rate=0.03)
    every_step = tfmq.Spaced(steps=None, images=options.images, shuffled=True)
    recipe = (
        tfmq.WeightRanges("search"),
        tfmq.TemporalReconstruction(rounding),
        tfmq.BlockReconstruction(rounding, tfmq.Spaced(steps=20, images=options.images)),
        tfmq.FiniteSetCalibration(),
        tfmq.ActivationRanges(every_step, momentum=0.95, batch=16),
    )

    # 3. Quantise in place. The generator is the only source of randomness.
    workspace = None if options.workspace is None else tfmq.FolderWorkspace(options.workspace)
    report = tfmq.quantize_(unet, options.precision, recipe, pool, generator, workspace=workspace)
    for spent in report.passes:
        print(f"{spent.name:24}{spent.seconds:8.1f} s{spent.optimizer_steps:8} optimiser steps")
    for layer in report.coverage:
        if layer.reason:
            print(f"{layer.path} ({layer.kind}) is not quantised: {layer.reason}")

    # 4. Keep it. The file describes itself: nothing else is needed to load it.
    tfmq.save_quantized(unet, options.output, {"recipe": repr(recipe)})
    print(f"{options.output}: {options.output.stat().st_size / 2**20:.2f} MiB, {len(report.coverage)} layers")

    # 5. Draw with what was kept, in the stock pipeline.
    pipeline.unet = tfmq.load_quantized(options.output)
    image = pipeline(batch_size=1, num_inference_steps=options.steps, generator=generator).images[0]
    image.save(options.output.with_suffix(".png"))
    print(f"{options.output.with_suffix('.png')}: drawn with it")


if __name__ == "__main__":
    main()
