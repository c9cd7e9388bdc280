"""Files that are either whole or absent: a temporary file beside the target, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes ``path`` when the block ends, and vanishes when it raises.

    A crash or Ctrl-C leaves the old file, or none. Raises ``OSError`` as ``open`` does.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return  # directories cannot be opened, nor need be synced, on Windows
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def probe_writable(path: Path) -> None:
    """Raise the ``OSError`` that writing ``path`` would end in, by creating a file beside it."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    temporary = _temporary(path)
    temporary.open("xb").close()
    temporary.unlink()
