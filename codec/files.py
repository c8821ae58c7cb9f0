"""Writing a file so that a reader, or a kill at any moment, never meets half of it."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one step; an error leaves the old file and no new one.

    Args:
        path: file to write; its folder must exist.
        data: whole contents; text is written as UTF-8.
    Raises:
        OSError: the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
