"""Classes by number or by name."""

import difflib
from collections.abc import Sequence


def class_ids(classes: Sequence[int | str], names: Sequence[str], num_classes: int, what: str) -> list[int]:
    """Return the numbers of classes.

    A number, also as text, is the number of a class. A name is compared without regard to case, with the whole name of
    a class or with one of its parts between commas, as in ImageNet's "goldfish, Carassius auratus".

    Args:
        classes: numbers or names.
        names: the names of all classes; empty if they have none.
        num_classes: number of classes; that number itself, which means no label, is not a class.
        what: where the classes come from, for messages.

    Raises:
        ValueError: a number outside the classes, or a name that is not known (with similar ones) or means several.
    """
    if not num_classes:
        raise ValueError(f"{what} was trained without labels: leave --classes out")
    numbers = [int(given) if _is_number(given) else _named(str(given), names, num_classes, what) for given in classes]
    bad = sorted({number for number in numbers if not 0 <= number < num_classes})
    if bad:
        raise ValueError(
            f"--classes {' '.join(map(str, bad))}: the classes are 0 .. {num_classes - 1}, and --unconditional draws "
            f"without any"
        )
    return numbers


def _is_number(given: int | str) -> bool:
    return isinstance(given, int) or given.removeprefix("-").isdecimal()


def _named(given: str, names: Sequence[str], num_classes: int, what: str) -> int:
    if not names:
        raise ValueError(f"--classes {given}: {what} records no names of classes: give numbers, 0 .. {num_classes - 1}")
    wanted = given.strip().casefold()
    matches = [label for label, name in enumerate(names) if name.casefold() == wanted]
    parts = [{part.strip().casefold() for part in name.split(",")} for name in names]
    matches = matches or [label for label, known in enumerate(parts) if wanted in known]
    if len(matches) > 1:
        raise ValueError(f"--classes {given}: classes {', '.join(map(str, matches))} have that name: give a number")
    if matches:
        return matches[0]
    known = {part: names[label] for label, own in enumerate(parts) for part in own}
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6) or [part for part in known if wanted in part][:3]
    listed = " or ".join(dict.fromkeys(known[part] for part in near))
    hint = f"did you mean {listed}?" if near else f"the classes are {', '.join(names[:3])}, .., 0 .. {num_classes - 1}"
    raise ValueError(f"--classes {given}: {what} knows no such class: {hint}")
