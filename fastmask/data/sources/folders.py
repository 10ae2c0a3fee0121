"""Image folders: which files are images, which are skipped, and the class of each image."""

import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

from fastmask.console import printable
from fastmask.data.fingerprint import of_files, size_of
from fastmask.data.images.pixels import SUFFIXES
from fastmask.data.sources.labels import WITHOUT, Label, check_label, in_order, parse_label_file, to_numbers
from fastmask.data.sources.source import MAX_BYTES, Source, some
from fastmask.files import read_regular

HIDDEN = "hidden, or left behind by a system"
NO_IMAGE = "no images by their names"
SPECIAL = "pipes, sockets or devices"
EMPTY = "empty folders"

_DROPPINGS = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
LISTS = ("labels.json", "dataset.json")
_BYTES_OF_AN_ENTRY = 1024  # limit per entry of a list of labels, so that a huge file is not read for a few images
# The names that EDM's dataset_tools gives to images: numbers, 1000 per folder, regardless of class.
_NUMBERED = re.compile(r"(\d{5})/img\1\d{3}\.\w+")
_LATENTS = (".npy", ".latent", ".safetensors", ".mdb")


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is ignored by its name: it begins with a dot, or an operating system wrote it."""
    return name.startswith(".") or name.lower() in _DROPPINGS


class FileTree(Source):
    """A tree of files, in a folder, a zip or tars.

    The class of an image comes from `labels.json` or `dataset.json`, otherwise from its folder. `labels.json` is
    {"FILE": LABEL, ...} or {"labels": [["FILE", LABEL], ...]}, with paths relative to it and labels that are numbers or
    names; or {"SUBFOLDER": LABEL, ...}. `dataset.json` has the second form; `null` there means no labels.
    """

    _where: Path
    _in_file = False  # an archive, whose inner folders cannot be given as a path

    def _sort(self, names: Sequence[str], read: Callable[[int, int], bytes]) -> list[int]:
        """Record labels and skipped files, and return the indices of the names that are images.

        Args:
            names: paths of the files, separated by slashes.
            read: returns the content of a file by its index; a ValueError if it exceeds the given number of bytes.
        """
        found, lists = [], {}
        for number, name in enumerate(names):
            if any(map(is_hidden, name.split("/"))):
                self.leave_out(HIDDEN, name)
            elif name.rpartition("/")[2] in LISTS:
                lists[name] = number
            elif os.path.splitext(name)[1].lower() in SUFFIXES:
                found.append(number)
            else:
                self.leave_out(NO_IMAGE, name)
        if not found:
            above = "" if self._in_file else f"{self._where}/"
            raise self._no_images(f"{above}CLASS/IMAGE.png (or .jpg, .webp, ...)")
        if self.labelled:
            self._classify([names[number] for number in found], lists, read)
        return found

    def _classify(self, images: list[str], lists: dict[str, int], read: Callable[[int, int], bytes]) -> None:
        """Record the labels of images.

        Args:
            images: names of the images.
            lists: indices of the files with the name of a list of labels, by name.
            read: see `_sort`.
        """
        root = _root_of(images, lists)
        if root and not self._in_file:
            raise ValueError(
                f"{self._where} holds its images in the folders of one folder: name that, {self._where / root}, or "
                f"{WITHOUT}"
            )
        if root:
            self.notes.append(f"all of its images lie in {printable(root)}, whose folders are taken")
        here = {name: lists[root + name] for name in LISTS if root + name in lists}
        for name in lists:
            if name.removeprefix(root) not in here:
                self.leave_out(NO_IMAGE, name)
        self._label([name[len(root) :] for name in images], here, read)

    def _no_images(self, expected: str) -> ValueError:
        line = f"{self._where} holds no images: expected {expected}"
        others = [name for names in self.left_out.values() for name in names]
        if others:
            line += f"; found {some(others)}"
        if any(name.endswith(_LATENTS) for name in others):
            line += "; latents are made a store by python -m fastmask.prepare"
        return ValueError(line)

    def _label(self, images: list[str], lists: dict[str, int], read: Callable[[int, int], bytes]) -> None:
        if len(lists) > 1:
            raise ValueError(
                f"{self._where} holds {' and '.join(lists)}: remove the one that is not meant, or {WITHOUT}"
            )
        for name, number in lists.items():
            where = f"{self._where}{':' if self._in_file else '/'}{name}"
            content = read(number, 2**20 + _BYTES_OF_AN_ENTRY * len(images))
            given = parse_label_file(content, where, bare=name == "labels.json")
            if given is None:
                self.notes.append(f"{name} says that there are no labels")
                return
            if given:
                self.labelled_by = name
                self._label_by_list(images, given, where)
                return
            self.notes.append(f"{name} holds no labels, and is left out")
        self._label_by_folder(images, {})

    def _label_by_list(self, images: list[str], given: dict[str, Label], where: str) -> None:
        folders = {name.split("/")[0] for name in images if "/" in name}
        if set(given) <= folders:
            if all(isinstance(label, str) for label in given.values()):
                self._label_by_folder(images, given)
                return
            given = {name: given[folder] for name in images if (folder := name.split("/")[0]) in given}
        absent = [name for name in images if name not in given]
        if absent:
            raise ValueError(
                f"{where} has no label for {printable(absent[0])}, and for {len(absent)} of {len(images)} images "
                f"({WITHOUT})"
            )
        gone = given.keys() - set(images)
        if gone:
            self.notes.append(f"{where} names {len(gone):,} files that are no images here: {some(sorted(gone))}")
        labels = [given[name] for name in images]
        check_label(min((label for label in labels if isinstance(label, int)), default=0), where)
        self.labels, self.class_names = to_numbers(labels, where)

    def _label_by_folder(self, images: list[str], names: dict[str, Label]) -> None:
        folders = in_order(name.split("/")[0] for name in images if "/" in name)
        loose = [name for name in images if "/" not in name]
        if not folders:
            return
        if loose:
            raise ValueError(
                f"{self._where} holds images beside its class folders ({printable(loose[0])}): move them into one, or "
                f"{WITHOUT}"
            )
        if {folder.lower() for folder in folders} <= _SPLITS:
            first = sorted(folders, key=lambda folder: not folder.lower().startswith("train"))[0]
            one = "unpack it and name one of them" if self._in_file else f"name one of them, {self._where / first}"
            raise ValueError(f"{self._where} holds splits, not classes ({some(folders)}): {one}, or {WITHOUT}")
        if all(map(_NUMBERED.fullmatch, images)):
            raise ValueError(
                f"{self._where} numbers its images as dataset_tools does ({images[0]}), whose folders are no classes, "
                f"but has no dataset.json: put it there, or {WITHOUT}"
            )
        number_of = {folder: number for number, folder in enumerate(folders)}
        self.labels, _ = to_numbers([number_of[name.split("/")[0]] for name in images], str(self._where))
        self.class_names = [printable(str(names.get(folder, folder))) for folder in folders]
        self.labelled_by = f"folder, named by {self.labelled_by}" if names else "folder"


class Folder(FileTree):
    """A folder of images: see `FileTree`. Symbolic links are followed."""

    kind = "folder"

    def __init__(self, path: Path, labelled: bool = True) -> None:
        super().__init__(labelled)
        self._where = path
        files = []
        for name, reason in files_below(path):
            if reason:
                self.leave_out(reason, name)
            else:
                files.append(name)
        self._files = [files[number] for number in self._sort(files, lambda i, most: self._content(files[i], most))]

    def __len__(self) -> int:
        return len(self._files)

    def name(self, item: int) -> str:
        """Return the path of a file."""
        return printable(str(self._where / self._files[item]))

    def content(self, item: int) -> bytes:
        """Return the content of a file."""
        return self._content(self._files[item], MAX_BYTES)

    def fingerprint(self) -> str:
        """Return a hash of the files and labels."""
        sizes = [size_of(os.path.join(self._where, file)) for file in self._files]
        return of_files(self._files, sizes, self.known_labels(), self.content)

    def _content(self, name: str, most: int) -> bytes:
        return read_regular(self._where / name, most)


def files_below(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the files below a folder in order, following symbolic links.

    Yields:
        The path relative to the folder, and the reason to skip it or "". A hidden folder is one entry.

    Raises:
        ValueError: a symbolic link to a folder that contains it.
    """
    below = len(os.path.join(folder, ""))
    opened = [(_identity(str(folder)), iter(_entries(str(folder))))]
    while opened:
        entry = next(opened[-1][1], None)
        if entry is None:
            opened.pop()
            continue
        name = entry.path[below:]
        # `entry.is_dir` raises for a broken link.
        is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
        if is_hidden(entry.name):
            yield name + "/" * is_folder, HIDDEN
        elif is_folder:
            identity = _identity(entry.path)
            if any(identity == above for above, _ in opened):
                raise ValueError(f"{entry.path} is a symbolic link to a folder that holds it: remove the link")
            entries = _entries(entry.path)
            if not entries:  # reported, since a class that was not unpacked shifts the labels of the classes after it
                yield f"{name}/", EMPTY
            opened.append((identity, iter(entries)))
        elif entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path) or not os.path.exists(entry.path):
            yield name, ""
        else:
            yield name, SPECIAL


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _root_of(images: list[str], lists: Container[str]) -> str:
    """Return the folder with the list of labels or the class folders, with a slash; "" is the top folder."""
    root = ""
    while not any(root + name in lists for name in LISTS):
        tops = {name[len(root) :].split("/")[0] for name in images}
        inner = f"{root}{min(tops)}/"
        loose = any(name.find("/", len(inner)) < 0 for name in images)
        if len(tops) > 1 or (loose and not any(inner + name in lists for name in LISTS)):
            break
        root = inner
    return root
