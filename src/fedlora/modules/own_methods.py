"""An object's own federated methods, made to see the adapter alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from fedlora.errors import FedloraError
from fedlora.modules.anatomy import optimizers_in
from fedlora.modules.federated_classifier import FederatedClassifier
from fedlora.modules.optimizers import undone_on_error
from fedlora.modules.parameters import (
    as_tensor,
    copy_of,
    differences,
    mismatch,
    opened,
    part_like,
    refuse,
)
from fedlora.modules.view import listed, only

if TYPE_CHECKING:
    from fedlora.modules.clip_wrapper import CLIPLoRAWrapper

View = Callable[..., AbstractContextManager[None]]
# train_step too: it may pair parameters with what set_parameters listed (a proximal term).
METHODS = ("get_parameters", "set_parameters", "train_step")


class OwnMethods:
    """Stands before the methods of a federated object, and calls them in a view of the adapter.

    They are the object's own, in its own format: while one runs, the modules that it looks at show
    what is exchanged only. What it is given is compared with what it gives, and an error undoes
    all that it did.

    Args:
        wrapper: says what is exchanged now.

    Raises:
        FedloraError: for an object before whose methods nothing can stand.
    """

    def __init__(self, wrapper: CLIPLoRAWrapper) -> None:
        self.wrapper = wrapper
        self.thing: Any = wrapper.federated
        self.kind = type(self.thing).__name__
        # What the instance had under a method's name already, if anything.
        self._before: dict[str, Any] = {}
        if not hasattr(self.thing, "__dict__"):
            raise FedloraError(
                f"{self.kind} has __slots__ and no __dict__, so nothing can stand before its "
                "methods. Add '__dict__' to its __slots__."
            )

    def stand_before(self) -> None:
        """Take the places of the object's methods, on the instance.

        Raises:
            FedloraError: where one of them is a property.
        """
        attributes = vars(self.thing)  # itself, for it may refuse to have attributes set
        for name in METHODS:
            ours = name == "train_step" and isinstance(self.thing, FederatedClassifier)
            if ours or not callable(getattr(self.thing, name, None)):
                continue  # ours lists nothing beforehand
            self._before[name] = attributes.get(name)
            attributes[name] = getattr(self, name)
            if getattr(getattr(self.thing, name), "__self__", None) is not self:
                raise FedloraError(
                    f"{self.kind}.{name} is a property, so nothing can stand before it. Make it a "
                    "method."
                )

    def step_back(self) -> None:
        """Give the places back."""
        attributes = vars(self.thing)
        for name, before in self._before.items():
            if getattr(attributes.get(name), "__self__", None) is not self:
                continue  # somebody put another one there, or took ours away
            attributes.pop(name)
            if before is not None:
                attributes[name] = before
        self._before.clear()

    def _their(self, name: str) -> Any:
        """The object's own method. Not kept as such: a pickle of it would come back as ours."""
        if self._before[name] is not None:
            return self._before[name]
        for kind in type(self.thing).__mro__:
            if name in vars(kind):
                return vars(kind)[name].__get__(self.thing, type(self.thing))
        return type(self.thing).__getattr__(self.thing, name)

    def _view(self, view: View = only) -> AbstractContextManager[None]:
        if self.wrapper.exchanges_all():
            return nullcontext()
        return view(self.wrapper.roots(), self.wrapper.exchanged().values())

    def get_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The object's own: what is exchanged only."""
        with self._view():
            return self._their("get_parameters")(*args, **kwargs)

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """The object's own: ``parameters`` are those that travel."""
        with self._view(listed):
            return self._their("train_step")(*args, **kwargs)

    def set_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The object's own: all or nothing."""
        if isinstance(self.thing, FederatedClassifier):  # ours checks before it sets
            with self._view():
                result = self._their("set_parameters")(*args, **kwargs)
        else:
            result = self._set(*args, **kwargs)
        if self.wrapper.exchanges_all():
            self.wrapper.base_was_set()
        return result

    def _set(self, *args: Any, **kwargs: Any) -> Any:
        what = f"the parameters given to {self.kind}"
        given = args[0] if args else next(iter(kwargs.values()), None)
        known, own = self._given_by_itself()
        if known:
            refuse_difference(own, given, what)
        learned = self.wrapper.travels()
        before = copy_of(learned)
        with undone_on_error(self.thing, optimizers_in(self.thing)):
            try:
                with only(self.wrapper.roots(), learned.values()):
                    result = self._their("set_parameters")(*args, **kwargs)
                refuse([f for n, t in learned.items() for f in mismatch(n, before[n], t)], what)
            except BaseException:
                for name, tensor in learned.items():
                    tensor.data = before[name].to(tensor.device)
                raise
        return result

    def _given_by_itself(self) -> tuple[bool, Any]:
        """Whether the object can be asked what it gives, and that."""
        if "get_parameters" not in self._before:
            return False, None
        arguments = arguments_for(self._their("get_parameters"))
        return (False, None) if arguments is None else (True, self.get_parameters(*arguments))

    def check(self, adapter: int, other: int, base: int) -> None:
        """As :func:`refuse_blind`, of what the object gives now."""
        known, own = self._given_by_itself()
        if known and not self.wrapper.exchanges_all():
            refuse_blind(own, adapter, other, base, f"{self.kind}.get_parameters")


def arguments_for(method: Callable[..., Any]) -> tuple[Any, ...] | None:
    """What ``get_parameters`` is called with: nothing, or a config as in Flower; None: unknown."""
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return ()
    arguments: tuple[Any, ...]
    for arguments in ((), ({},)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return arguments
    return None


def refuse_blind(given: object, adapter: int, other: int, base: int, name: str) -> None:
    """Refuse an object whose ``get_parameters`` does not see the adapter.

    Args:
        given: what its own method gives in the view of the adapter.
        adapter: numbers in the adapter.
        other: numbers trained in full besides.
        base: numbers in the base.
        name: how messages name the method.

    Raises:
        FedloraError: where it gives the base all the same, or nothing of the adapter.
    """
    found, expected = count(given), adapter + other
    if found is None:
        return
    # Something besides the model (prototypes, say) may travel too.
    too_many = found > 2 * expected or (found > expected and found >= base)
    if too_many or found in {0, other}:
        raise FedloraError(
            f"{name}() gives {found:,} numbers where the adapter has {adapter:,}, and {other:,} "
            "are trained in full: it does not read its model through state_dict(), parameters() or "
            "named_parameters() when it is called. Let it do so."
        )


def count(value: object) -> int | None:
    """Numbers in tensors and arrays in nested dicts and lists; None if it cannot be known."""
    if value is None or isinstance(value, int | float | str):
        return 0  # a sample count, a name
    tensor = as_tensor(value)
    if tensor is not None:
        return tensor.numel()
    if not isinstance(value, Mapping | list | tuple):
        return None
    counts = [count(item) for item in (value.values() if isinstance(value, Mapping) else value)]
    return None if any(c is None for c in counts) else sum(c for c in counts if c is not None)


def refuse_difference(own: object, given: object, what: str) -> None:
    """Refuse what an object's ``set_parameters`` could drop or half-set without a word.

    Args:
        own: what its ``get_parameters`` gives, with whatever it says besides.
        given: what it is given.
        what: how messages name ``given``.

    Raises:
        FedloraError: for unknown or missing names, another number of values, other shapes, values
            that are not finite. Formats that cannot be compared are left to its own method.
    """
    given = opened(given)
    mine = part_like(opened(own), given)
    if mine is not None:
        refuse(list(differences(mine, given)), what)
