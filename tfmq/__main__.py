"""``python -m tfmq``: look at quantised checkpoints, and export them to programs that execute them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its errors are one line on stderr, and the exit code 1."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tfmq", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="say what a quantised checkpoint holds")
    inspect.add_argument("file", type=Path, help="what save_quantized wrote, such as quantized.safetensors")
    inspect.set_defaults(command=_inspect)

    export = commands.add_parser(
        "export",
        help="write a quantised checkpoint for another program",
        description="Write a quantised checkpoint for another program. Needs pip install tfmq-bench[deploy].",
    )
    export.add_argument("file", type=Path, help="what save_quantized wrote, such as quantized.safetensors")
    export.add_argument(
        "--to",
        nargs=2,
        required=True,
        metavar=("TARGET", "DIR"),
        help="openvino, which executes it in integers on a CPU, or onnx, for interchange; and a folder for it",
    )
    export.add_argument("--batch", type=int, default=1, help="rows of one evaluation; guidance doubles it (default: 1)")
    export.add_argument(
        "--size", type=int, nargs="+", metavar="PIXELS", help="of the latents: side, or height and width (default: its)"
    )
    export.add_argument("--tokens", type=int, default=77, help="of the context, where there is one (default: 77)")
    export.add_argument(
        "--timesteps",
        type=int,
        nargs="+",
        metavar="T",
        help="time steps that it is sampled at (default: those it was calibrated for, where the file names them)",
    )
    export.add_argument(
        "--schedule",
        nargs=2,
        metavar=("STEPS", "DIR"),
        help="instead of --timesteps: denoising steps, and the folder of the diffusers scheduler",
    )
    export.add_argument("--allow-float", action="store_true", help="also where layers would run in floating point")
    export.set_defaults(command=_export)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    from tfmq.checkpoint import load_quantized, read_metadata
    from tfmq.packing import packed_bytes
    from tfmq.state import coverage

    metadata, network = read_metadata(options.file), load_quantized(options.file)
    rows, steps = coverage(network), network.step_tracker.steps.tolist()
    print(f"{type(network).__name__}, {packed_bytes(network) / 2**20:.2f} MiB")
    for name in ("cell", "settings"):
        if name in metadata:
            print(f"{name}: {metadata[name]}")
    print(f"time steps: {', '.join(map(str, steps)) if steps else 'any'}")
    widths: dict[tuple[str, int, int], int] = {}
    for row in rows:
        key = row.kind, row.weight_bits, row.activation_bits
        widths[key] = widths.get(key, 0) + 1
    for (kind, weight_bits, activation_bits), count in sorted(widths.items()):
        weights = "" if "product" in kind else f"weights {weight_bits} bits, "
        print(f"{count:4d} {kind}: {weights}activations {activation_bits} bits")
    for row in rows:
        if row.reason:
            print(f"     {row.path}: {row.reason}")


def _export(options: argparse.Namespace) -> None:
    from tfmq.export.description import InputShape
    from tfmq.settings import unknown

    target, folder = options.to
    if target not in ("openvino", "onnx"):
        raise unknown("target", target, ("openvino", "onnx"))
    if options.size is not None and len(options.size) > 2:
        raise ValueError(f"--size is {options.size}: give a side, or height and width")

    from tfmq.checkpoint import load_quantized, read_metadata

    metadata, network = read_metadata(options.file), load_quantized(options.file)
    size = options.size or [network.config.sample_size]
    shape = InputShape(options.batch, size[0], size[-1], options.tokens)
    timesteps = _timesteps(options)
    if target == "onnx":
        from tfmq.export.onnx import export_onnx

        export_onnx(network, folder, shape, timesteps, metadata)
    else:
        from tfmq.export.kernels import summary
        from tfmq.export.openvino import export_openvino

        print(summary(export_openvino(network, folder, shape, timesteps, metadata, options.allow_float)))
    print(f"written to {folder}")


def _timesteps(options: argparse.Namespace) -> list[int] | None:
    """The time steps that the options name, or None."""
    if options.schedule is None:
        return options.timesteps
    if options.timesteps is not None:
        raise ValueError("--timesteps and --schedule both say at which time steps it is sampled: give one of them")
    count, folder = options.schedule
    if not count.isdecimal() or not int(count):
        raise ValueError(f"--schedule is {count} {folder}: give the number of steps first, such as 20")
    from tfmq.export.schedule import timesteps_of

    return timesteps_of(Path(folder), int(count))


if __name__ == "__main__":
    sys.exit(main())
