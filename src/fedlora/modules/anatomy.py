"""What is inside an object of somebody's own class: modules, the CLIP among them, optimizers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MemberDescriptorType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from fedlora.errors import FedloraError
from fedlora.modules.families import SUPPORTED_TEXT, backbone_classes

DEPTH = 4  # attributes of attributes …
# What belongs to libraries holds no model of the user's, and a wrapper what was there before.
LIBRARIES = frozenset(
    [
        "torch",
        "transformers",
        "tokenizers",
        "numpy",
        "PIL",
        "builtins",
        "logging",
        "types",
        "fedlora",
    ]
)
LONGEST = 1000  # a longer list or dict holds data, not models
# Children of a CLIP that are of torch's classes.
PARTS = ("visual_projection", "text_projection", "pre_layrnorm", "post_layernorm")
HOLDERS = (nn.Module, dict, list, tuple, set, frozenset, LRScheduler)
FOUND = (nn.Parameter, torch.optim.Optimizer)


@dataclass
class Anatomy:
    """The parts of an object.

    Attributes:
        thing: the object.
        modules: where a module is found first -> the module ("" where the object itself is one).
        places: every place where a module is found, with the module.
        loose: parameters held by the object itself, in no module that was found, by path.
        clip: the CLIP.
    """

    thing: Any
    modules: dict[str, nn.Module] = field(default_factory=dict)
    places: list[tuple[str, nn.Module]] = field(default_factory=list)
    loose: dict[str, nn.Parameter] = field(default_factory=dict)
    clip: Any = None

    @classmethod
    def of(cls, thing: object) -> Anatomy:
        """Look through an object and its attributes.

        Raises:
            FedloraError: where it holds no CLIP that transformers made, or more than one.
        """
        found = cls._collect(thing, _walk(thing))
        clips = found._clips()
        if len(clips) > 1:
            # A client may know its server, and that the other clients: what is its own counts.
            nearer = cls._collect(thing, _walk(thing, own=True))
            if len(nearer._clips()) == 1:
                found, clips = nearer, nearer._clips()
        found.clip = _the_only(thing, clips)
        return found

    @classmethod
    def _collect(cls, thing: object, parts: Iterator[tuple[str, Any]]) -> Anatomy:
        found = cls(thing)
        for path, value in parts:
            if isinstance(value, nn.Module):
                found.places.append((path, value))
            elif isinstance(value, nn.Parameter):
                found.loose[path] = value
        first = {id(module): path for path, module in reversed(found.places)}
        found.modules = {path: m for path, m in found.places if first[id(m)] == path}
        return found

    def _clips(self) -> list[tuple[str, nn.Module]]:
        found: dict[int, tuple[str, nn.Module]] = {}
        for prefix, module in self.modules.items():
            for path, clip in _topmost(module, prefix):
                found.setdefault(id(clip), (path, clip))
        return list(found.values())

    def inner(self) -> list[nn.Module]:
        """The CLIP and the modules in it that transformers made; a head may hang there too."""
        parts = [m for n, m in self.clip.named_children() if _is_part(n, m)]
        return [self.clip, *(module for part in parts for module in part.modules())]

    def own_parameters(self) -> list[nn.Parameter]:
        """The CLIP's parameters."""
        return [p for m in self.inner() for p in m._parameters.values() if p is not None]

    def others(self) -> dict[str, nn.Module]:
        """Each module besides the CLIP's, by path in the object, once."""
        seen = {id(module) for module in self.inner()}
        found: dict[str, nn.Module] = {}
        for prefix, root in self.modules.items():
            for path, module in root.named_modules(prefix=prefix):
                if id(module) not in seen:
                    found[path] = module
                    seen.add(id(module))
        return found

    def outside(self) -> dict[str, nn.Parameter]:
        """Parameters besides the CLIP's that want gradients, by path in the object."""
        inside = {id(p) for p in self.own_parameters()}
        named: dict[str, nn.Parameter] = {}
        for path, module in self.others().items():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in inside and parameter.requires_grad:
                    named[_join(path, name)] = parameter
                    inside.add(id(parameter))
        for path, parameter in self.loose.items():
            if id(parameter) not in inside and parameter.requires_grad:
                named[path] = parameter
                inside.add(id(parameter))
        return named

    def linear_outside(self) -> dict[str, nn.Linear]:
        """Linear layers besides the CLIP's, by path."""
        return {p: m for p, m in self.others().items() if isinstance(m, nn.Linear)}


def optimizers_in(thing: object) -> list[torch.optim.Optimizer]:
    """Every torch optimizer in an object and its attributes."""
    return [value for _, value in _walk(thing) if isinstance(value, torch.optim.Optimizer)]


def _walk(thing: object, own: bool = False) -> Iterator[tuple[str, Any]]:
    """Modules, parameters and optimizers in an object, the nearest first; modules each time.

    ``own``: without what other plain objects hold that it knows.
    """
    queue: deque[tuple[str, object, int]] = deque([("", thing, 0)])
    seen: set[int] = set()
    while queue:
        path, value, depth = queue.popleft()
        known = id(value) in seen
        seen.add(id(value))
        if isinstance(value, nn.Module) or (isinstance(value, FOUND) and not known):
            yield path, value
        foreign = own and depth > 0 and not isinstance(value, HOLDERS)
        if depth < DEPTH and not known and not foreign:
            queue.extend((_join(path, name), v, depth + 1) for name, v in _parts(value))


def _parts(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict | list | tuple | set | frozenset) and len(value) > LONGEST:
        return
    if isinstance(value, dict):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif isinstance(value, LRScheduler):
        yield "optimizer", value.optimizer
    if isinstance(value, nn.Module):
        # Its modules belong to it; what else it holds may be an optimizer or a plain object.
        skipped = nn.Module().__dict__.keys()
        yield from ((n, v) for n, v in vars(value).items() if n not in skipped)
    elif type(value).__module__.partition(".")[0] not in LIBRARIES and not isinstance(value, type):
        yield from getattr(value, "__dict__", {}).items()
        yield from _slots(value)


def _slots(value: object) -> Iterator[tuple[str, object]]:
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items():
            if isinstance(slot, MemberDescriptorType) and hasattr(value, name):
                yield name, getattr(value, name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_part(name: str, module: nn.Module) -> bool:
    """Whether a child of a CLIP is its own, not somebody's head."""
    return type(module).__module__.startswith("transformers.") or name in PARTS


def _topmost(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """CLIPs in a module, without those inside another."""
    if isinstance(module, backbone_classes()):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _topmost(child, _join(path, name))


def _the_only(thing: object, clips: list[tuple[str, nn.Module]]) -> nn.Module:
    kind = type(thing).__name__
    if not clips:
        raise FedloraError(
            f"no CLIP of transformers was found in {kind}. Supported: {SUPPORTED_TEXT}. For any "
            "other model use LoRAWrapper(model, config)."
        )
    if len(clips) > 1:
        raise FedloraError(
            f"{kind} holds {len(clips)} CLIPs ({', '.join(path for path, _ in clips)}) and it is "
            "not clear which one to adapt. Wrap an object that holds one."
        )
    return clips[0][1]
