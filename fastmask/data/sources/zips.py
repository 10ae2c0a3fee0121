"""Image zips: class folders, or the layout of EDM's dataset_tools with `dataset.json`."""

import os
import posixpath
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from fastmask.console import printable
from fastmask.data.fingerprint import of_files
from fastmask.data.sources.folders import FileTree
from fastmask.data.sources.source import MAX_BYTES
from fastmask.files import open_regular

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # ends with the lengths of the name and of an extra field
_ENCRYPTED = 1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# The errors that the standard library raises for a damaged directory.
_DAMAGED = (zipfile.BadZipFile, OSError, EOFError, ValueError, LookupError, struct.error, NotImplementedError)


class Entry(NamedTuple):
    """An entry of a zip's central directory: offset of the local header, compressed and uncompressed size, ..."""

    name: str
    offset: int
    packed: int
    size: int
    crc: int
    method: int
    flags: int


class Zip(FileTree):
    """A zip of images: see `FileTree`. The directory is read once, members are read in place."""

    kind = "zip"
    _in_file = True

    def __init__(self, path: Path, labelled: bool = True) -> None:
        super().__init__(labelled)
        self._where = path
        entries = _entries(path)
        found = self._sort([entry.name for entry in entries], lambda number, most: self._read(entries[number], most))
        self._entries = [entries[number] for number in found]

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, item: int) -> str:
        """Return the zip's path and the file's name."""
        return self._place(self._entries[item])

    def content(self, item: int) -> bytes:
        """Return the content of a file."""
        return self._read(self._entries[item], MAX_BYTES)

    def fingerprint(self) -> str:
        """Return a hash of the files and labels."""
        names, sizes = [entry.name for entry in self._entries], [entry.size for entry in self._entries]
        return of_files(names, sizes, self.known_labels(), self.content)

    def _place(self, entry: Entry) -> str:
        return printable(f"{self._where}:{entry.name}")

    def _read(self, entry: Entry, most: int) -> bytes:
        if entry.flags & _ENCRYPTED or entry.method not in _METHODS:
            how = "encrypted" if entry.flags & _ENCRYPTED else f"compressed by method {entry.method}"
            raise ValueError(f"{self._place(entry)} is {how}: pack the zip plainly, or by deflate")
        if max(entry.size, entry.packed) > most:
            raise ValueError(f"{self._place(entry)} has {entry.size:,} bytes, more than the {most:,} it may have")
        # Opened for each read: workers must not share a file position.
        with os.fdopen(open_regular(self._where), "rb") as file:
            header = os.pread(file.fileno(), _LOCAL_HEADER.size, entry.offset)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
                raise ValueError(f"{self._place(entry)} is cut off, or the zip's list is damaged")
            start = entry.offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header)[1:])
            content = os.pread(file.fileno(), entry.packed, start)
        if entry.method == zipfile.ZIP_DEFLATED:
            try:
                # Limits the output to one byte above the size in the directory, whatever it would inflate to.
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, entry.size + 1)
            except zlib.error as error:
                raise ValueError(f"{self._place(entry)} is damaged: {error}") from error
        if len(content) != entry.size or zlib.crc32(content) != entry.crc:
            raise ValueError(f"{self._place(entry)} is damaged: its checksum is not that of the zip's list")
        return content


def _entries(path: Path) -> list[Entry]:
    found: dict[str, Entry] = {}
    try:
        with os.fdopen(open_regular(path), "rb") as file, zipfile.ZipFile(file) as listed:
            size = os.fstat(file.fileno()).st_size
            for info in listed.infolist():
                name = posixpath.normpath(info.filename.lstrip("/"))
                if name == ".." or name.startswith("../"):
                    raise ValueError(f"{printable(info.filename)} leads out of it")
                if info.is_dir():
                    continue
                if not 0 <= info.header_offset < size:
                    raise ValueError(f"its list is damaged at {printable(name)}")
                if name in found:
                    raise ValueError(f"it holds {printable(name)} twice: pack it again")
                found[name] = Entry(
                    name,
                    info.header_offset,
                    info.compress_size,
                    info.file_size,
                    info.CRC,
                    info.compress_type,
                    info.flag_bits,
                )
    except _DAMAGED as error:
        raise ValueError(f"{path} cannot be read as a zip: {error}") from error
    return sorted(found.values(), key=lambda entry: entry.name)
