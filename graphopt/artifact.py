"""The compiled model as one file: ``.gopt`` = zip(``manifest.json``, ``model.o.zlib``, ``model.so.zlib``, ``weights.safetensors``).

The archive is stored; the library is deflated before it goes in (a third of its size), weights lie as they are used. The
object file of the kernels is there for ``graphopt export``; a session does not read it.

Everything is checked before the code is mapped: that the archive is of the one form that graphopt
writes (``graphopt.container``), the format version, the SHA-256 of every member, and by CPUID that this
machine has the features the code uses. Hashes prove integrity, not trust: a ``.gopt`` is native code,
and loading one from a stranger is running a stranger's program.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import container, weights_file
from graphopt import manifest as manifest_file
from graphopt.cpu_features import architecture, cpu_features
from graphopt.errors import ArtifactError, TargetError
from graphopt.files import atomic_write, probe_writable
from graphopt.manifest import Manifest
from graphopt.session import Session

_LOG = logging.getLogger(__name__)

_MANIFEST, _LIBRARY, _WEIGHTS = "manifest.json", "model.so.zlib", "weights.safetensors"
_KERNELS = "model.o.zlib"
_HASHED = (_LIBRARY, _WEIGHTS, _KERNELS)
_LARGEST_LIBRARY = 1 << 30  # what a deflated member may grow to


def deflate(code: bytes) -> bytes:
    """Code as it lies in the file."""
    return zlib.compress(code, level=9)


_NOTHING = deflate(b"")


@dataclass(frozen=True, eq=False)
class Artifact:
    """A compiled model in memory; ``program`` is the one that was compiled, ``report`` says how.

    ``weights`` follow the inputs as arguments of ``manifest.entry`` in ``library``, in order. ``deflated_kernels`` is
    ``kernels`` as ``deflate`` writes it.
    ``program`` and ``report`` are not saved (``manifest.report`` is).
    """

    manifest: Manifest
    library: bytes = dataclasses.field(repr=False)
    weights: Mapping[str, np.ndarray[Any, Any]] = dataclasses.field(repr=False)
    deflated_kernels: bytes = dataclasses.field(default=_NOTHING, repr=False)
    program: Any = dataclasses.field(default=None, repr=False)
    report: Any = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if tuple(self.weights) != self.manifest.weights:
            raise ArtifactError("the weights are not those that the manifest names, in its order")

    @functools.cached_property
    def kernels(self) -> bytes:
        """The object file of the functions that ``manifest.line`` calls; inflated here, for a session does without.

        Raises ArtifactError.
        """
        try:
            return _inflated(_KERNELS, self.deflated_kernels)
        except container.ContainerError as error:
            raise ArtifactError(f"the model is refused: {error}; compile it again") from error

    def members(self) -> dict[str, bytes]:
        """Return the members of the file by name; equal artifacts give equal bytes."""
        try:
            body = {
                _LIBRARY: deflate(self.library),
                _KERNELS: self.deflated_kernels,
                _WEIGHTS: weights_file.encode(self.weights),
            }
        except weights_file.WeightsError as error:
            raise ArtifactError(f"{_WEIGHTS} cannot be written: {error}") from error
        hashes = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            for name, data in body.items()
        }
        return {_MANIFEST: self.manifest.to_json(hashes), **body}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file atomically (temporary file, fsync, rename) and return its path.

        Raises ``ArtifactError`` where it cannot be written; then, and after Ctrl-C, what was there
        before is there still.
        """
        target = Path(path)
        try:
            with atomic_write(target) as file:
                file.writelines(container.encode(self.members()))
        except (OSError, container.ContainerError) as error:
            raise ArtifactError(f"{target} cannot be written: {_reason(error)}") from error
        return target

    def session(self, threads: int | None = None, cuda_graphs: bool = True) -> Session:
        """Return a session that runs this model on ``threads`` threads (default: as compiled).

        ``cuda_graphs`` is for models of GPUs; see ``CudaSession``. Raises ``TargetError`` where this CPU lacks features the code uses.
        """
        check_cpu(self.manifest, "the artifact")
        if self.manifest.gpu:
            from graphopt.cuda_session import CudaSession

            return CudaSession(self, threads, cuda_graphs)
        return Session(self, threads)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Artifact:
        """Read and check a file; see ``read_artifact``."""
        return read_artifact(path)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise ``ArtifactError`` if ``path`` cannot be written: ask before hours of work, not after."""
    try:
        probe_writable(Path(path))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {_reason(error)}") from error


def check_cpu(manifest: Manifest, source: str) -> None:
    """Raise ``TargetError`` unless this CPU is of the manifest's kind and has all its features."""
    wanted = manifest.triple.partition("-")[0]
    if wanted != architecture():
        raise TargetError(
            f"{source} is compiled for {manifest.target} ({wanted}) and this machine is "
            f"{architecture()}; compile the model for it"
        )
    missing = sorted(set(manifest.features) - cpu_features())
    if missing:
        raise TargetError(
            f"{source} is compiled for {manifest.target} and this CPU lacks {', '.join(missing)}; "
            "compile the model with target='native' on this machine"
        )


