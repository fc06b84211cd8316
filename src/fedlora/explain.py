"""What the parser of the command line reports, in one line that says what can be mended."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def explain(error: Exception, known: Iterable[str]) -> str:
    """One line from a parser's error, with the nearest name that exists.

    jsonargparse reports each member of a union that a value failed against; what a user can mend is
    the innermost one that is not "or nothing at all".

    Args:
        error: what the parser raised.
        known: the names of all settings, classes and commands that exist.
    """
    text = " ".join(str(error).split())
    keys = re.findall(r'Parser key "([^"]+)"', text)
    of_class = _of_class(text, ".".join(dict.fromkeys(keys)))
    if of_class:
        return of_class
    given = re.search(r" Given value: (.*?)(?: - Expected a | Given value type: |$)", text)
    text = re.split(r" - Expected a <class 'NoneType'>| Given value type: ", text)[0]
    text = re.sub(
        r"^.*(?:Parser key \"[^\"]+\": |Problem with given class_path '[^']*': |Errors: )", "", text
    )
    text = re.sub(r"^.*expects a function or a callable class: ", "", text)
    text = re.sub(r"\.? Got value: Namespace\(.*", "", text).removeprefix("- ")
    text = re.sub(
        r"Expected a typing.Literal\[(.*?)\]\. Got value: (.*)",
        r"should be one of \1 but got \2",
        text,
    )
    text = re.sub(
        r"Expected a <class '(\w+)'>\. Got value: (.*)", r"should be of type \1 but got \2", text
    )
    text = re.sub(r"^Expected a dot import path string: (.*)", r"there is no class \1", text)
    if given:
        text = _of_type(text, given[1])
    text = re.sub(r"^Expected a typing\.Literal\[.*?\] - (?=should)", "", text)
    # What is left says what can be mended; the other members of a union do not.
    text = re.sub(r" - Expected a <class '\w+'>.*", "", text)
    unknown = re.search(
        r"(?:arguments: --|option '|Option '|invalid choice: '|no class |attribute ')([\w.]+)",
        text.replace(".init_args.", "."),
    )
    where = ".".join(dict.fromkeys(keys))
    line = f"{where}: {text}" if where else text
    close = _close(unknown[1], known) if unknown else []
    return line.rstrip(".") + (f". Did you mean {' or '.join(close)}?" if close else ".")


def _of_class(text: str, key: str) -> str | None:
    """What is wrong with the settings of a class that a setting names, if that is what it is."""
    bases = re.findall(r"<class '([\w.]+)'>", text.partition(" Errors:")[0])
    there = [name for base in bases for name in _concrete(_class(base))]
    first = f"--{key}=CLASS, class_path in a config"
    if "an instantiatable class, but" in text:
        return f"{key}: name its class first ({first}), one of {', '.join(there)}."
    missing = re.search(r"Expected a dot import path string: (\S+)", text)
    if missing and there:
        close = difflib.get_close_matches(missing[1].rpartition(".")[2], there, 1)
        if close or text.count("Parser key") == 1:
            hint = f"Did you mean {close[0]}?" if close else f"Name one of {', '.join(there)}."
            return f"{key}: there is no class {missing[1]}. {hint}"
    problem = re.findall(r"Problem with given class_path '([\w.]+)': ([^-]*)", text)
    if not problem:
        return None
    path, what = problem[-1]
    name, option = path.rpartition(".")[2], re.match(r"Option '([\w.]+)' is not", what)
    required = re.match(r"the following arguments are required: (.*?) *$", what)
    if required:
        needs = ", ".join(f"--{key}.{each}=…" for each in required[1].split(", "))
        return f"{key}: {name} needs {needs} (init_args in a config)."
    if option is None:
        return None
    if option[1] == "class_path":
        return (
            f"{key}: what a class is given stands below init_args: {key}: {{class_path: …, "
            "init_args: {…}}."
        )
    settings = list(inspect.signature(_class(path)).parameters)
    close = difflib.get_close_matches(option[1], settings, 1, 0.75)
    return (
        f"{key}: {name} has no setting '{option[1]}', it has {', '.join(settings) or 'none'}. "
        + (f"Did you mean {close[0]}?" if close else f"Another class is named first ({first}).")
    )


def _class(path: str) -> type:
    """A class by its path; ``object`` where there is none."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, object)
    return found if isinstance(found, type) else object


def _concrete(base: type) -> list[str]:
    if base is object or base.__module__.partition(".")[0] in _PLAIN:
        return []
    return [cls.__name__ for cls in _derived(base) if not inspect.isabstract(cls)]


def _of_type(text: str, value: str) -> str:
    """The members of a union that a value is none of, "Expected a <class '…'>" each, in words."""
    member = r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])"
    if not re.fullmatch(rf"{member}(?: - {member})*", text):
        return text
    found = re.findall(member, text)
    kinds = list(dict.fromkeys(kind for kind, _ in found if kind))
    allowed = [names for _, names in found if names]
    if not allowed and set(kinds) <= {"list", "tuple", "set"}:
        return f"should be a list such as [{value}] but got {value}"
    allowed += [f"of type {' or '.join(kinds)}"] if kinds else []
    return f"should be {' or '.join(allowed)} but got {value}"


def _close(name: str, known: Iterable[str]) -> list[str]:
    """The nearest of the known names, compared in full and by their last part."""
    names = sorted(set(known) - {name})
    full = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    full = full or [longer for longer in names if longer.startswith(f"{name}_")][:1]
    if full:
        return full
    last = {option.rsplit(".", 1)[-1]: option for option in reversed(names)}
    return [last[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1, 0.6)]


def known_names(parser: ArgumentParser) -> set[str]:
    """Names of the settings of a parser, of the classes it can take and of their own settings."""
    names: set[str] = set()
    for action in parser._actions:
        names.update(option.removeprefix("--") for option in action.option_strings)
        if action.dest.endswith(".help"):
            continue
        for base in _classes(getattr(action, "_typehint", None)):
            names.update(_class_names(base, f"{action.dest}."))
    return names


def _class_names(base: type, prefix: str) -> Iterator[str]:
    """A class, those derived from it, their constructors' arguments and those' classes."""
    for cls in _derived(base):
        yield cls.__name__
        try:
            parameters = inspect.signature(cls, eval_str=True).parameters
        except NameError:  # annotations that exist for type checkers only
            parameters = inspect.signature(cls).parameters
        for name, parameter in parameters.items():
            yield prefix + name
            for inner in _classes(parameter.annotation):
                yield from (below.__name__ for below in _derived(inner))


def _derived(base: type) -> Iterator[type]:
    yield base
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        yield from _derived(subclass)


def _classes(hint: Any) -> list[type]:
    """The classes in a type hint that a config names by class_path."""
    members = get_args(hint) or (hint,)
    return [
        m for m in members if isinstance(m, type) and m.__module__.partition(".")[0] not in _PLAIN
    ]


_PLAIN = ("builtins", "typing", "types", "collections")
