"""Object files of 64-bit little-endian ELF (x86-64, AArch64): read symbols, rename them, drop debug sections.

Done on the bytes, so that a file for any target is written without that target's tools. The layout is that of the System V
ABI, chapters 4 and 5: a header, the sections, a table of section headers. Sections keep their numbers, which symbols and
relocations refer to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_MAGIC = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian, version 1
_RELOCATABLE, _NO_BITS, _SYMBOL_TABLE = 1, 8, 2
_HIDDEN = 2  # visible to what it is linked with, not outside of the result
_MACHINES = {62: "x86_64", 183: "aarch64"}


class ElfError(ValueError):
    """The bytes are no object file of this kind; the message is a clause."""


@dataclass(frozen=True)
class Symbol:
    """A global or weak symbol, defined here or needed from elsewhere."""

    name: str
    defined: bool


@dataclass(frozen=True)
class _Section:
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int
    data: bytes = field(default=b"", repr=False)

    def packed(self, offset: int) -> bytes:
        fields = (self.name, self.kind, self.flags, self.address, offset, self.size)
        return _SECTION.pack(*fields, self.link, self.info, self.alignment, self.entry_size)


def is_object(data: bytes) -> bool:
    """Whether ``data`` begins like a file that this module reads."""
    return data.startswith(_MAGIC)


def architecture(data: bytes) -> str:
    """``x86_64`` or ``aarch64``. Raises ElfError for another."""
    machine = _header(data)[2]
    if machine not in _MACHINES:
        raise ElfError(f"it is for machine {machine}, neither x86_64 nor aarch64")
    return _MACHINES[machine]


def _header(data: bytes) -> tuple[int, ...]:
    if not is_object(data) or len(data) < _HEADER.size:
        raise ElfError("it is no 64-bit little-endian ELF file")
    header = _HEADER.unpack_from(data)
    if header[1] != _RELOCATABLE:
        raise ElfError("it is no relocatable object file")
    return header


def _sections(data: bytes) -> list[_Section]:
    header = _header(data)
    table, count = header[6], header[12]
    if table + count * _SECTION.size > len(data):
        raise ElfError("its section headers are cut off")
    sections = []
    for index in range(count):
        section = _Section(*_SECTION.unpack_from(data, table + index * _SECTION.size))
        if section.kind == _NO_BITS:
            sections.append(section)
            continue
        if section.offset + section.size > len(data):
            raise ElfError("a section is cut off")
        body = data[section.offset : section.offset + section.size]
        sections.append(replace(section, data=body))
    return sections


def _written(header: tuple[int, ...], sections: list[_Section]) -> bytes:
    """The file with these sections, one behind the other."""
    body = bytearray(_HEADER.size)
    table = b""
    for section in sections:
        body += bytes(-len(body) % max(1, section.alignment))
        table += section.packed(len(body) if section.kind else 0)
        body += section.data
    body += bytes(-len(body) % 8)
    fields = list(header)
    fields[6] = len(body)
    body[: _HEADER.size] = _HEADER.pack(*fields)
    return bytes(body + table)


def _string(table: bytes, start: int) -> str:
    return table[start : table.index(b"\0", start)].decode()


def without_debug(data: bytes) -> bytes:
    """The same code with empty debug sections; what is no such file is returned as it is."""
    if not is_object(data):
        return data
    header, sections = _header(data), _sections(data)
    names = sections[header[13]].data

    def kept(section: _Section) -> _Section:
        name = _string(names, section.name)
        debug = name.startswith((".debug", ".rela.debug"))
        return replace(section, data=b"", size=0) if debug else section

    return _written(header, [kept(section) for section in sections])


def _symbol_table(sections: list[_Section]) -> int:
    for index, section in enumerate(sections):
        if section.kind == _SYMBOL_TABLE:
            return index
    raise ElfError("it has no symbol table")


def _globals(table: _Section, names: bytes) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Offset, name and fields of the symbols that other files see; ``info`` is the number of local ones before them."""
    for offset in range(table.info * _SYMBOL.size, table.size, _SYMBOL.size):
        fields = _SYMBOL.unpack_from(table.data, offset)
        yield offset, _string(names, fields[0]), fields


def symbols(data: bytes) -> list[Symbol]:
    """The global and weak symbols. Raises ElfError."""
    sections = _sections(data)
    table = sections[_symbol_table(sections)]
    names = sections[table.link].data
    return [Symbol(name, fields[3] != 0) for _, name, fields in _globals(table, names)]


def renamed(data: bytes, new_names: Mapping[str, str]) -> bytes:
    """The same code with other names of global symbols, which are hidden: no shared library shows them. Raises ElfError."""
    header, sections = _header(data), _sections(data)
    index = _symbol_table(sections)
    table = sections[index]
    strings = sections[table.link]
    body, names = bytearray(table.data), bytearray(strings.data)
    for offset, name, fields in _globals(table, strings.data):
        if name in new_names:
            _, info, other, *rest = fields
            _SYMBOL.pack_into(body, offset, len(names), info, other & ~3 | _HIDDEN, *rest)
            names += new_names[name].encode() + b"\0"
    sections[index] = replace(table, data=bytes(body))
    sections[table.link] = replace(strings, data=bytes(names), size=len(names))
    return _written(header, sections)
