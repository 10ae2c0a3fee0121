"""Image tars, indexed once and read in place: class folders, WebDataset, and ImageNet's original tar."""

import contextlib
import itertools
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from fastmask.console import printable
from fastmask.data.fingerprint import of_files
from fastmask.data.images.pixels import SUFFIXES
from fastmask.data.sources.folders import HIDDEN, LISTS, NO_IMAGE, FileTree, is_hidden
from fastmask.data.sources.labels import WITHOUT, Label, label_of_text, to_numbers
from fastmask.data.sources.source import MAX_BYTES, Source
from fastmask.files import open_regular

_CLASS = re.compile(r"n\d{8}\.tar")
_LABEL_BYTES = {"cls": 2**10, "json": 2**20}  # limits for files that hold a label
LINKS = "links, pipes or devices"
PARTS = "beside an image of a sample"
# The errors that the standard library raises for damaged headers.
_DAMAGED = (OSError, EOFError, ValueError, ArithmeticError, LookupError, MemoryError, tarfile.TarError)


class Member(NamedTuple):
    """A file in a tar: number of the tar, name, offset and size of the content, and whether it is sparse."""

    tar: int
    name: str
    offset: int
    size: int
    sparse: bool = False

    @property
    def stem(self) -> tuple[int, str]:
        """Key of a WebDataset sample: the tar, and the name up to the first dot."""
        folder, slash, file = self.name.rpartition("/")
        return self.tar, folder + slash + file.split(".")[0]

    @property
    def suffix(self) -> str:
        """The lower-case suffix, from the last dot."""
        return posixpath.splitext(self.name)[1].lower()


