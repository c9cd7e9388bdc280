"""The .gopt file: deterministic, atomic, and refused by name whatever is wrong with it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from graphopt import artifact as artifact_module
from graphopt import container, weights_file
from graphopt.artifact import Artifact, check_writable, deflate, read_artifact
from graphopt.errors import ArtifactError, TargetError
from graphopt.files import atomic_write
from graphopt.manifest import Dim, Kernel, Manifest, Peak, TensorSpec
from graphopt.straight_line import StraightLine, Tensor
from tests import compiled

Members = dict[str, bytes]


def _artifact(library: bytes = b"\x7fELF not really", **changes: Any) -> Artifact:
    weights: dict[str, np.ndarray[Any, Any]] = {
        "w": np.arange(12, dtype=np.int8).reshape(3, 4),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 5), np.int32),
        "flags": np.array([True, False]),
    }
    manifest = compiled.manifest(weights=tuple(weights), **changes)
    return Artifact(manifest, library, weights, deflate(b"object"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return _artifact().save(tmp_path / "model.gopt")


def _refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_artifact(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is refused: "), message
    return message.removeprefix(f"{path} is refused: ")


def _members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write(path: Path, members: Members) -> None:
    path.write_bytes(b"".join(container.encode(members)))


def _edit_manifest(path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    members = _members(path)
    body = json.loads(members["manifest.json"])
    edit(body)
    _write(path, {**members, "manifest.json": json.dumps(body).encode()})


def _line(tensor: str) -> dict[str, Any]:
    return {**StraightLine().to_json(), "tensors": [tensor]}


def test_a_saved_artifact_loads_equal(saved: Path) -> None:
    original, loaded = _artifact(), Artifact.load(saved)
    assert loaded.manifest == original.manifest
    assert loaded.library == original.library
    assert loaded.kernels == original.kernels == b"object"
    assert list(loaded.weights) == list(original.weights)
    for name, weight in original.weights.items():
        assert loaded.weights[name].dtype == weight.dtype
        assert loaded.weights[name].shape == weight.shape
        assert np.array_equal(loaded.weights[name], weight)


def test_every_field_of_the_manifest_survives(tmp_path: Path) -> None:
    spec = TensorSpec("a", "int8", (2, Dim("n", 1, None)))
    changes: dict[str, Any] = {
        "kernels": (Kernel("k", "layer1.conv", "conv2d", "int8", 1000), Kernel("copy")),
        "peaks": (Peak("peak_int8", "int8", 10**9, (spec,)),),
        "history": ({"pass": "fold-batch-norm", "rewrites": 2},),
        "stats": {"parameters": 12},
        "report": {"reverted": ["fc"]},
        "versions": {"apache-tvm": "0.27.0.post1"},
        "output_structure": {"dict": [["a", 0], ["b", {"list": [1, {"value": None}]}]]},
        "threads": 2,
        "gpu": "sm_80",
        "line": StraightLine(tensors=(Tensor("input", 0, 0, "int8", (2,)),), outputs=(0,)),
    }
    original = _artifact(**changes)
    assert Artifact.load(original.save(tmp_path / "m.gopt")).manifest == original.manifest


def test_two_saves_are_the_same_bytes_and_an_ordinary_zip(saved: Path, tmp_path: Path) -> None:
    again = _artifact().save(tmp_path / "again.gopt")
    assert again.read_bytes() == saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        members = ["manifest.json", "model.o.zlib", "model.so.zlib", "weights.safetensors"]
        assert archive.namelist() == members
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_weights_are_what_the_safetensors_library_reads_and_writes(saved: Path) -> None:
    original = _artifact().weights
    theirs = safetensors.numpy.load(_members(saved)["weights.safetensors"])
    assert set(theirs) == set(original)
    assert all(np.array_equal(theirs[name], original[name]) for name in original)
    ours = weights_file.decode(memoryview(safetensors.numpy.save(dict(original))))
    assert all(np.array_equal(ours[name], original[name]) for name in original)


def test_one_changed_byte_anywhere_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    generator = np.random.default_rng(0)
    accepted = []
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= int(generator.integers(1, 256))
        saved.write_bytes(changed)
        try:
            read_artifact(saved)
        except ArtifactError:
            continue
        accepted.append(position)
    assert accepted == []


def test_every_truncation_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for size in [*range(0, len(data), 7), len(data) - 1]:
        saved.write_bytes(data[:size])
        assert _refusal(saved)


def test_appended_and_prepended_bytes_are_refused(saved: Path) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data + b"\0")
    assert _refusal(saved)
    saved.write_bytes(b"#!" + data)
    assert _refusal(saved).startswith("the bytes at 0 are not what graphopt wrote")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../model.so.zlib", "leads out of the archive by '..'"),
        ("a/../../model.so.zlib", "leads out of the archive by '..'"),
        ("/etc/passwd", "has an absolute path"),
        ("C:model.so.zlib", "has an absolute path"),
        ("folder/", "is a directory"),
        ("extra.txt", "does not belong there"),
        ("model\u00e9.so", "has a name with characters other than printable ASCII"),
    ],
)
def test_a_member_with_a_bad_name_is_refused(saved: Path, name: str, fault: str) -> None:
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x" if not name.endswith("/") else b"")
    assert _refusal(saved) == f"member {name!r} {fault}"


def test_a_doubled_a_linked_and_a_missing_member_are_refused(saved: Path) -> None:
    members = _members(saved)
    with (
        zipfile.ZipFile(saved, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("model.so.zlib", b"other code")
    assert _refusal(saved) == "member 'model.so.zlib' is there twice"

    with zipfile.ZipFile(saved, "w") as archive:
        link = zipfile.ZipInfo("model.so.zlib")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/lib/libc.so.6")
    assert _refusal(saved) == "member 'model.so.zlib' is a symbolic link"

    for name in members:
        _write(saved, {key: data for key, data in members.items() if key != name})
        assert _refusal(saved) == f"member {name!r} is missing"


def test_a_compressed_member_is_refused_before_it_can_explode(saved: Path) -> None:
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.so.zlib", bytes(10**8))
    assert _refusal(saved) == "member 'model.so.zlib' is compressed"


def test_an_encrypted_and_an_oversized_member_are_refused(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    directory = data.index(b"PK\1\2")
    encrypted = bytearray(data)
    encrypted[directory + 8] |= 1
    saved.write_bytes(encrypted)
    assert _refusal(saved) == "member 'manifest.json' is encrypted"
    data[directory + 20 : directory + 28] = b"\xff\xff\xff\x7f" * 2
    saved.write_bytes(data)
    assert _refusal(saved) == ("member 'manifest.json' claims a size that the file does not hold")


def test_overlapping_members_are_refused(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    first = data.index(b"PK\1\2")
    second = data.index(b"PK\1\2", first + 1)
    third = data.index(b"PK\1\2", second + 1)
    data[third + 16 : third + 28] = data[second + 16 : second + 28]
    data[third + 42 : third + 46] = data[second + 42 : second + 46]
    saved.write_bytes(data)
    assert "hidden, overlapping or reordered" in _refusal(saved)


def test_an_archive_of_right_members_in_other_zip_clothes_is_refused(saved: Path) -> None:
    members = _members(saved)
    with zipfile.ZipFile(saved, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert _refusal(saved).startswith("the bytes at 0 are not what graphopt wrote")


def test_a_member_of_another_hash_or_size_is_refused(saved: Path) -> None:
    members = _members(saved)
    other = members["model.so.zlib"][:-1] + b"?"
    _write(saved, {**members, "model.so.zlib": other})
    assert _refusal(saved) == "member 'model.so.zlib' does not have the hash in the manifest"
    _write(saved, {**members, "model.so.zlib": other + b"?"})
    assert _refusal(saved) == "member 'model.so.zlib' is not of the size in the manifest"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"\x00" + data[1:], "is not deflated data"),
        (lambda data: data[:-5], "is cut off, too long or too large"),
        (lambda data: data + b"more", "is cut off, too long or too large"),
    ],
)
@pytest.mark.parametrize("member", ["model.so.zlib", "model.o.zlib"])
def test_code_that_does_not_inflate_is_refused(
    saved: Path, member: str, change: Callable[[bytes], bytes], reason: str
) -> None:
    members = _members(saved)
    code = change(members[member])
    body = json.loads(members["manifest.json"])
    body["members"][member] = {"sha256": hashlib.sha256(code).hexdigest(), "size": len(code)}
    manifest = json.dumps(body).encode()
    _write(saved, {**members, "manifest.json": manifest, member: code})
    if member == "model.so.zlib":
        assert _refusal(saved) == f"member {member!r} {reason}"
        return
    loaded = Artifact.load(saved)  # its bytes are checked, and no session needs them
    with pytest.raises(ArtifactError) as caught:
        _ = loaded.kernels
    assert str(caught.value) == (
        f"the model is refused: member {member!r} {reason}; compile it again"
    )


def test_another_format_version_is_refused_by_name(saved: Path) -> None:
    _edit_manifest(saved, lambda body: body.update(format_version=1))
    assert _refusal(saved) == (
        "manifest.json: it has format version 1 and this graphopt reads 5; "
        "compile the model again, or use the graphopt that made it"
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda body: body.pop("format"), "it does not describe a .gopt file"),
        (lambda body: body.pop("inputs"), "a field is missing or malformed"),
        (lambda body: body.update(inputs=[{"name": "x"}]), "a field is missing or malformed"),
        (lambda body: body["inputs"][0].update(shape=[-1]), "-1 is no dimension"),
        (
            lambda body: body.update(line=_line("input 9+0 int8 []")),
            "is of no input of the network",
        ),
        (lambda body: body.update(line=_line("weight 9+0 int8 []")), "is of no weight of the net"),
        (
            lambda body: body.update(line=_line("input 0")),
            "its line of calls is malformed: 'input 0'",
        ),
        (lambda body: body.update(output_structure=4), "4 is no structure of 4 outputs"),
        (lambda body: body.update(output_structure={"set": []}), "'set' is no kind of output"),
    ],
)
def test_a_malformed_manifest_is_refused(
    saved: Path, edit: Callable[[dict[str, object]], object], message: str
) -> None:
    _edit_manifest(saved, edit)
    refusal = _refusal(saved)
    assert refusal.startswith("manifest.json: ")
    assert message in refusal


def test_a_manifest_that_is_no_json_is_refused(saved: Path) -> None:
    members = _members(saved)
    for text in (b"", b"{", b"\xff", b"[" * 100_000, b"[]"):
        _write(saved, {**members, "manifest.json": text})
        assert _refusal(saved).startswith("manifest.json: it ")


def test_features_that_this_cpu_lacks_are_named_before_loading(tmp_path: Path) -> None:
    path = _artifact(features=("sse4_2", "avx1024", "amx9")).save(tmp_path / "m.gopt")
    with pytest.raises(TargetError) as caught:
        read_artifact(path)
    assert str(caught.value) == (
        f"{path} is compiled for x86-64 and this CPU lacks amx9, avx1024; "
        "compile the model with target='native' on this machine"
    )


def test_another_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _artifact().save(tmp_path / "m.gopt")
    monkeypatch.setattr(artifact_module, "architecture", lambda: "aarch64")
    with pytest.raises(TargetError) as caught:
        read_artifact(path)
    assert str(caught.value) == (
        f"{path} is compiled for x86-64 (x86_64) and this machine is aarch64; "
        "compile the model for it"
    )


def test_paths_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "m.gopt"
    with pytest.raises(ArtifactError) as caught:
        read_artifact(missing)
    assert str(caught.value) == f"{missing} cannot be read: No such file or directory"
    for write in (_artifact().save, check_writable):
        with pytest.raises(ArtifactError) as caught:
            write(missing)
        assert str(caught.value) == f"{missing} cannot be written: No such file or directory"
    with pytest.raises(ArtifactError, match=r" cannot be written: .* is a directory$"):
        check_writable(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="mode bits are POSIX")
def test_a_folder_without_permission_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, *arguments: object, **options: object) -> io.BytesIO:
        raise PermissionError(13, "Permission denied", str(self))  # root ignores mode bits

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ArtifactError, match=r"cannot be written: Permission denied$"):
        check_writable(tmp_path / "m.gopt")


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "m.gopt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_the_old_file(saved: Path, failure: type[BaseException]) -> None:
    before = saved.read_bytes()

    def interrupted() -> None:
        with atomic_write(saved) as file:
            file.write(b"half")
            raise failure

    with pytest.raises(failure):
        interrupted()
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_weights_must_be_those_of_the_manifest() -> None:
    manifest: Manifest = compiled.manifest(weights=("b", "a"))
    weights = {"a": np.zeros(1), "b": np.zeros(1)}
    with pytest.raises(ArtifactError) as caught:
        Artifact(manifest, b"", weights)
    assert str(caught.value) == ("the weights are not those that the manifest names, in its order")


def test_a_dtype_that_safetensors_lacks_cannot_be_saved(tmp_path: Path) -> None:
    weights = {"c": np.zeros(1, np.complex64)}
    artifact = Artifact(compiled.manifest(weights=("c",)), b"", weights)
    with pytest.raises(ArtifactError) as caught:
        artifact.save(tmp_path / "m.gopt")
    assert str(caught.value) == (
        "weights.safetensors cannot be written: tensor 'c' has dtype complex64, "
        "which it cannot hold"
    )
    assert list(tmp_path.iterdir()) == []
