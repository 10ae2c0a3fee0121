"""Images in tar files: WebDataset's shards, and ImageNet as it is distributed. Indexed once, then read at any place."""

import itertools
import json
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from fastmask.data.fingerprint import of_files
from fastmask.data.images import SUFFIXES

_CLASS = re.compile(r"n\d{8}\.tar")


class Member(NamedTuple):
    """A file in a tar: the tar's number, its name, and where its content lies."""

    tar: int
    name: str
    offset: int
    size: int


class _TarImages:
    """Images in tars, by their number."""

    channels = 3
    _tars: list[Path]
    _images: list[Member]

    def __len__(self) -> int:
        return len(self._images)

    def name(self, item: int) -> str:
        """Return the tar's path and the member's name."""
        member = self._images[item]
        return f"{self._tars[member.tar]}:{member.name}"


class WebDataset(_TarImages):
    """Tars of samples: files of one name up to the first dot, an image and its label in `.cls` or in `.json`."""

    kind = "webdataset"

    def __init__(self, tars: Sequence[Path], suffixes: frozenset[str] = SUFFIXES) -> None:
        self._tars = list(tars)
        self.class_names: list[str] = []
        self.ignored: list[str] = []
        self._images = []
        self._labels: list[Member | None] = []
        for number, tar in enumerate(self._tars):
            samples: dict[str, dict[str, Member]] = {}
            for member in _members(number, tar):
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                samples.setdefault(f"{folder}/{stem}", {})[suffix.lower()] = member
            for sample in samples.values():
                images = [member for suffix, member in sample.items() if f".{suffix}" in suffixes]
                if not images:
                    self.ignored += [member.name for member in sample.values()]
                    continue
                self._images.append(images[0])
                self._labels.append(sample.get("cls") or sample.get("json"))
        if not self._images:
            raise ValueError(f"{self._tars[0]} holds no images: expected SAMPLE.jpg (or .png, ...) and SAMPLE.cls")
        self._labelled = any(self._labels)

    @staticmethod
    def first_suffixes(path: Path) -> set[str]:
        """Return the suffixes of the first few members of a tar, none if it cannot be read."""
        try:
            with tarfile.open(path, "r:") as tar:
                return {Path(entry.name).suffix for entry in itertools.islice(tar, 4)}
        except (OSError, tarfile.TarError):
            return set()

    def count_classes(self) -> int:
        """Return the number of classes, 0 without labels; reads every label."""
        return 1 + max(map(self._label, range(len(self)))) if self._labelled else 0

    def read(self, item: int) -> tuple[bytes, int]:
        """Return the content of an image and its label."""
        return _content(self._tars, self._images[item]), self._label(item) if self._labelled else 0

    def fingerprint(self) -> str:
        """Return what tells these members from others; of their labels a sample is read."""
        names, sizes = [member.name for member in self._images], [member.size for member in self._images]
        return of_files(names, sizes, [], self.read)

    def _label(self, item: int) -> int:
        member = self._labels[item]
        if member is None:
            raise ValueError(f"{self.name(item)} has no label, as others have")
        text = _content(self._tars, member)
        try:
            label = int(json.loads(text)["label"] if member.name.endswith("json") else text)
        except (ValueError, KeyError, TypeError):
            label = -1
        if label < 0:
            raise ValueError(f"{self._tars[member.tar]}:{member.name} holds no label: {text[:40]!r}")
        return label


class ImageNetTar(_TarImages):
    """A tar of one tar per class, or those alone, named by the class: n01440764.tar and so on."""

    kind = "imagenet-tar"

    def __init__(self, tars: Sequence[Path]) -> None:
        self._tars = list(tars)
        self.ignored: list[str] = []
        found: list[tuple[str, Member]] = []
        for number, tar in enumerate(self._tars):
            if self.is_class(tar):
                found += [(tar.stem, member) for member in _members(number, tar)]
                continue
            try:
                with tarfile.open(tar, "r:") as outer:
                    for entry in outer:
                        inner = outer.extractfile(entry)
                        if inner:
                            members = _members(number, tar, inner, entry.offset_data)
                            found += [(Path(entry.name).stem, member) for member in members]
            except tarfile.TarError as error:
                raise ValueError(f"{tar} cannot be read as a tar: {error}") from error
        images = [(name, member) for name, member in found if Path(member.name).suffix.lower() in SUFFIXES]
        self.ignored = [member.name for _, member in found if Path(member.name).suffix.lower() not in SUFFIXES]
        if not images:
            raise ValueError(f"{self._tars[0]} holds no images")
        self.class_names = sorted({name for name, _ in images})
        number_of = {name: number for number, name in enumerate(self.class_names)}
        self._images = [member for _, member in images]
        self._labels = [number_of[name] for name, _ in images]

    @staticmethod
    def is_class(path: Path) -> bool:
        """Return whether a path is that of a class's tar."""
        return _CLASS.fullmatch(path.name) is not None

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Return whether a tar is of a class, or of such tars; a ValueError if it is none at all."""
        if cls.is_class(path):
            return True
        try:
            with tarfile.open(path) as tar:
                first = tar.next()
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"{path} cannot be read as a tar: {error}") from error
        return first is not None and _CLASS.fullmatch(Path(first.name).name) is not None

    def count_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    def read(self, item: int) -> tuple[bytes, int]:
        """Return the content of an image and its label."""
        return _content(self._tars, self._images[item]), self._labels[item]

    def fingerprint(self) -> str:
        """Return what tells these members and labels from others."""
        names, sizes = [member.name for member in self._images], [member.size for member in self._images]
        return of_files(names, sizes, self._labels, self.read)


def _members(number: int, path: Path, file: IO[bytes] | None = None, start: int = 0) -> list[Member]:
    """Return the files of a tar, or of a tar in it that ``file`` reads and that begins at byte ``start``."""
    try:
        # Not compressed: a member is read at its place.
        with tarfile.open(None if file else path, "r:", fileobj=file) as tar:
            return [Member(number, e.name, start + e.offset_data, e.size) for e in tar if e.isfile()]
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read as a tar: {error}") from error


def _content(tars: Sequence[Path], member: Member) -> bytes:
    file = os.open(tars[member.tar], os.O_RDONLY)
    try:
        content = os.pread(file, member.size, member.offset)
    finally:
        os.close(file)
    if len(content) < member.size:
        raise ValueError(f"{tars[member.tar]}:{member.name} is cut off")
    return content
