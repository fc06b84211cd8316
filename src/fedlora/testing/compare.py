"""How rules are judged: dense references in numpy, and values to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.aggregation.base import Aggregator
from fedlora.state import AdapterState, Round

Matrix = NDArray[np.float64]
# What rounding may change, as a share of the sizes of what was put in.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}
EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}


class PromiseError(AssertionError):
    """A rule does not do what a check demands."""


def require(holds: bool, what: str) -> None:
    """Go on only where this holds.

    Raises:
        PromiseError: saying ``what`` does not.
    """
    if not holds:
        raise PromiseError(what)


def bits(value: Any) -> Any:
    """A copy in plain values: equal exactly where everything in it has the same bits."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    if isinstance(value, torch.Generator):
        return bits(value.get_state())
    if isinstance(value, Aggregator):  # a rule around another
        return [type(value), bits(vars(value))]
    if is_dataclass(value):
        return [type(value), {f.name: bits(getattr(value, f.name)) for f in fields(value)}]
    return value


def state_bits(rule: Aggregator) -> Any:
    """All that a rule holds, saved or not, as plain values."""
    return bits([rule.state_dict(), vars(rule)])


def differences(one: AdapterState, other: AdapterState) -> list[str]:
    """The fields of two adapters that are not equal to the bit, with the first name in each."""
    pairs = [
        (part, bits(getattr(one, part)), bits(getattr(other, part)))
        for part in ("A", "B", "other", "scaling", "residual", "added")
    ]
    return [
        f"{part} of {next(n for n in (*left, *right) if left.get(n) != right.get(n))}"
        for part, left, right in pairs
        if left != right
    ]


def served(state: AdapterState, name: str) -> Matrix:
    """What is served beside the frozen weight of a layer, ``R + s B A``, dense."""
    A, B = _wide(state.A[name]), _wide(state.B[name])
    change = state.scaling[name] * (B @ A)
    if name in state.residual:
        U, V = state.residual[name].U, state.residual[name].V
        change = change + (_wide(U) if V is None else _wide(U) @ _wide(V))
    return change


def size(state: AdapterState, name: str) -> float:
    """``||R|| + |s| ||B|| ||A||``: what rounding is a share of."""
    factors = np.linalg.norm(_wide(state.A[name])) * np.linalg.norm(_wide(state.B[name]))
    total = abs(state.scaling[name]) * float(factors)
    if name in state.residual:
        U, V = state.residual[name].U, state.residual[name].V
        total += float(np.linalg.norm(_wide(U) if V is None else _wide(U) @ _wide(V)))
    return total


def agree(rule: Aggregator, rnd: Round, one: AdapterState, other: AdapterState, what: str) -> None:
    """Demand that two adapters are one model, up to rounding.

    That is what is served beside each weight, and the head; the factors themselves may differ.
    Where a factor stays with the clients the server has no model: the other one is compared, and
    what stays is not.

    Raises:
        PromiseError: ``what`` is how the second came about.
    """
    own = personal_layers(rule, rnd, other)
    for name in [name for name in one.A if name not in own]:
        most = max(size(one, name), size(other, name))
        _close(served(one, name), served(other, name), most, one.A[name], f"{what}: {name}")
    kept = {name for name, _ in rule.stays(other, rnd).tensors()}
    theirs = dict(other.only(rule.shared(rnd)).tensors())
    first = next(iter(other.A))
    one = one.cut(other.ranks[first], other.scaling[first] / one.scaling[first])
    for name, tensor in one.only(rule.shared(rnd)).tensors():
        part, path = name.split("/", 1)
        if name not in kept and (part == "other" or path in own):
            left, right = _wide(tensor), _wide(theirs[name])
            _close(left, right, float(np.linalg.norm(right)), tensor, f"{what}: {name}")


def personal_layers(rule: Aggregator, rnd: Round, state: AdapterState) -> set[str]:
    """The layers of which a factor stays with each client: the server has no model of those."""
    kept = rule.stays(state, rnd)
    return {*kept.A, *kept.B}


def _close(left: Matrix, right: Matrix, most: float, like: Tensor, what: str) -> None:
    require(left.shape == right.shape, f"{what} has shape {left.shape} and not {right.shape}")
    off = float(np.linalg.norm(left - right))
    share = f"{off / most:.1e}" if most else "all"
    require(off <= ROUNDING[like.dtype] * most, f"{what} is off by {share} of its size")


def ideal_error(after: AdapterState, clients: Iterable[AdapterState], shares: list[float]) -> float:
    """How far what is served is from ``sum_k p_k (R_k + s_k B_k A_k)``, in the worst layer.

    Args:
        after: what the rule made.
        clients: what each client serves after its training.
        shares: the p_k, which sum to 1.

    Returns:
        The Frobenius norm of the difference as a share of the sizes of the clients' changes.
    """
    pairs = list(zip(shares, clients, strict=True))
    errors = []
    for name in after.A:
        ideal = sum(share * served(client, name) for share, client in pairs)
        most = sum(share * size(client, name) for share, client in pairs)
        off = float(np.linalg.norm(served(after, name) - ideal))
        errors.append(off / most if most else off)
    return float(np.max(errors))  # NaN where one is


def _wide(tensor: Tensor) -> Matrix:
    wide: Matrix = tensor.detach().to(torch.float64).numpy()
    return wide
