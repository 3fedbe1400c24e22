"""How the small models were made: `python -m benchmarks.small STEP --help`.

Each step reads and writes below benchmarks/small/build/, which git ignores, and leaves a small file below
benchmarks/small/logs/, which git keeps; `publish` copies what the suite uses from build/ to data/.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.small import describing, making
from benchmarks.small.folders import HERE
from benchmarks.small.settings import load

STEPS = {
    "download": making.run_download,
    "prepare": making.run_prepare,
    "first-stage": making.run_first_stage,
    "diffusion": making.run_diffusion,
    "class-diffusion": making.run_class_diffusion,
    "transformer": making.run_transformer,
    "kl-first-stage": making.run_kl_first_stage,
    "kl-diffusion": making.run_kl_diffusion,
    "text-clip": making.run_text_clip,
    "score-clip": making.run_score_clip,
    "text-diffusion": making.run_text_diffusion,
    "evaluator": making.run_evaluator,
    "publish": making.run_publish,
    "prompts": making.run_prompts,
    "measure": describing.run_measure,
    "card": describing.run_card,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=HERE / "params.yaml", help="settings (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, step in STEPS.items():
        steps.add_parser(name, help=step.__doc__, description=step.__doc__)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        STEPS[options.step](load(options.params))
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename or error} is missing: run the steps before {options.step} first")


if __name__ == "__main__":
    main()
