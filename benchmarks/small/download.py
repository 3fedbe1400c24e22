"""Fetch npm packages through the npm client, and check what came."""

import base64
import hashlib
import subprocess
import tempfile
from pathlib import Path


def pack(package: str, integrity: str, path: Path) -> None:
    """Fetch `package`, as in `name@1.0.0`, with `npm pack`; `path` appears only if the archive is the expected one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        subprocess.run(["npm", "pack", package, "--pack-destination", folder], check=True)
        (archive,) = Path(folder).glob("*.tgz")
        check(archive, integrity)
        archive.replace(path)


def check(path: Path, integrity: str) -> None:
    """Raise a ValueError unless the file has the integrity that npm records: `sha512-` and the hash in base 64."""
    with path.open("rb") as file:
        found = "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if found != integrity:
        raise ValueError(f"{path.name} has the integrity {found}, not {integrity}: fetch it again.")
