"""A zip archive of stored members that has exactly one encoding: ``decode(encode(m)) == m``, and
``decode`` refuses every file that is not byte for byte ``encode`` of its members.

Members are sorted by name, uncompressed, dated 1980-01-01, mode 0644, without extra fields, comments
or gaps (APPNOTE 6.3.10, sections 4.3.7, 4.3.12, 4.3.16). So two equal models are equal files, nothing
hides between members, and a change of any one byte is found: in the data by its CRC-32, elsewhere by
the comparison.
"""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_VERSION, _MADE_ON_UNIX, _DATE = 20, 3 << 8 | 20, 1 << 5 | 1
_MODE = (stat.S_IFREG | 0o644) << 16
_ENCRYPTED = 0x1
SIZE_LIMIT = 2**32 - 1


class ContainerError(ValueError):
    """The bytes are no archive of the one form; the message is a clause without the file's name."""


def encode(members: Mapping[str, bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Yield the archive of ``members`` in pieces; raises ``ContainerError`` from 4 GiB on."""
    offset, directory = 0, b""
    for name in sorted(members):
        data, encoded = members[name], name.encode("ascii")
        size, checksum = len(data), zlib.crc32(data)
        if offset + size > SIZE_LIMIT:
            raise ContainerError("it would be larger than 4 GiB, the limit of the format")
        common = (0, 0, 0, _DATE, checksum, size, size, len(encoded))
        yield _LOCAL.pack(b"PK\3\4", _VERSION, *common, 0) + encoded
        yield data
        directory += _CENTRAL.pack(
            b"PK\1\2", _MADE_ON_UNIX, _VERSION, *common, 0, 0, 0, 0, _MODE, offset
        )
        directory += encoded
        offset += _LOCAL.size + len(encoded) + size
    yield directory
    count = len(members)
    yield _END.pack(b"PK\5\6", 0, 0, count, count, len(directory), offset, 0)


def _fault(entry: zipfile.ZipInfo, data: bytes) -> str | None:
    """Return what is wrong with a member, as a clause, or None."""
    name = entry.orig_filename
    parts = name.replace("\\", "/").split("/")
    if not name.isascii() or not name.isprintable():
        return "has a name with characters other than printable ASCII"
    if name.startswith(("/", "\\")) or ":" in name:
        return "has an absolute path"
    if ".." in parts:
        return "leads out of the archive by '..'"
    if entry.is_dir():
        return "is a directory"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a symbolic link"
    if entry.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if entry.compress_type != zipfile.ZIP_STORED:
        return "is compressed"
    if entry.file_size != entry.compress_size or entry.file_size > len(data):
        return "claims a size that the file does not hold"
    return None


def _entries(data: bytes) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise ContainerError("it is not a zip archive, or is truncated") from error


def decode(data: bytes) -> dict[str, memoryview]:
    """Return the members of an archive as views into ``data``; no data is checked yet.

    Raises ``ContainerError`` for a damaged directory and for a member that is linked, absolute,
    ``..``, doubled, compressed or encrypted. Call ``verify`` before using the members.
    """
    members: dict[str, memoryview] = {}
    view = memoryview(data)
    for entry in _entries(data):
        fault = _fault(entry, data)
        if fault is not None:
            raise ContainerError(f"member {entry.orig_filename!r} {fault}")
        if entry.filename in members:
            raise ContainerError(f"member {entry.filename!r} is there twice")
        start = entry.header_offset + _LOCAL.size + len(entry.filename)
        members[entry.filename] = view[start : start + entry.file_size]
    return members


def verify(data: bytes, members: Mapping[str, memoryview]) -> None:
    """Raise ``ContainerError`` unless ``data`` is exactly ``encode(members)``."""
    offset, view = 0, memoryview(data)
    for piece in encode(members):
        if view[offset : offset + len(piece)] != piece:
            raise ContainerError(
                f"the bytes at {offset} are not what graphopt wrote: it is damaged, or holds "
                "hidden, overlapping or reordered data"
            )
        offset += len(piece)
    if offset != len(data):
        raise ContainerError(f"{len(data) - offset} bytes follow the archive")
