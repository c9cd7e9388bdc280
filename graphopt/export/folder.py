"""A folder that is either whole or absent: written beside the place it belongs to, then renamed."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from graphopt.errors import ExportError


def check_folder(folder: Path, force: bool) -> None:
    """Raise ExportError unless ``folder`` may be written: ask before the work, not after."""
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ExportError(
            f"{folder} is not empty; name another folder, or use --force to replace the files in it"
        )
    if not folder.absolute().parent.is_dir():
        raise ExportError(f"{folder} cannot be made: {folder.absolute().parent} is no folder")


def write_folder(folder: Path, files: Mapping[str, bytes], force: bool) -> None:
    """Make ``folder`` of these files.

    An existing one (``force``) keeps its other files, and each of these is replaced whole. A crash or Ctrl-C leaves nothing behind.
    """
    check_folder(folder, force)
    target = folder.absolute()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        if target.exists() and any(target.iterdir()):
            for name in files:
                (temporary / name).replace(target / name)
            temporary.rmdir()
        else:
            temporary.replace(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ExportError(f"{folder} cannot be written: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
