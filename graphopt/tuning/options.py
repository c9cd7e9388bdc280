"""What a user says about tuning: a clock budget, where results are kept, and which device measures."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import TuneError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_budget(text: str) -> float:
    """``"30s"``, ``"5m"``, ``"1h"`` in seconds; raises ``TuneError``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or float(match[1]) == 0:
        raise TuneError(f"the tuning budget {text!r} is no time; write 30s, 5m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def default_store() -> Path:
    """``graphopt/tuning.sqlite`` in the user's cache folder (XDG)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "graphopt" / "tuning.sqlite"


@dataclass(frozen=True)
class Tuning:
    """Where measurements are kept and made: ``store`` None is ``default_store()``, ``rpc`` the ``HOST:PORT`` of a tracker.

    ``key`` names the device as its RPC server registered it. Without ``rpc`` nothing is measured remotely, and ``key``
    says whose measurements in the store count. RPC gives full code execution to whoever reaches the port.
    """

    store: str | os.PathLike[str] | None = None
    rpc: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if self.rpc is not None:
            _ = self.address
            if self.key is None:
                raise TuneError(
                    "tuning over RPC needs the device's key; name the one that its rpc_server registered"
                )

    @property
    def path(self) -> Path:
        """The store's file."""
        return default_store() if self.store is None else Path(self.store)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the tracker."""
        host, _, port = (self.rpc or "").rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise TuneError(f"the RPC tracker {self.rpc!r} must look like 127.0.0.1:9190")
        return host, int(port)