def _unpack(data: bytes) -> tuple[Manifest, dict[str, memoryview]]:
    members = container.decode(data)
    if _MANIFEST not in members:
        raise container.ContainerError(f"member {_MANIFEST!r} is missing")
    body = manifest_file.parse_json(bytes(members[_MANIFEST]))
    for name in members:
        if name not in (_MANIFEST, *_HASHED):
            raise container.ContainerError(f"member {name!r} does not belong there")
    for name in _HASHED:
        if name not in members:
            raise container.ContainerError(f"member {name!r} is missing")
    container.verify(data, members)
    for name in _HASHED:
        _check_hash(name, members[name], body.get("members"))
    return manifest_file.from_json(body), members


def _check_hash(name: str, data: memoryview, recorded: Any) -> None:
    entry = recorded.get(name) if isinstance(recorded, dict) else None
    if not isinstance(entry, dict) or entry.get("size") != len(data):
        raise container.ContainerError(f"member {name!r} is not of the size in the manifest")
    if entry.get("sha256") != hashlib.sha256(data).hexdigest():
        raise container.ContainerError(f"member {name!r} does not have the hash in the manifest")


def _inflated(name: str, data: bytes | memoryview) -> bytes:
    stream = zlib.decompressobj()
    try:
        code = stream.decompress(data, _LARGEST_LIBRARY)
    except zlib.error as error:
        raise container.ContainerError(f"member {name!r} is not deflated data") from error
    if not stream.eof or stream.unused_data:
        raise container.ContainerError(f"member {name!r} is cut off, too long or too large")
    return code


def _opened(path: str | os.PathLike[str]) -> tuple[Manifest, dict[str, memoryview]]:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {_reason(error)}") from error
    try:
        return _unpack(data)
    except container.ContainerError as error:
        raise ArtifactError(f"{path} is refused: {error}") from error
    except manifest_file.ManifestError as error:
        raise ArtifactError(f"{path} is refused: {_MANIFEST}: {error}") from error


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of a whole, unchanged file, whatever CPU it is for; see ``read_artifact``."""
    return _opened(path)[0]


def read_artifact(path: str | os.PathLike[str], any_cpu: bool = False) -> Artifact:
    """Return the artifact in a ``.gopt`` file after every check that needs no trust in it.

    Raises ``ArtifactError``, naming file and member, for a file that cannot be read, is truncated,
    differs in one byte from what graphopt wrote, has other members, or is of another format version;
    ``TargetError`` if this CPU cannot run it, which ``any_cpu`` leaves to who does. Nothing is mapped or executed.
    """
    manifest, members = _opened(path)
    if not any_cpu:
        check_cpu(manifest, str(path))
    try:
        library = _inflated(_LIBRARY, members[_LIBRARY])
        weights = weights_file.decode(members[_WEIGHTS])
    except container.ContainerError as error:
        raise ArtifactError(f"{path} is refused: {error}") from error
    except weights_file.WeightsError as error:
        raise ArtifactError(f"{path} is refused: {_WEIGHTS}: {error}") from error
    if tuple(weights) != manifest.weights:
        raise ArtifactError(f"{path} is refused: {_WEIGHTS} holds not the manifest's weights")
    _LOG.debug("%s: %s, %d weights", path, manifest.target, len(weights))
    return Artifact(manifest, library, weights, bytes(members[_KERNELS]))


def load(
    path: str | os.PathLike[str], threads: int | None = None, cuda_graphs: bool = True
) -> Session:
    """Load a ``.gopt`` file and return a session that runs it; see ``Artifact.session``.

    The file is checked first: ``ArtifactError`` if it is damaged or of another
    version, ``TargetError`` if this CPU cannot run it. **It holds native code**, and its hashes prove
    only that it is whole: load what you would also execute.
    """
    return read_artifact(path).session(threads, cuda_graphs)