class _Tars(Source):
    """Images in tars."""

    _tars: list[Path]
    _images: list[Member]

    def __len__(self) -> int:
        return len(self._images)

    def name(self, item: int) -> str:
        """Return the tar's path and the member's name."""
        return _place(self._tars, self._images[item])

    def content(self, item: int) -> bytes:
        """Return the content of an image."""
        return _content(self._tars, self._images[item], MAX_BYTES)

    def read(self, item: int) -> tuple[bytes, int]:
        """Return the content of an image and its label."""
        return self.content(item), self.label(item)

    def fingerprint(self) -> str:
        """Return a hash of the members and labels."""
        names, sizes = [member.name for member in self._images], [member.size for member in self._images]
        return of_files(names, sizes, self.known_labels(), self.content)

    def _index(self) -> list[Member]:
        """Return the files of all tars, without hidden ones."""
        found = []
        for number, tar in enumerate(self._tars):
            with _opened(tar) as file:
                found += self._members(number, file, str(tar))
        return [member for member in found if not self._is_hidden(member.name)]

    def _is_hidden(self, name: str) -> bool:
        hidden = any(map(is_hidden, name.split("/")))
        if hidden:
            self.leave_out(HIDDEN, name)
        return hidden

    def _members(self, number: int, file: IO[bytes], name: str, part: range | None = None) -> list[Member]:
        """Return the files of a tar.

        Args:
            number: number of the tar.
            file: the open tar.
            name: name of the tar, for messages.
            part: byte range of a tar nested in it; None for the whole file.
        """
        part = part or range(os.fstat(file.fileno()).st_size)
        found: dict[str, Member] = {}
        with _damage_named(name):
            file.seek(part.start)
            if file.read(2) == b"\x1f\x8b":
                raise ValueError("it is compressed, and members are read at their place: decompress it")
            file.seek(part.start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for entry in tar:
                    if entry.offset >= part.stop:
                        break
                    self._record(found, number, entry, part)
                self._check_end(file, range(tar.offset, part.stop), name)
        return list(found.values())

    def _record(self, found: dict[str, Member], number: int, entry: tarfile.TarInfo, part: range) -> None:
        path = _inside(entry.name)
        if entry.isdir():
            return
        if path in found:
            raise ValueError(f"it holds {printable(path)} twice: pack it again")
        target = found.get(_inside(entry.linkname)) if entry.islnk() else None
        if target:
            found[path] = target._replace(name=path)
        elif entry.isreg():
            if not entry.issparse() and entry.offset_data + entry.size > part.stop:
                raise ValueError(f"{printable(path)} is cut off, or its header is damaged")
            found[path] = Member(number, path, entry.offset_data, entry.size, entry.issparse())
        else:
            self.leave_out(LINKS, path)

    def _check_end(self, file: IO[bytes], rest: range, name: str) -> None:
        """Detect a truncated or damaged tar, which tarfile does not distinguish from one that ends."""
        file.seek(rest.start)
        block = file.read(min(tarfile.BLOCKSIZE, len(rest)))
        if not block:
            self.notes.append(f"{printable(name)} ends without the mark of an end: it may be cut off there")
        elif any(block):
            raise ValueError(f"its header at byte {rest.start:,} is damaged")
        elif any(file.read(min(2**20, len(rest) - len(block)))):
            raise ValueError(
                f"something follows its end at byte {rest.start:,}, as where tars are concatenated: unpack it with "
                f"--ignore-zeros and pack it again"
            )


class WebDataset(FileTree, _Tars):
    """WebDataset tars: samples of files that share a name, an image and its label in `.cls` or in `label` of `.json`.

    The name of a sample ends at the first dot, or at the last one if no image matches. Tars without such labels are
    read like a folder, see `FileTree`.

    Args:
        tars: paths of the tars.
        suffixes: suffixes of the images.
        labelled: read the labels.
        folders: take labels from folders or a list of labels if the samples have none.
    """

    _in_file = True

    def __init__(
        self,
        tars: Sequence[Path],
        suffixes: frozenset[str] = SUFFIXES,
        labelled: bool = True,
        folders: bool = False,
    ) -> None:
        super().__init__(labelled)
        self._tars, self._where = list(tars), tars[0]
        lists, others, images = dict[str, int](), list[Member](), list[Member]()
        members = self._index()
        for number, member in enumerate(members):
            if folders and posixpath.basename(member.name) in LISTS:
                if lists.setdefault(member.name, number) != number:
                    raise ValueError(f"{self._tars[member.tar]} holds a {member.name}, as another tar does: {WITHOUT}")
            else:
                (images if member.suffix in suffixes else others).append(member)
        stems = {member.stem for member in images}
        beside = [member for member in others if member.stem in stems]
        self.kind = "webdataset" if beside else "tar"
        self._images = self._without_parts(images, bool(beside))
        used = self._label_by_sample(beside) if labelled else set()
        for member in others:
            if member not in used:
                self.leave_out(PARTS if member.stem in stems else NO_IMAGE, member.name)
        if not self._images:
            raise self._no_images("SAMPLE.jpg (or .png, ...) and SAMPLE.cls, or CLASS/IMAGE.jpg")
        if self.labels is not None and lists:
            raise ValueError(f"{self._where} holds labels of samples and {min(lists)}: remove one, or {WITHOUT}")
        if labelled and folders and self.labels is None:
            names = [member.name for member in self._images]
            self._classify(names, lists, lambda number, most: _content(self._tars, members[number], most))

    @staticmethod
    def first_suffixes(path: Path) -> set[str]:
        """Return the suffixes of the first members of a tar; empty if it cannot be read."""
        try:
            with _opened(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                return {Path(entry.name).suffix for entry in itertools.islice(tar, 4)}
        except _DAMAGED:
            return set()

    def _without_parts(self, images: list[Member], samples: bool) -> list[Member]:
        """Remove images that belong to another image of their sample, such as x.seg.png to x.jpg.

        They have more dots in their names. They are removed from tars of samples, or if every image has one.
        """
        plain = {member.stem for member in images if member.name.count(".", len(member.stem[1])) == 1}
        parts = [m for m in images if m.stem in plain and m.name.count(".", len(m.stem[1])) > 1]
        if not samples and {member.stem for member in parts} != {member.stem for member in images}:
            return images
        for member in parts:
            self.leave_out(PARTS, member.name)
        left_out = set(parts)
        return [member for member in images if member not in left_out]

    def _label_by_sample(self, beside: list[Member]) -> set[Member]:
        """Record the labels in files beside the images, and return these files."""
        files: dict[tuple[int, str], dict[str, Member]] = {}
        for member in beside:
            if member.suffix[1:] in _LABEL_BYTES:
                files.setdefault((member.tar, posixpath.splitext(member.name)[0]), {})[member.suffix[1:]] = member
        holders: list[Member | None] = []
        for image in self._images:
            sample = files.get((image.tar, posixpath.splitext(image.name)[0])) or files.get(image.stem) or {}
            holders.append(sample.get("cls") or sample.get("json"))
        given, used = list(self._labels_in(holders)), dict[Member, Member]()
        for image, holder, label in zip(self._images, holders, given, strict=True):
            if holder and label is not None and used.setdefault(holder, image) != image:
                raise ValueError(
                    f"{_place(self._tars, holder)} is the label of two images, {printable(used[holder].name)} and "
                    f"{printable(image.name)}: keep one image of a sample, or {WITHOUT}"
                )
        self.labels, self.class_names = to_numbers(given, str(self._where))
        self.labelled_by = " and ".join(sorted({holder.suffix for holder in used}))
        return set(used)

    def _labels_in(self, holders: list[Member | None]) -> Iterator[Label | None]:
        """Yield the label in each file, None if there is no file or it has no label."""
        with contextlib.ExitStack() as opened:
            tar = -1
            for holder in holders:
                if holder and holder.tar != tar:
                    opened.close()
                    tar, file = holder.tar, opened.enter_context(_opened(self._tars[holder.tar]))
                yield self._label_in(holder, file) if holder else None

    def _label_in(self, holder: Member, file: IO[bytes]) -> Label | None:
        place = _place(self._tars, holder)
        try:
            text = _read(file, self._tars, holder, _LABEL_BYTES[holder.suffix[1:]])
        except ValueError as error:
            raise ValueError(f"{error} ({WITHOUT})") from error
        if holder.suffix == ".cls":
            return label_of_text(text.decode(errors="backslashreplace"), place)
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return label_of_text(said.get("label"), place) if isinstance(said, dict) else None


class ImageNetTar(_Tars):
    """ImageNet's tar of one tar per class, or the class tars themselves, named by class: n01440764.tar and so on."""

    kind = "imagenet-tar"

    def __init__(self, tars: Sequence[Path], labelled: bool = True) -> None:
        super().__init__(labelled)
        self._tars = list(tars)
        found: list[tuple[str, Member]] = []
        for number, tar in enumerate(self._tars):
            with _opened(tar) as file:
                if self.is_class(tar):
                    found += [(tar.stem, member) for member in self._members(number, file, str(tar))]
                else:
                    found += self._classes(number, file, str(tar))
        images = []
        for name, member in found:
            if self._is_hidden(member.name):
                continue
            if member.suffix in SUFFIXES:
                images.append((name, member))
            else:
                self.leave_out(NO_IMAGE, member.name)
        if not images:
            raise ValueError(f"{self._tars[0]} holds no images")
        self._images = [member for _, member in images]
        if labelled:
            self.labels, self.class_names = to_numbers([name for name, _ in images], str(self._tars[0]))
            self.labelled_by = "tar"

    def _classes(self, number: int, file: IO[bytes], name: str) -> Iterator[tuple[str, Member]]:
        """Yield the class and member of each image in nested class tars."""
        for tar in self._members(number, file, name):
            path = posixpath.basename(tar.name)
            if not self.is_class(Path(path)):
                self.leave_out(HIDDEN if is_hidden(path) else NO_IMAGE, tar.name)
                continue
            part = range(tar.offset, tar.offset + tar.size)
            for member in self._members(number, file, f"{name}:{tar.name}", part):
                yield path.removesuffix(".tar"), member

    @staticmethod
    def is_class(path: Path) -> bool:
        """Return whether a path is a class tar, by its name."""
        return _CLASS.fullmatch(path.name) is not None

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Return whether a tar is a class tar, or holds class tars; a ValueError if it is not a tar."""
        if cls.is_class(path):
            return True
        with _damage_named(str(path)), _opened(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            names = (posixpath.basename(entry.name) for entry in tar)
            first = next((name for name in names if not is_hidden(name)), "")
        return cls.is_class(Path(first))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with os.fdopen(open_regular(path), "rb") as file:
        yield file


@contextlib.contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise ValueError(f"{printable(name)} cannot be read as a tar: {error}") from error


def _inside(name: str) -> str:
    """Return the normalised path of a member; a ValueError if it leads out of the tar."""
    path = posixpath.normpath(name.lstrip("/"))
    if path == ".." or path.startswith("../"):
        raise ValueError(f"{printable(name)} leads out of it")
    return path


def _place(tars: Sequence[Path], member: Member) -> str:
    return printable(f"{tars[member.tar]}:{member.name}")


def _content(tars: Sequence[Path], member: Member, most: int) -> bytes:
    # Opened for each read: workers must not share a file position.
    with _opened(tars[member.tar]) as file:
        return _read(file, tars, member, most)


def _read(file: IO[bytes], tars: Sequence[Path], member: Member, most: int) -> bytes:
    if member.sparse:
        raise ValueError(f"{_place(tars, member)} is stored with holes: pack the tar without --sparse")
    if member.size > most:
        raise ValueError(f"{_place(tars, member)} has {member.size:,} bytes, more than the {most:,} it may have")
    content = os.pread(file.fileno(), member.size, member.offset)
    if len(content) < member.size:
        raise ValueError(f"{_place(tars, member)} is cut off")
    return content
