"""What a model was before it was adapted, so that it can be again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Originals:
    """The flags and values that an adapter changes in a model besides its layers.

    Attributes:
        base: the parameters that are frozen while the adapter is there.
        flags: each parameter of the base and of ``full``, and whether it wanted gradients.
        full: the parameters trained in full, by name.
        buffers: every buffer, by name, and the module that holds it: a buffer's tensor is replaced
            when its module moves to another device.
        aside: the values that are not in the model now, by name: the original ones while the
            adapter is there, the learned ones while it is off.
    """

    base: list[nn.Parameter] = field(default_factory=list)
    flags: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    full: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    aside: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        base: Iterable[nn.Parameter],
        modules: Iterable[tuple[str, nn.Module]],
        full: Mapping[str, nn.Parameter],
    ) -> Originals:
        """Take note of a model as it is.

        Args:
            base: the parameters that will be frozen.
            modules: path and module, for each whose buffers belong to the model.
            full: the parameters that will be trained in full.
        """
        buffers = {
            f"{path}.{key}" if path else key: (module, key)
            for path, module in modules
            for key, buffer in module._buffers.items()
            if buffer is not None
        }
        frozen = list(base)
        flags = [(p, p.requires_grad) for p in (*frozen, *full.values())]
        found = cls(frozen, flags, dict(full), buffers)
        found.aside = {name: t.detach().clone() for name, t in found._values().items()}
        return found

    def _values(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = dict(self.full)
        for name, (module, key) in self.buffers.items():
            buffer = module._buffers[key]
            if buffer is not None:
                values[name] = buffer
        return values

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics: the saved floating-point buffers, which training changes."""
        values = self._values()
        return {
            name: values[name]
            for name, (module, key) in self.buffers.items()
            if name in values
            and key not in module._non_persistent_buffers_set
            and values[name].is_floating_point()
        }

    def freeze(self) -> None:
        """No gradients for the base."""
        for parameter in self.base:
            parameter.requires_grad_(False)

    def thaw(self) -> None:
        """Gradients for those parameters that wanted them before."""
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the values in the model with those set aside."""
        done: set[int] = set()
        for name, value in self._values().items():
            if id(value) not in done:  # one that is known by two names is swapped once
                done.add(id(value))
                kept = value.clone()
                value.copy_(self.aside[name])
                self.aside[name] = kept
