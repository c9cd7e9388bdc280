"""The result's numbers and the page that shows them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from graphopt.demo.page import page
from graphopt.demo.result import EAGER, FLOAT, INT8, Result, Slow


@pytest.fixture
def result() -> Result:
    slow = Slow("features.0 <first>", "conv2d", 0.5, 0.25, 100.0, None)
    return Result(
        network="Net",
        machine="CPU",
        target="avx2",
        photos=20,
        float_correct=18,
        int8_correct=17,
        crops=240,
        agreeing=234,
        float_bytes=18_000_000,
        int8_bytes=4_500_000,
        latency={EAGER: 40.0, FLOAT: 10.0, INT8: 4.0},
        slowest=(slow, *[Slow(f"l{i}", "conv2d", 0.1, 0.05, None, 0.5) for i in range(4)]),
        calibration=42,
        seconds=60.0,
    )


def test_derived_numbers(result: Result) -> None:
    report = json.loads(json.dumps(result.to_json()))
    assert report["agreement"] == 0.975
    assert report["smaller"] == 4.0
    assert report["faster"] == 10.0
    assert report["slowest"][0]["gops"] == 100.0


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "path", "use", "rect"):
            assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(result: Result) -> None:
    text = page(result)
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert {"svg", "table", "title"} <= tags.seen
    assert not {"script", "img", "link"} & tags.seen
    assert all(link.startswith("#") for link in tags.links)


def test_page_shows_the_numbers(result: Result) -> None:
    text = page(result)
    for shown in (
        "18 of 20",
        "17 of 20",
        "97.5% of 240",
        "4.00 times smaller",
        "10.0 times faster",
    ):
        assert shown in text
    assert "features.0 &lt;first&gt;" in text
    assert "<first>" not in text


def test_picture_is_the_same_twice(result: Result) -> None:
    def without_ids(text: str) -> str:
        return re.sub(r"<style.*?</style>", "", text, flags=re.S)

    assert without_ids(page(result)) == without_ids(page(result))
