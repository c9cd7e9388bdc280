"""The four functions, called from another language: statuses, batches, many instances and threads, memory."""

from __future__ import annotations

import gc
import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from graphopt.backends.lower import images as lower_images
from tests.export import support
from tests.export.support import Library, Several, Small, compiled, example, exported, seeded


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, Callable[..., list[bytes]]]:
    """A network in int8 that takes 1 to 4 images, and what a session makes of them."""
    with pytest.MonkeyPatch.context() as patch:  # a network this small would not be worth it
        patch.setattr(lower_images, "_cycles", lambda *_: (1.0, 0.0))
        x = example(2, 3, 64, 64)
        artifact = compiled(seeded(Small), (x,), integer=True, batch=(1, 4), threads=2)
    assert artifact.manifest.image_by_image
    folder = exported(artifact, tmp_path_factory.mktemp("export") / "images")
    return Library.load(folder), lambda x: support.wanted(artifact, [x])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Three inputs, one of them indices below 11, and four outputs."""
    inputs = torch.arange(8).reshape(1, 8), example(1, 8, 6), example(1, 8, 1) > 0
    artifact = compiled(seeded(Several), inputs)
    return Library.load(exported(artifact, tmp_path_factory.mktemp("export") / "words"))


def batch(count: int, seed: int = 0) -> support.Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 64, 64)).astype(np.float32)


def result(count: int) -> support.Array:
    return np.zeros((count, 10), np.float32)


def test_the_description(images: tuple[Library, Callable[..., list[bytes]]]):
    described = images[0].query()
    assert (described.input_count, described.output_count) == (1, 1)
    assert (described.smallest_batch, described.largest_batch) == (1, 4)
    assert described.weights_size == images[0].weights.stat().st_size
    assert described.memory > 64 * 64 * 3  # the input in int8, at least
    assert images[0].message(0) == "it worked"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_is_the_images_one_by_one(
    images: tuple[Library, Callable[..., list[bytes]]], threads: int
):
    library, wanted = images
    model = library.create(threads=threads)
    for count in (1, 4, 3):
        x, y = batch(count), result(count)
        library.run(model, [x], [y])
        assert [y.tobytes()] == wanted(x)
    library.destroy(model)


def test_weights_in_memory_serve_any_number_of_instances(
    images: tuple[Library, Callable[..., list[bytes]]],
):
    library, wanted = images
    flash = mmap.mmap(-1, library.weights.stat().st_size)  # begins at a page
    flash.write(library.weights.read_bytes())
    memory = np.frombuffer(flash, np.uint8)
    first, second = (library.create(memory=memory) for _ in range(2))
    for model in (first, second, first):
        x, y = batch(1), result(1)
        library.run(model, [x], [y])
        assert [y.tobytes()] == wanted(x)
    library.destroy(first)
    library.destroy(second)
    with pytest.raises(RuntimeError, match=r"^weights in memory must begin at a multiple of 64"):
        library.create(memory=memory[4:])
    with pytest.raises(RuntimeError, match=r"^the weights are cut off"):
        library.create(memory=memory[:-1])
    with pytest.raises(RuntimeError, match=r"^the weights are cut off"):
        library.create(memory=memory[:63])


def test_instances_run_at_once(images: tuple[Library, Callable[..., list[bytes]]]):
    """ctypes leaves the interpreter's lock while a function runs."""
    library, wanted = images
    want = {seed: wanted(batch(1, seed)) for seed in range(3)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        model, x = library.create(threads=2), batch(1, seed)
        for _ in range(20):
            y = result(1)
            library.run(model, [x], [y])
            if [y.tobytes()] != want[seed]:
                wrong.append(seed)
        library.destroy(model)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_instance_that_runs_is_busy(images: tuple[Library, Callable[..., list[bytes]]]):
    library, _ = images
    model, refusals = library.create(), list[str]()
    end = time.monotonic() + 30

    def work() -> None:
        x, y = batch(4), result(4)
        while not refusals and time.monotonic() < end:
            try:
                library.run(model, [x], [y])
            except RuntimeError as error:
                refusals.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library.destroy(model)
    assert set(refusals) == {"this instance is running on another thread; make one for each"}


def test_create_and_destroy_leak_nothing(images: tuple[Library, Callable[..., list[bytes]]]):
    library, _ = images

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    def round_of(count: int) -> int:
        for _ in range(count):
            library.destroy(library.create(threads=2))
        gc.collect()
        return pages()

    library.destroy(None)
    before = round_of(20)
    after = round_of(200)
    # one instance and its weights are more than 100 pages of 4 kB; 200 of them would be 20,000
    assert after - before < 1000


def damaged(library: Library, folder: Path, change: Callable[[bytearray], bytearray]) -> Path:
    path = folder / "damaged.weights"
    path.write_bytes(change(bytearray(library.weights.read_bytes())))
    return path


def flipped(data: bytearray, at: int) -> bytearray:
    data[at] ^= 1
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: flipped(data, 0), "this is no weights file of graphopt"),
        (lambda data: flipped(data, 8), "this is no weights file of graphopt"),
        (
            lambda data: flipped(data, 12),
            "the weights are those of another export; use the file that lay beside this code",
        ),
        (
            lambda data: flipped(data, 64),
            "the weights are damaged: their checksum is wrong",
        ),
        (
            lambda data: flipped(data, len(data) - 1),
            "the weights are damaged: their checksum is wrong",
        ),
        (lambda data: data[:-1], "the weights are cut off, or something follows them"),
        (lambda data: data + b"\0", "the weights are cut off, or something follows them"),
        (lambda data: data[:20], "the weights are cut off, or something follows them"),
        (lambda data: data[:0], "the weights are cut off, or something follows them"),
    ],
)
def test_weights_are_checked(
    words: Library,
    tmp_path: Path,
    change: Callable[[bytearray], bytearray],
    message: str,
):
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        words.create(damaged(words, tmp_path, change))


