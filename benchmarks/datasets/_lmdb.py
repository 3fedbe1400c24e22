"""Images in an LMDB database, as LSUN is published: a key is an image's name, its value the encoded file."""

from __future__ import annotations

import io
import re
import threading
from pathlib import Path

from benchmarks.datasets._originals import LIST, Files, Original, listed

DATABASE = "data.mdb"
LOCK = threading.Lock()


def database(path: Path, original: Original) -> Files:
    """All images of the database in the folder ``path``, by key, or those that its `LIST` names.

    Raises ValueError if the package lmdb is missing, the database is damaged, or keys are not those of the original.
    """
    try:
        import lmdb
    except ImportError:
        raise ValueError(
            f"{path} is an LMDB database: run `pip install lmdb`, or export it to a folder with LSUN's own script"
        ) from None
    try:
        with lmdb.open(str(path), readonly=True, lock=False) as store, store.begin() as transaction:
            keys = [bytes(key).decode("ascii", "replace") for key in transaction.cursor().iternext(values=False)]
    except lmdb.Error as error:
        raise ValueError(f"{path / DATABASE} cannot be read ({error}): {original.advice}") from None
    if (path / LIST).is_file():
        known = set(keys)
        keys = listed(path / LIST)
        missing = [key for key in keys if key not in known]
        if missing:
            some = f"{len(missing)} of {len(keys)} images are missing in {path}, the first is {missing[0]}"
            raise ValueError(f"{some}: {original.advice}")
    wrong = [key for key in keys if not re.fullmatch(original.names, f"{key}.webp")]
    if wrong or not keys:
        found = f"the key {wrong[0]}" if wrong else "no images"
        raise ValueError(f"{path} has {found}, so it is none of the original's databases: {original.advice}")
    found = (path / DATABASE).stat()
    stamp = f"{found.st_size} {found.st_mtime_ns} {len(keys)}"
    return Files(path, keys, lambda key: io.BytesIO(_value(path, key)), stamp)


def _value(path: Path, key: str) -> bytes:
    # Opened each time, which takes less than a decoded image: a database may not be open twice in a process, nor in one
    # that forks.
    import lmdb

    with LOCK, lmdb.open(str(path), readonly=True, lock=False) as store, store.begin() as transaction:
        return transaction.get(key.encode("ascii"))
