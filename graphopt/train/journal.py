"""The log of a run: a JSON object a line, cut back to the checkpoint when the run resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from graphopt.errors import TrainError


class Journal:
    """Appends to ``path``; writes nothing where it is None."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._file: Any = None

    def open(self, offset: int) -> None:
        """Begin at a byte offset: 0 for a new run. Raises TrainError where the file cannot be written."""
        if self.path is None:
            return
        try:
            self.path.touch()
            kept = min(offset, self.path.stat().st_size)
            os.truncate(self.path, kept)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise TrainError(f"log {self.path} cannot be written: {error.strerror}") from error

    def write(self, event: str, **values: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"event": event, **values}) + "\n")
            self._file.flush()

    @property
    def offset(self) -> int:
        return 0 if self._file is None else int(self._file.tell())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