def test_weights_of_another_export_and_none_are_refused(
    images: tuple[Library, Callable[..., list[bytes]]], words: Library, tmp_path: Path
):
    with pytest.raises(RuntimeError, match=r"^the weights are those of another export; "):
        words.create(images[0].weights)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(RuntimeError, match=r"^the weights file cannot be opened or read$"):
            words.create(path)


def test_threads_are_checked(words: Library):
    for threads in (0, -1, 5000):
        with pytest.raises(RuntimeError, match=r"^the number of threads must be at least 1"):
            words.create(threads=threads)


def test_arguments_of_a_run_are_checked(words: Library):
    model = words.create()
    indices = np.arange(8)[None]
    x, mask = np.ones((1, 8, 6), np.float32), np.ones((1, 8, 1), bool)
    outputs = [
        np.zeros((1, 4, 6), np.float32),
        np.zeros((1, 8, 6), bool),
        np.zeros((1, 8, 6), np.float32),
        np.zeros((6, 6), np.float32),
    ]
    words.run(model, [indices, x, mask], outputs)
    assert outputs[2].all()

    def refused(message: str, inputs: list[support.Array], into: list[support.Array]) -> None:
        with pytest.raises(RuntimeError, match=f"^{message}$"):
            words.run(model, inputs, into)

    refused("the number of inputs or outputs is wrong", [indices, x], outputs)
    refused("the number of inputs or outputs is wrong", [indices, x, mask], outputs[:3])
    size = "the size of an input or output is wrong"
    refused(size, [indices.astype(np.int32), x, mask], outputs)
    refused(size, [indices, x, np.ones(9, bool)], outputs)
    refused(size, [indices, x, mask], [*outputs[:3], outputs[0]])
    for wrong in (-1, 11):
        indices[0, 7] = wrong
        refused("an input holds an index outside of its table", [indices, x, mask], outputs)
    indices[0, 7] = 10
    odd = np.zeros(8 * 6 * 4 + 1, np.uint8)[1:]
    at = "weights in memory must begin at a multiple of 64 bytes, inputs at a multiple of their element's size"
    refused(at, [indices, odd, mask], outputs)
    words.run(model, [indices, x, mask], outputs)
    words.destroy(model)


def test_no_pointer_may_be_null(words: Library):
    function = words.function("create")
    assert words.message(function(None, None)) == "an argument, or what it points to, is NULL"
    assert words.function("run")(None, None, 0, None, 0) == 1
