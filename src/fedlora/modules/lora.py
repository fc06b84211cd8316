"""LoRA put into any model, seen as an AdapterState and as plain named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn

from fedlora.errors import FedloraError
from fedlora.modules.config import LoRAConfig, checked
from fedlora.modules.in_full import in_full
from fedlora.modules.injection import (
    Slot,
    Target,
    adapted_already,
    find_targets,
    make_slots,
    product,
)
from fedlora.modules.learned import LearnedParts, State
from fedlora.modules.loading import weights_sha256
from fedlora.modules.originals import Originals
from fedlora.modules.recomputation import set_gradient_checkpointing
from fedlora.modules.report import ParameterReport
from fedlora.state import Residual


class LoRAWrapper(LearnedParts):
    """Puts LoRA into a model's linear and convolutional layers, without touching its code or class.

    Nothing changes before :meth:`apply`. From then on the base is frozen, and what is trained is
    declared once, by part: A and B of each adapted layer, and ``other`` (parameters trained in
    full, such as a head or normalisation layers, and running statistics). With ``config.enabled``
    False nothing is injected and ``other`` is every parameter.

    Args:
        model: the model; layers are named by their path in it.
        config: the adapter's settings, copied; None means ``LoRAConfig()``.
        targets: paths of the layers to adapt, or their endings; None takes
            ``config.target_modules``, and every linear and convolutional layer without that.
        other: parameters trained in full besides: name -> parameter.

    Raises:
        FedloraError: for a wrong setting, targets that the model lacks, or a model that has an
            adapter already.

    Example:
        >>> import torch
        >>> from fedlora import LoRAConfig, LoRAWrapper
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 3))
        >>> lora = LoRAWrapper(model, LoRAConfig(r=2)).apply()
        >>> sorted(lora.get_parameters())
        ['0.lora_A', '0.lora_B', '1.lora_A', '1.lora_B']
        >>> print(lora.report())
        46 of 75 parameters trained (61.33 %), 184 B of 300 B exchanged (38.67 % less)
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        targets: Iterable[str] | None = None,
        other: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise FedloraError(
                f"model must be an nn.Module, got {type(model).__name__}. An object that holds a "
                "CLIP goes to CLIPLoRAWrapper."
            )
        super().__init__(model, checked(config))
        self._names = targets if targets is None or isinstance(targets, str) else list(targets)
        self._full = dict(other or {})
        self._slots: list[Slot] = []
        self._asleep: dict[str, Residual] = {}  # what was served when the layers went off
        self._beside: list[nn.Parameter] = []  # trained in full, and no part of the base
        self._checkpointing = False
        self._refuse_adapted()
        self._plan()  # what cannot be is said here, before anything changes

    def _plan(self) -> tuple[list[Target], dict[str, nn.Parameter]]:
        """The layers to adapt, and the parameters trained in full, of the model as it is now."""
        config = self.config
        about_clip = (
            config.layers is not None
            or config.placement != "mlp"
            or tuple(config.target_components) != ("encoder",)
        )
        if self._names is None and about_clip:
            raise FedloraError(
                "lora.layers, lora.placement and lora.target_components are about a CLIP, which "
                "CLIPLoRAWrapper knows. Name layers of another model in lora.target_modules."
            )
        targets = find_targets(self.model, config, self._names) if config.enabled else []
        return targets, self._full

    def _refuse_adapted(self) -> None:
        if layer := self._adapted_where():
            raise FedloraError(
                f"this model has LoRA already (in {layer}): it cannot be wrapped twice. Go on with "
                "the wrapper that put it there, or call its unload() or merge_and_unload() first."
            )

    def _adapted_where(self) -> str:
        """Where there is an adapter already; empty if nowhere."""
        return adapted_already(self.model)

    def apply(self) -> Self:
        """Inject the adapter and freeze the base; returns the wrapper.

        Raises:
            FedloraError: where it was done before, here or by another wrapper.
        """
        if self.phase != "new":
            raise FedloraError(
                f"this adapter was applied before (it is {self.phase} now): a model cannot be "
                "wrapped twice. Make a new wrapper after unload() or merge_and_unload()."
            )
        self.config.validate()
        self._refuse_adapted()
        targets, other = self._plan()
        self._beside = list(other.values())
        own = dict(self.model.named_parameters())
        # A name that both have, such as logit_scale, is the model's.
        full = {n if own.get(n, p) is p else f"self.{n}": p for n, p in other.items()}
        if self.config.enabled:
            self._slots = make_slots(targets, self.config)
            known = {id(parameter) for parameter in full.values()}
            found = in_full(self.config, self.model, self._slots)
            full |= {n: p for n, p in found.items() if id(p) not in known and self._adapts(n)}
            # An optimizer that holds these goes on with them: only the base is taken out of it.
            trained = {id(parameter) for parameter in full.values()}
            base = (p for p in self._base() if id(p) not in trained)
            self._originals = Originals.of(base, self._modules(), full)
        else:
            full |= own
            self._originals = Originals.of([], self._modules(), {})
            # Values are not kept: that would be a second model.
            self._originals.flags = [(p, p.requires_grad) for p in full.values()]
        self._declare({slot.target.name: slot.layer for slot in self._slots}, full)
        try:
            self._hang_in()
            self._check()
        except BaseException:
            self._take_out()
            self._leave("unloaded")
            raise
        return self

    def _adapts(self, path: str) -> bool:
        """Whether a path is in the part of the model that is adapted."""
        return True

    def _check(self) -> None:
        """Refuse what shows only once the adapter is there."""

    def _base(self) -> list[nn.Parameter]:
        """What is frozen."""
        return list(self.model.parameters())

    def _modules(self) -> list[tuple[str, nn.Module]]:
        """Each module of the model with its path, adapter included."""
        return list(self.model.named_modules())

    def _hang_in(self) -> None:
        for slot in self._slots:
            slot.hang(slot.layer)
        if self.config.enabled:
            self._originals.freeze()
        self.phase = "on"
        self.set_trainable(self.parts)

    def _take_out(self) -> None:
        for slot in self._slots:
            slot.hang(slot.target.base)
        self._originals.thaw()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, more time.

        Raises:
            FedloraError: where the model cannot.
        """
        set_gradient_checkpointing(self.model, True)
        self._checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep the activations again."""
        set_gradient_checkpointing(self.model, False)
        self._checkpointing = False

    def report(self) -> ParameterReport:
        """How much is trained and exchanged, counted in the model as it is."""
        self._require("on")
        modules = (module for _, module in self._modules())
        return ParameterReport.of(modules, self.parameters, self.travels())

    def describe(self) -> dict[str, Any]:
        """What a saved adapter must say about the model that it belongs to: JSON."""
        name = str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)
        return {"base_model": name, "base_model_sha256": self._base_sha256()}

    def _base_sha256(self) -> str:
        """The hash of the weights below the adapter, without what it brings in their place."""
        beside = {id(parameter) for parameter in self._beside}
        tensors = self.model.state_dict(keep_vars=True).items()
        skipped = frozenset(name for name, tensor in tensors if id(tensor) in beside)
        with self.lora_disabled() if self.config.enabled else nullcontext():
            return weights_sha256(self.model, skipped)

    # The layers off, on, away.

    def disable_lora_layers(self) -> None:
        """Take the adapter out: the original model is back, to the bit, until it is enabled.

        Head and running statistics are the original ones too.
        """
        self._require("on", "off")
        if not self.config.enabled:
            raise FedloraError("LoRA is off here (lora.enabled=false): there is no other model.")
        if self.phase == "on":
            self._asleep = self.served.forget()
            self._originals.swap()
            self._take_out()
            self.phase = "off"

    def enable_lora_layers(self) -> None:
        """Put the adapter back as it was, to the bit."""
        self._require("on", "off")
        if self.phase == "off":
            self._refuse_adapted()  # by another wrapper, meanwhile
            for slot in self._slots:
                slot.refuse_replaced()
            self._originals.swap()
            try:
                self._hang_in()
            except BaseException:
                self._take_out()
                self._originals.swap()
                self.phase = "off"
                raise
            asleep, self._asleep = self._asleep, {}
            self.served.serve(asleep)

    @contextmanager
    def lora_disabled(self) -> Iterator[None]:
        """The original model for as long as the context lasts."""
        was_on = self.phase == "on"
        self.disable_lora_layers()
        try:
            yield
        finally:
            if was_on and self.phase == "off":  # the body may have unloaded it
                self.enable_lora_layers()

    def unload(self) -> Any:
        """Undo everything: the original model, bit-identical, statistics included; returns it.

        Without an adapter (``config.enabled`` False) what was trained stays.
        """
        self._require("on", "off")
        if self.config.enabled:
            self.disable_lora_layers()
        else:
            self._take_out()
        self._leave("unloaded")
        return self.model

    def _leave(self, phase: State) -> None:
        """Nothing of this wrapper stays in the model."""
        if self._checkpointing:
            self.disable_gradient_checkpointing()
        self.phase = phase

    @torch.no_grad()
    def merge_and_unload(self) -> Any:
        """Add the adapter to the weights: a plain model with the same predictions.

        Computed in float64 from the pristine weights, residual included.
        """
        self._require("on")
        if not self.config.enabled:
            raise FedloraError("LoRA is off here (lora.enabled=false): there is nothing to merge.")
        for name, layer in self.layers.items():
            weight = layer.get_base_layer().weight
            change = product(layer)
            if name in self.served.residual:
                change += self.served.residual[name].to(torch.float64).dense()
            merged = self.served.pristine(name).to("cpu", torch.float64) + change
            weight.copy_(merged.view_as(weight))
        self.served.settle()  # all of it is inside now
        self._take_out()
        self._leave("merged")
        return self.model
