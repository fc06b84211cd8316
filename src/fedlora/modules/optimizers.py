"""The optimizers that somebody's own object holds: they train the adapter, and the base again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedlora.errors import FedloraError

Optimizer = torch.optim.Optimizer
Group = dict[str, Any]
LISTS = ("params", "param_names")  # what a group holds one of for each parameter


class Optimizers:
    """Lets the optimizers that an object holds train the adapter in the place of the base.

    Args:
        base: the parameters that are frozen while the adapter is there.
        adapter: the adapter's.
        weights: for each of the adapter's the weight in the base that it adapts, whose group it
            joins.
        beside: what the object trains besides; an optimizer that holds none of the base is its
            own where it holds some of these.
    """

    def __init__(
        self,
        base: Iterable[nn.Parameter],
        adapter: Iterable[nn.Parameter],
        weights: Iterable[nn.Parameter],
        beside: Iterable[nn.Parameter] = (),
    ) -> None:
        self.base = list(base)
        self.adapter = list(adapter)
        self.weights = list(weights)
        self.beside = list(beside)
        self._before: list[tuple[Group, dict[str, list[Any]]]] = []
        self._aside: list[tuple[Optimizer, nn.Parameter, Any]] = []
        self._order: list[tuple[Group, dict[str, list[Any]]]] = []
        self._whole: list[tuple[Optimizer, dict[Any, Any]]] = []

    def train_adapter(self, optimizers: Sequence[Optimizer]) -> None:
        """Put the adapter in the place of the base.

        Raises:
            FedloraError: where it is not clear which optimizer should train the adapter.
        """
        home = _homes(optimizers, self.base)
        # Where none holds the base there is one of the head alone: the adapter joins it.
        beside = {id(parameter) for parameter in self.beside}
        near = [o.param_groups[0] for o in optimizers if beside.intersection(_ids(o))]
        joined = _distinct(home.values()) or near
        if len(joined) > 1 and not home:
            raise FedloraError(
                f"there are {len(joined)} optimizers and none of them holds parameters of the "
                "CLIP, so it is not clear which one should train the adapter. Make them after "
                "apply_lora_to_federated_model(), or in train_step."
            )
        with self._states_kept(optimizers):
            self._before = [(group, _lists(group)) for group in joined]
            for group in joined:
                _take_out(group, self.base)
            for factor, weight in zip(self.adapter, self.weights, strict=True):
                if joined:
                    _put_in(home.get(id(weight), joined[0]), factor)
            # In the order in which they went: optimizers save states by position.
            for group, lists in self._order:
                if {*map(id, group["params"])} == {*map(id, lists["params"])}:
                    _fill(group, lists)

    def train_base(self, optimizers: Sequence[Optimizer]) -> None:
        """Put the base back, as it was."""
        with self._states_kept(optimizers):
            holding = _distinct(_homes(optimizers, self.adapter).values())
            self._order = [(group, _lists(group)) for group in holding]
            for group, before in self._before:
                _fill(group, before)
            self._before = []
            self._hand_over(optimizers)

    def _hand_over(self, optimizers: Sequence[Optimizer]) -> None:
        """Optimizers that were made meanwhile get the base in the place of the adapter."""
        home = _homes(optimizers, self.adapter)
        held = _homes(optimizers, self.base)
        weights = {id(w): home[id(f)] for w, f in self._pairs() if id(f) in home}
        group = next(iter(home.values()), None)
        for parameter in self.base:
            # What is not adapted itself goes with what comes before it.
            group = weights.get(id(parameter), group)
            if group is not None and parameter.requires_grad and id(parameter) not in held:
                _put_in(group, parameter)
        for group in _distinct(home.values()):
            _take_out(group, self.adapter)

    def _pairs(self) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        return zip(self.weights, self.adapter, strict=True)

    @contextmanager
    def _states_kept(self, optimizers: Sequence[Optimizer]) -> Iterator[None]:
        """Momenta go with their parameters: out of the optimizer with them, and back."""
        # LBFGS has one state for all of its parameters together.
        flat = [(o, _ids(o)) for o in optimizers if isinstance(o, torch.optim.LBFGS)]
        yield
        for lbfgs, before in flat:
            if _ids(lbfgs) != before:
                self._exchange_whole(lbfgs)
        mine = [*self.base, *self.adapter]
        aside, self._aside = self._aside, []
        for optimizer in optimizers:
            held = set(_ids(optimizer))
            self._aside += [
                (optimizer, p, optimizer.state.pop(p))
                for p in mine
                if id(p) not in held and p in optimizer.state
            ]
        for optimizer, parameter, state in aside:
            if id(parameter) in _ids(optimizer):
                optimizer.state[parameter] = state
            else:
                self._aside.append((optimizer, parameter, state))

    def _exchange_whole(self, optimizer: Any) -> None:
        kept = next((state for other, state in self._whole if other is optimizer), {})
        others = [(other, state) for other, state in self._whole if other is not optimizer]
        self._whole = [*others, (optimizer, dict(optimizer.state))]
        optimizer.state.clear()
        optimizer.state.update(kept)
        optimizer._numel_cache = None  # counted once by torch


def _ids(optimizer: Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def _homes(optimizers: Iterable[Optimizer], wanted: Iterable[nn.Parameter]) -> dict[int, Group]:
    """The group of each wanted parameter that an optimizer holds, by id, in the groups' order."""
    ids = {id(parameter) for parameter in wanted}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {id(p): group for group in groups for p in group["params"] if id(p) in ids}


def _lists(group: Group) -> dict[str, list[Any]]:
    return {name: list(group[name]) for name in LISTS if name in group}


def _fill(group: Group, lists: Mapping[str, list[Any]]) -> None:
    for name, items in lists.items():
        group[name][:] = items  # in place: LBFGS and schedulers hold the list itself


def _distinct(groups: Iterable[Group]) -> list[Group]:
    return list({id(group): group for group in groups}.values())


def _take_out(group: Group, gone: Iterable[nn.Parameter]) -> None:
    ids = {id(parameter) for parameter in gone}
    stays = [id(parameter) not in ids for parameter in group["params"]]
    lists = _lists(group).items()
    _fill(group, {n: [x for x, s in zip(xs, stays, strict=True) if s] for n, xs in lists})


def _put_in(group: Group, parameter: nn.Parameter) -> None:
    group["params"].append(parameter)
    if "param_names" in group:
        group["param_names"].append(f"adapter.{len(group['params'])}")


@contextmanager
def undone_on_error(thing: Any, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Give an object back its attributes, and optimizers all that is in them, after an error."""
    attributes = dict(getattr(thing, "__dict__", {}))
    kept = [(o, o.param_groups, _groups(o), o.state, _states(o)) for o in optimizers]
    try:
        yield
    except BaseException:
        if hasattr(thing, "__dict__"):
            vars(thing).clear()
            vars(thing).update(attributes)
        for optimizer, groups, contents, state, states in kept:
            groups[:] = [group for group, _, _ in contents]
            for group, options, parameters in contents:
                group.clear()
                group.update(options)
                group["params"][:] = parameters
            state.clear()
            state.update(states)
            optimizer.param_groups, optimizer.state = groups, state
        raise


def _groups(optimizer: Optimizer) -> list[tuple[Group, Group, list[Any]]]:
    return [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]


def _states(optimizer: Optimizer) -> dict[Any, Any]:
    return {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}
