"""The residual: a change of frozen weights that is served beside the factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedlora.modules.beside import SIXTEEN_BITS, Beside
from fedlora.state import Residual


class ServedWeights:
    """Serves W0 + R in each adapted layer.

    A weight of float32 or more holds the sum. It is always computed from the pristine weight, kept
    on the CPU once a residual was seen: nothing is added to a weight that was changed before, so
    rounding cannot build up over rounds. A 16-bit weight would round most of R away: it stays as it
    is, and the layer computes W0 x + R x with R in float32.

    Args:
        layers: PEFT's layers by path. A kernel is seen as a matrix (out, in * kernel).
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.layers = layers
        self.residual: dict[str, Residual] = {}
        self._pristine: dict[str, Tensor] = {}
        self._hooks: dict[str, Any] = {}  # of the layers that compute R x beside

    def weight(self, name: str) -> Tensor:
        """The frozen weight as it is served, (out_features, in_features): to look at."""
        weight = self._itself(name).flatten(1)
        if name not in self._hooks:
            return weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(exact) + self.residual[name].to(exact).dense().to(weight.device)

    def _itself(self, name: str) -> Tensor:
        # To write to: flattened, a kernel in another memory format (channels last) is a copy.
        weight: Tensor = self.layers[name].get_base_layer().weight.detach()
        return weight

    def pristine(self, name: str) -> Tensor:
        """W0, (out_features, in_features), whatever is served now."""
        return self._pristine[name] if name in self._pristine else self._itself(name).flatten(1)

    def _shape(self, name: str) -> torch.Size:
        weight = self._itself(name)
        return torch.Size((weight.shape[0], weight[0].numel()))

    def faults(self, residual: Mapping[str, Residual]) -> Iterator[str]:
        """What keeps a residual from being served here."""
        for name, change in residual.items():
            if name not in self.layers:
                yield f"the residual of {name!r} has no adapted layer here"
            elif not _fits(change, self._shape(name)):
                factors = [change.U] if change.V is None else [change.U, change.V]
                yield f"the residual of {name!r} has shape " + " x ".join(
                    str(tuple(factor.shape)) for factor in factors
                )

    def not_inside(self, residual: Mapping[str, Residual]) -> Iterator[str]:
        """What keeps a residual from being part of the weights, where those travel themselves."""
        for name in filter(self.layers.__contains__, residual):
            dtype = self._itself(name).dtype
            if dtype in SIXTEEN_BITS:
                kind = str(dtype).removeprefix("torch.")
                yield (
                    f"the residual of {name!r} would be rounded away in the {kind} weights, which "
                    "are exchanged (set lora.save_only_trainable=true, or call model.float())"
                )

    def is_serving(self, residual: Mapping[str, Residual]) -> bool:
        """Whether exactly this residual is served, the same objects."""
        return residual.keys() == self.residual.keys() and all(
            self.residual[name] is change for name, change in residual.items()
        )

    @torch.no_grad()
    def serve(self, residual: Mapping[str, Residual]) -> None:
        """Serve exactly this residual; an empty one brings the pristine weights back."""
        for name in [*residual, *(set(self.residual) - set(residual))]:
            change, weight = residual.get(name), self._itself(name)
            beside = change is not None and weight.dtype in SIXTEEN_BITS
            # The model may have got another type since.
            if change is self.residual.get(name) and beside == (name in self._hooks):
                continue
            if name in self._hooks:
                self._hooks.pop(name).remove()
            if change is None or beside:
                self._put_back(name)
            if change is None:
                del self.residual[name]
                continue
            self.residual[name] = change
            if beside:
                hook = Beside(change, weight)
                # First: whoever looks at what the layer gives sees the sum.
                self._hooks[name] = self.layers[name].register_forward_hook(hook, prepend=True)
            else:
                self._add(name, change)

    def _put_back(self, name: str) -> None:
        """Bring the pristine weight back, if there is another in its place."""
        if name in self._pristine:
            weight = self._itself(name)
            weight.copy_(self._pristine[name].view_as(weight))

    def _add(self, name: str, change: Residual) -> None:
        """Put W0 + R into the weight, rounded once."""
        weight = self._itself(name)
        if name not in self._pristine:
            self._pristine[name] = weight.flatten(1).to("cpu", copy=True)
        exact = torch.promote_types(weight.dtype, torch.float32)
        served = self._pristine[name].to(weight.device, exact)
        served = served + change.to(exact).dense().to(weight.device)
        weight.copy_(served.view_as(weight))

    def settle(self) -> None:
        """Take the weights for pristine as they are, whatever was served in or beside them."""
        for name in list(self._hooks):
            self._hooks.pop(name).remove()
        self.residual.clear()
        self._pristine.clear()

    def forget(self) -> dict[str, Residual]:
        """Bring the pristine weights back and return what was served, to be served again."""
        served = dict(self.residual)
        self.serve({})
        self._pristine.clear()  # whoever holds the base now may change it
        return served


def _fits(change: Residual, want: torch.Size) -> bool:
    """Whether a residual is (out_features, in_features), or has factors with that product."""
    if change.V is None:
        return change.U.shape == want
    U, V = change.U.shape, change.V.shape
    return len(U) == len(V) == 2 and U[1] == V[0] and (U[0], V[1]) == tuple(want)
