"""The residual: a change of frozen weights that is served beside the factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedlora.state import Residual


class ServedWeights:
    """Serves W0 + R in each adapted layer.

    Always computed from the pristine weight, kept on the CPU once a residual was seen: nothing is
    added to a weight that was changed before, so rounding cannot build up over rounds.

    Args:
        layers: PEFT's layers by path. A kernel is seen as a matrix (out, in * kernel).
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.layers = layers
        self.residual: dict[str, Residual] = {}
        self._pristine: dict[str, Tensor] = {}

    def weight(self, name: str) -> Tensor:
        """The frozen weight as it is served, (out_features, in_features): to look at."""
        return self._itself(name).flatten(1)

    def _itself(self, name: str) -> Tensor:
        # To write to: flattened, a kernel in another memory format (channels last) is a copy.
        weight: Tensor = self.layers[name].get_base_layer().weight.detach()
        return weight

    def pristine(self, name: str) -> Tensor:
        """W0, (out_features, in_features), whatever is served now."""
        return self._pristine[name] if name in self._pristine else self.weight(name)

    def faults(self, residual: Mapping[str, Residual]) -> Iterator[str]:
        """What keeps a residual from being served here."""
        for name, change in residual.items():
            if name not in self.layers:
                yield f"the residual of {name!r} has no adapted layer here"
            elif not _fits(change, self.weight(name).shape):
                factors = [change.U] if change.V is None else [change.U, change.V]
                yield f"the residual of {name!r} has shape " + " x ".join(
                    str(tuple(factor.shape)) for factor in factors
                )
            elif self.weight(name).dtype in (torch.bfloat16, torch.float16):
                kind = str(self.weight(name).dtype).removeprefix("torch.")
                yield f"the residual of {name!r} would be rounded away in {kind} (model.float())"

    @torch.no_grad()
    def serve(self, residual: Mapping[str, Residual]) -> None:
        """Serve exactly this residual; an empty one brings the pristine weights back."""
        for name in [*residual, *(set(self.residual) - set(residual))]:
            change = residual.get(name)
            if change is self.residual.get(name):
                continue
            weight = self._itself(name)
            if name not in self._pristine:
                self._pristine[name] = self.weight(name).to("cpu", copy=True)
            served = self._pristine[name].to(weight.device)
            if change is None:
                del self.residual[name]
            else:
                exact = torch.promote_types(weight.dtype, torch.float32)
                served = served.to(exact) + change.to(exact).dense().to(weight.device)
                self.residual[name] = change
            weight.copy_(served.view_as(weight))

    def settle(self) -> None:
        """Take the weights for pristine as they are, whatever was served in them."""
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
