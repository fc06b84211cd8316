"""LoRA put into any model, seen as an AdapterState and as plain named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.modules.config import LoRAConfig
from fedlora.modules.injection import (
    Slot,
    adapted_already,
    biases,
    find_targets,
    make_slots,
    product,
)
from fedlora.modules.learned import LearnedParts
from fedlora.modules.loading import weights_sha256
from fedlora.modules.originals import Originals
from fedlora.modules.parameters import copy_of, fill
from fedlora.modules.recomputation import set_gradient_checkpointing
from fedlora.modules.report import ParameterReport
from fedlora.state import Residual


class LoRAWrapper(LearnedParts):
    """Puts LoRA into a model's linear and convolutional layers, without touching its code or class.

    Nothing changes before :meth:`apply`. From then on the base is frozen, and what is trained is
    declared once, by part: A and B of each adapted layer, and ``other`` (parameters trained in
    full, such as a head, and running statistics). With ``config.enabled`` False nothing is
    injected and ``other`` is every parameter.

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
        super().__init__()
        self.config = LoRAConfig() if config is None else replace(config)
        self.config.validate()
        self.model = model
        self._refuse_adapted()
        if targets is None and (self.config.layers is not None or self.config.placement != "mlp"):
            raise FedloraError(
                "lora.layers and lora.placement are about the blocks of a CLIP, which "
                "CLIPLoRAWrapper knows. Name layers of another model in lora.target_modules."
            )
        self._targets = find_targets(model, self.config, targets) if self.config.enabled else []
        self._full = dict(other or {})
        self._slots: list[Slot] = []
        self._asleep: dict[str, Residual] = {}  # what was served when the layers went off

    def _refuse_adapted(self) -> None:
        layer = self._adapted_where()
        if layer:
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
        self._refuse_adapted()
        full = dict(self._full)
        if self.config.enabled:
            self._slots = make_slots(self._targets, self.config)
            known = {id(parameter) for parameter in full.values()}
            found = biases(self.config, self.model, self._slots)
            full |= {name: bias for name, bias in found.items() if id(bias) not in known}
            self._originals = Originals.of(self._base(), self._modules(), full)
        else:
            base = dict(self.model.named_parameters())
            # A name that both have, such as logit_scale, is the model's.
            full = {f"self.{n}" if n in base else n: p for n, p in full.items()} | base
            self._originals = Originals.of([], self._modules(), {})
            # Values are not kept: that would be a second model.
            self._originals.flags = [(p, p.requires_grad) for p in full.values()]
        self._declare({slot.target.name: slot.layer for slot in self._slots}, full)
        self._hang_in()
        return self

    def _base(self) -> list[nn.Parameter]:
        """What is frozen."""
        return list(self.model.parameters())

    def _modules(self) -> list[tuple[str, nn.Module]]:
        """Each module of the model with its path, adapter included."""
        return list(self.model.named_modules())

    def _everything(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

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

    def disable_gradient_checkpointing(self) -> None:
        """Keep the activations again."""
        set_gradient_checkpointing(self.model, False)

    def report(self) -> ParameterReport:
        """How much is trained and exchanged, counted in the model as it is."""
        self._require("on")
        modules = (module for _, module in self._modules())
        return ParameterReport.of(modules, self.parameters, self._travels())

    def describe(self) -> dict[str, Any]:
        """What a saved adapter must say about the model that it belongs to: JSON."""
        with self.lora_disabled():
            digest = weights_sha256(self.model)
        name = str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)
        return {"base_model": name, "base_model_sha256": digest}

    # What is exchanged.

    def get_parameters(self) -> dict[str, Tensor]:
        """Copies on the CPU of what is learned.

        Everything in the model where ``save_only_trainable`` is False or the layers are off.
        """
        self._require("on", "off")
        return copy_of(self._travels())

    def set_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`get_parameters` gave.

        Raises:
            FedloraError: names every value that does not fit; nothing is changed then.
        """
        self._require("on", "off")
        fill(self._travels(), parameters)
        if self._whole():
            self.served.settle()  # the base that was given is the pristine one now

    def _travels(self) -> dict[str, Tensor]:
        return self._everything() if self._whole() else self.exchanged()

    def _whole(self) -> bool:
        return self.phase == "off" or not self.config.enabled or not self.config.save_only_trainable

    # The layers off, on, away.

    def disable_lora_layers(self) -> None:
        """Take the adapter out: the original model is back, to the bit, until it is enabled.

        Head and running statistics are the original ones too.
        """
        self._require("on", "off")
        if self.phase == "on" and self.config.enabled:
            self._asleep = self.served.forget()
            self._originals.swap()
            self._take_out()
            self.phase = "off"

    def enable_lora_layers(self) -> None:
        """Put the adapter back as it was, to the bit."""
        self._require("on", "off")
        if self.phase == "off":
            self._refuse_adapted()  # by another wrapper, meanwhile
            self._refuse_replaced()
            self._originals.swap()
            self._hang_in()
            self.served.serve(self._asleep)

    def _refuse_replaced(self) -> None:
        for slot in self._slots:
            for owner, attribute in slot.target.places:
                if getattr(owner, attribute, None) is not slot.target.base:
                    raise FedloraError(
                        f"{slot.target.name} was replaced while the adapter was off (by another "
                        "wrapper?), so it cannot come back. Undo that first."
                    )

    @contextmanager
    def lora_disabled(self) -> Iterator[None]:
        """The original model for as long as the context lasts."""
        was_on = self.phase == "on"
        self.disable_lora_layers()
        try:
            yield
        finally:
            if was_on:
                self.enable_lora_layers()

    def unload(self) -> nn.Module:
        """Undo everything: the original model, bit-identical, statistics included."""
        self.disable_lora_layers()
        if not self.config.enabled:
            self._take_out()
        self.phase = "unloaded"
        return self.model

    @torch.no_grad()
    def merge_and_unload(self) -> Any:
        """Add the adapter to the weights: a plain model with the same predictions.

        Computed in float64 from the pristine weights, residual included.
        """
        self._require("on")
        for name, layer in self.layers.items():
            weight = layer.get_base_layer().weight
            change = product(layer)
            if name in self.served.residual:
                change += self.served.residual[name].to(torch.float64).dense()
            merged = self.served.pristine(name).to("cpu", torch.float64) + change
            weight.copy_(merged.view_as(weight))
        self._take_out()
        self.phase = "merged"
        return self.model
