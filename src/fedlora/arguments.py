"""The command line before it is parsed, and after it could not be."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from fedlora.errors import FedloraError
from fedlora.files import expand
from fedlora.modules.plain_config import from_plain, is_plain
from fedlora.run_folder import RunFolder

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# Commands beside LightningCLI's: name -> (the module whose run(args) it is, what it does).
TOOLS = {
    "info": ("fedlora.tools.info", "Show how much of a model is trained and how much travels."),
    "partition": ("fedlora.tools.partition", "Show who holds which pictures, before training."),
}


def shipped_configs() -> Path:
    """The folder of the shipped configs: in the wheel, or beside ``src`` in an editable install."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parents[1] / "configs"


def find_config(name: str) -> str:
    """A config path as given, or among the shipped ones where there is none in the working folder.

    Raises:
        FedloraError: when it is in neither; lists what is shipped.
    """
    path = expand(name, "--config")
    if path.exists() or path.is_absolute():
        if not path.is_file():
            raise FedloraError(f"--config {name}: there is no such file. Check the path.")
        return str(path)
    folder = shipped_configs()
    for candidate in (
        folder / path,
        folder / path.relative_to("configs") if path.parts[0] == "configs" else None,
    ):
        if candidate is not None and candidate.is_file():
            return str(candidate)
    known = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.yaml"))
    raise FedloraError(
        f"--config {name}: there is no such file, and no shipped config of that name. Shipped: "
        f"{', '.join(known)}."
    )


def _ours(path: str) -> str:
    """A config as it is, or the content of one in the plain form mapped onto our sections."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return path  # the parser says what is wrong with it
    if not is_plain(config):
        return path
    mapped = from_plain(config, path)
    print(
        f"{path}: model and lora are read as model.* and model.lora.*; all else keeps its default.",
        file=sys.stderr,
    )
    try:
        return json.dumps(mapped)
    except (TypeError, ValueError) as error:  # a date, or an anchor with an alias of itself in it
        raise FedloraError(
            f"{path}: model and lora must hold plain values ({error}). Write them out."
        ) from error


def complete(args: Sequence[str]) -> list[str]:
    """Find the configs that are named, and take a run's own where only its checkpoint is given."""
    done: list[str] = []
    configs = 0
    values = {"--ckpt_path": "", "--trainer.default_root_dir": "runs"}
    rest = iter(args)
    for arg in rest:
        option, equals, value = arg.partition("=")
        if option in ("--config", "-c", *values):
            if not equals:
                value = next(rest, "")
            if option in values:
                values[option] = value
            elif value:
                configs += 1
                value = _ours(find_config(value))
            done += [option, value] if value else [option]
        else:
            done.append(arg)
    if values["--ckpt_path"] and not configs:
        run, _ = RunFolder.of(values["--ckpt_path"], Path(values["--trainer.default_root_dir"]))
        if run.config.is_file():
            done[1:1] = ["--config", str(run.config)]
    return done


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
    # What is left says what can be mended; the other members of a union do not.
    text = re.sub(r" - Expected a <class '\w+'>.*", "", text)
    unknown = re.search(
        r"(?:arguments: --|option '|Option '|invalid choice: '|no class |attribute ')([\w.]+)", text
    )
    where = ".".join(dict.fromkeys(keys))
    line = f"{where}: {text}" if where else text
    close = _close(unknown[1], known) if unknown else []
    return line.rstrip(".") + (f". Did you mean {' or '.join(close)}?" if close else ".")


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
    names = sorted(set(known))
    full = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if full:
        return full
    last = {option.rsplit(".", 1)[-1]: option for option in reversed(names)}
    return [last[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1, 0.6)]


def known_names(parser: ArgumentParser) -> set[str]:
    """Names of the settings of a parser, of the classes it can take and of their own settings."""
    names: set[str] = set()
    for action in parser._actions:
        names.update(option.removeprefix("--") for option in action.option_strings)
        for base in _classes(getattr(action, "_typehint", None)):
            names.update(_class_names(base))
    return names


def _class_names(base: type) -> Iterator[str]:
    """A class, those derived from it, their constructors' arguments and those' classes."""
    for cls in _derived(base):
        yield cls.__name__
        try:
            parameters = inspect.signature(cls, eval_str=True).parameters
        except NameError:  # annotations that exist for type checkers only
            parameters = inspect.signature(cls).parameters
        for name, parameter in parameters.items():
            yield name
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
