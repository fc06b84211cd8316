"""A model seen as if it held some of its tensors only, by code that knows nothing of adapters.

What ``state_dict``, ``load_state_dict``, ``parameters`` and ``buffers`` of a module say is how a
federated class of whatever kind reads and writes its model. While the view lasts they say no more
than what is chosen, so the class's own methods exchange just that, in their own format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def only(roots: Iterable[nn.Module], chosen: Iterable[Tensor]) -> Iterator[None]:
    """Show the chosen tensors only, in ``roots`` and in every module below them.

    A tensor that is replaced meanwhile, rather than filled, is filled with its successor in the
    end and takes its place back: optimizers and the adapter know it by itself. A module that is
    copied meanwhile gives a whole copy, without the view.

    Args:
        roots: modules; it does not matter through which of those inside them one looks.
        chosen: parameters and buffers of theirs, themselves.
    """
    shown = {id(tensor) for tensor in chosen}
    modules = {id(module): module for root in roots for module in root.modules()}
    with ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(_kept(module._parameters, shown))
            stack.enter_context(_kept(module._buffers, shown))
            stack.enter_context(_hidden(module, shown))
            for method in ("named_parameters", "named_buffers"):
                stack.enter_context(_filtered(module, method, shown))
        yield


@contextmanager
def listed(roots: Iterable[nn.Module], chosen: Iterable[Tensor]) -> Iterator[None]:
    """As :func:`only` for ``parameters`` and ``named_parameters`` alone: light, for every step.

    A module with nothing to show lists what it has: a step may ask it for its type or device.
    """
    shown = {id(tensor) for tensor in chosen}
    seen: dict[int, nn.Module] = {}
    for root in roots:
        _showing(root, shown, seen)
    with ExitStack() as stack:
        for module in seen.values():
            stack.enter_context(_filtered(module, "named_parameters", shown))
        yield


def _showing(module: nn.Module, shown: set[int], seen: dict[int, nn.Module]) -> bool:
    """Collect the modules that hold something to show, themselves or further below."""
    if id(module) in seen:
        return True
    below = [_showing(child, shown, seen) for child in module.children()]
    if any(below) or any(id(parameter) in shown for parameter in module._parameters.values()):
        seen[id(module)] = module
        return True
    return False


@contextmanager
def _kept(held: dict[str, Any], shown: set[int]) -> Iterator[None]:
    """Bring the shown tensors of a module back into their places and their order."""
    before = dict(held)
    mine = {name: tensor for name, tensor in before.items() if id(tensor) in shown}
    try:
        yield
    finally:
        if any(held.get(name) is not tensor for name, tensor in mine.items()):
            for name, tensor in mine.items():
                _succeed(tensor, held.get(name))
            after = {**held, **mine}
            order = [*(name for name in before if name in after), *after]
            held.clear()
            held.update({name: after[name] for name in order})


def _succeed(tensor: Tensor, successor: Tensor | None) -> None:
    if successor is not None and successor is not tensor:
        # A copy: what it was given stays the giver's.
        tensor.data = successor.detach().to(tensor.device, copy=True)


@contextmanager
def _hidden(module: nn.Module, shown: set[int]) -> Iterator[None]:
    """Leave the other tensors of one module out of state dicts, written or loaded."""
    own = {**module._parameters, **module._buffers}
    hidden = {name: t for name, t in own.items() if t is not None and id(t) not in shown}
    saved = {n: t for n, t in hidden.items() if n not in module._non_persistent_buffers_set}
    hooked: Any = module  # torch leaves these two untyped
    handles = (
        hooked.register_state_dict_post_hook(_Drop(hidden)),
        hooked.register_load_state_dict_pre_hook(_Complete(saved)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing(*_: object) -> None:
    """What a hook of the view is in a copy of the module."""


def _make_nothing() -> Callable[..., None]:
    return _nothing


class _Drop:
    """Takes the hidden tensors out of a state dict."""

    def __init__(self, hidden: Iterable[str]) -> None:
        self.hidden = list(hidden)

    def __call__(self, _: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in self.hidden:
            state.pop(prefix + name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_nothing, ()


class _Complete:
    """Puts the hidden tensors into a state dict before it is loaded."""

    def __init__(self, saved: Mapping[str, Tensor]) -> None:
        self.saved = saved

    def __call__(self, *args: Any) -> None:
        # module, state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs
        module, state, prefix, unexpected = args[0], args[1], args[2], args[6]
        for name, tensor in self.saved.items():
            # BatchNorm fills in its counter by itself, before this.
            if prefix + name in state and name in module._parameters:
                unexpected.append(prefix + name)
            state[prefix + name] = tensor  # itself, so that nothing is missed and nothing changes

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_nothing, ()


class _Named:
    """``named_parameters`` or ``named_buffers`` of one module, of the shown tensors only."""

    def __init__(self, module: nn.Module, method: str, shown: set[int]) -> None:
        self.module = module
        self.method = method
        self.shown = shown
        self.theirs: Callable[..., Iterator[tuple[str, Tensor]]] = getattr(module, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return ((n, t) for n, t in self.theirs(*args, **kwargs) if id(t) in self.shown)

    def __reduce__(self) -> tuple[Any, ...]:
        # In a copy of the module: its class's own method.
        return getattr, (self.module, self.method)


@contextmanager
def _filtered(module: nn.Module, method: str, shown: set[int]) -> Iterator[None]:
    before = module.__dict__.get(method)
    module.__dict__[method] = _Named(module, method, shown)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[method]
        else:
            module.__dict__[method] = before
