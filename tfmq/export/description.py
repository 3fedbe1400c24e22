"""What an exported network is, in one JSON file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tfmq.export.kernels import Kernel
from tfmq.network.backbone import Network
from tfmq.settings import check_counts

FORMAT = "tfmq-export-1"
FILE = "export.json"


@dataclass(frozen=True)
class InputShape:
    """The shape of all that a network takes; kernels are compiled for it.

    Attributes:
        batch: rows of one evaluation; under guidance, twice the images.
        height, width: of the latents.
        tokens: of the context, where the network takes one.
    """

    batch: int
    height: int
    width: int
    tokens: int = 77

    def __post_init__(self) -> None:
        check_counts(self, "batch", "height", "width", "tokens")

    def latents(self, network: Network) -> tuple[int, int, int, int]:
        """(B, C, H, W)."""
        return self.batch, network.config.in_channels, self.height, self.width

    def condition(self, network: Network, kind: str) -> tuple[int, ...] | None:
        """(B, tokens, D) of a context, (B,) of classes, or None."""
        if kind == "none":
            return None
        return (self.batch,) if kind == "class" else (self.batch, self.tokens, network.config.cross_attention_dim)


@dataclass(frozen=True)
class Description:
    """What `export.json` holds.

    Attributes:
        target: ``openvino`` or ``onnx``.
        network_class, config: of the network whose place it takes.
        latents: shape (B, C, H, W).
        condition: shape of the context (B, tokens, D) or classes (B,); None without conditioning.
        timesteps: that it has tables for.
        kernels: every layer and attention product, as it executed where it was exported.
        versions: of the packages that it was exported with.
        metadata: what the checkpoint says of itself: method, settings.
        corrected: whether a noise correction stands beside it, which acts after guidance.
    """

    target: str
    network_class: str
    config: dict[str, object]
    latents: tuple[int, int, int, int]
    condition: tuple[int, ...] | None
    timesteps: tuple[int, ...]
    kernels: tuple[Kernel, ...]
    versions: dict[str, str]
    metadata: Mapping[str, object] = field(default_factory=dict)
    corrected: bool = False

    def write(self, folder: Path) -> None:
        """Write the file in ``folder``."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Read the file of ``folder``. Raises ValueError where there is none, or it is none of this version."""
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no exported network: there is no {FILE} in it")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("format", None) != FORMAT:
                raise ValueError(f"{path} is not of format {FORMAT}: export again")
            found["kernels"] = tuple(Kernel(**kernel) for kernel in found["kernels"])
            for name in ("latents", "condition", "timesteps"):
                found[name] = None if found[name] is None else tuple(found[name])
            return cls(**found)
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): export again") from None


def plain_config(network: Network) -> dict[str, object]:
    """A network's settings as JSON can hold them."""
    return {name: value for name, value in json.loads(network.to_json_string()).items() if not name.startswith("_")}


def writable(folder: str | Path) -> Path:
    """``folder``, made if need be. Raises ValueError if nothing can be written there."""
    folder = Path(folder)
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write in {folder}: {error.strerror}; give a folder that you may write in") from None
    return folder
