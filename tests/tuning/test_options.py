"""Budgets, the default path, and devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.errors import TuneError
from graphopt.tuning.options import Tuning, default_store, parse_budget


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30.0), ("5m", 300.0), ("1h", 3600.0), ("0.5s", 0.5)]
)
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "s", "0s", "-3s", "30 s", "5 minutes", "1m30s"])
def test_refuses_what_is_no_budget(text: str) -> None:
    with pytest.raises(TuneError) as caught:
        parse_budget(text)
    assert str(caught.value) == f"the tuning budget {text!r} is no time; write 30s, 5m or 1h"


def test_the_default_store_is_in_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store() == tmp_path / "graphopt" / "tuning.sqlite"
    assert Tuning().path == default_store()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_store() == tmp_path / ".cache" / "graphopt" / "tuning.sqlite"


def test_a_device_has_an_address_and_a_key() -> None:
    assert Tuning(rpc="127.0.0.1:9190", key="board").address == ("127.0.0.1", 9190)
    with pytest.raises(TuneError) as caught:
        Tuning(rpc="127.0.0.1:9190")
    assert str(caught.value) == (
        "tuning over RPC needs the device's key; name the one that its rpc_server registered"
    )


@pytest.mark.parametrize("rpc", ["9190", ":9190", "host:", "host:port", "host:0", "host:70000"])
def test_refuses_what_is_no_address(rpc: str) -> None:
    with pytest.raises(TuneError) as caught:
        Tuning(rpc=rpc, key="board")
    assert str(caught.value) == f"the RPC tracker {rpc!r} must look like 127.0.0.1:9190"
