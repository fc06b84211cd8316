"""LoRA in a federated CLIP: ours, or an object of the user's own class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.modules.anatomy import Anatomy, optimizers_in
from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.clip_targets import head_target, targets_in
from fedlora.modules.config import LoRAConfig, checked
from fedlora.modules.injection import Target, adapted_already, find_targets
from fedlora.modules.learned import State
from fedlora.modules.lora import LoRAWrapper
from fedlora.modules.optimizers import Optimizers
from fedlora.modules.own_methods import OwnMethods
from fedlora.modules.quick import make_plain
from fedlora.state import AdapterState

Towers = Literal["vision", "both"]
MARK = "lora_wrapper"  # the attribute under which the object knows its wrapper


class CLIPLoRAWrapper(LoRAWrapper):
    """Adapts the encoder blocks of the CLIP in an object with a federated interface.

    The object may be a :class:`~fedlora.FederatedCLIPModel` or of any class that holds a CLIP or
    SigLIP of transformers somewhere. Its class and code stay as they are. After
    :meth:`apply_lora_to_federated_model` its own ``get_parameters`` and ``set_parameters`` see the
    adapter and whatever else is trained, in their own format, and the optimizers that it holds
    train those. Parameters beside the CLIP that want gradients (a linear head) are trained in full
    and travel along. While it is wrapped the object knows its wrapper as ``lora_wrapper``.

    Args:
        federated_clip_model: the object; changed in place, not before the adapter is applied.
        lora_config: the adapter's settings, copied; None means ``LoRAConfig()``.
        target_components: replaces ``lora_config.target_components`` where given.
        towers: which towers are adapted (trained, where LoRA is off); None means all that there
            are, and that only those travel which the head uses.

    Raises:
        FedloraError: for wrong settings, targets that match nothing (with the names that exist),
            an object without a CLIP, and one that has LoRA already.
    """

    def __init__(
        self,
        federated_clip_model: Any,
        lora_config: LoRAConfig | None = None,
        target_components: Sequence[str] | None = None,
        towers: Towers | None = None,
    ) -> None:
        config = checked(lora_config)
        if target_components is not None:
            config.target_components = list(target_components)
        if towers not in (None, "vision", "both"):
            raise FedloraError(f"towers should be one of vision, both but got {towers!r}.")
        self.federated = federated_clip_model
        self.anatomy = Anatomy.of(federated_clip_model)
        self._asked_towers = towers
        self._head: Target | None = None
        self._optimizers: Optimizers | None = None
        self._marked = False
        self._moved = False  # whether the base is no longer the one that was loaded
        super().__init__(self.anatomy.clip, config)
        self._methods = OwnMethods(self)

    def _plan(self) -> tuple[list[Target], dict[str, nn.Parameter]]:
        config, asked = self.config, self._asked_towers
        self.anatomy = Anatomy.of(self.federated)
        self.model, other = self.anatomy.clip, self.anatomy.outside()
        self.towers: Towers = asked or ("both" if hasattr(self.model, "text_model") else "vision")
        prefixes = ("vision",) if self.towers == "vision" else ("vision", "text")
        encoder = config.enabled and "encoder" in config.target_components
        names = targets_in(self.model, config, prefixes) if encoder else []
        targets = find_targets(self.model, config, names) if config.enabled else []
        if config.enabled and "classifier" in config.target_components:
            self._head = head = head_target(self.anatomy, config)
            targets.append(head)
            other = {n: p for n, p in other.items() if n.rpartition(".")[0] != head.name}
        # A text tower that the head does not use travels where it was asked for.
        ours = isinstance(self.federated, FederatedCLIPModel)
        self.idle_text = asked is None and ours and not self.federated.uses_text_tower
        return targets, other

    def _adapts(self, path: str) -> bool:
        return self.towers == "both" or not path.startswith("text_")

    def _is_idle(self, path: str) -> bool:
        return self.idle_text and path.startswith("text_")

    def apply_lora_to_federated_model(self) -> Any:
        """Inject the adapter and let the object work on it; returns the object.

        Raises:
            FedloraError: where it was done before, and where the object's ``get_parameters`` would
                not see the adapter or none of its optimizers could train it; it is as before then.
        """
        self.apply()
        return self.federated

    def _adapted_where(self) -> str:
        known = getattr(self.federated, MARK, None)
        if (
            isinstance(known, CLIPLoRAWrapper)
            and known is not self
            and known.phase in ("on", "off")
        ):
            return f"its wrapper, which is {known.phase} now"
        found = (adapted_already(module) for module in self.anatomy.modules.values())
        return next(filter(None, found), "")

    def _keep_vision_only(self) -> None:
        """Freeze and forget what the vision tower does not use."""
        for name, parameter in list(self.parameters["other"].items()):
            if name.startswith(("text_", "logit_")):
                parameter.requires_grad_(False)
                del self.parameters["other"][name]

    def _base(self) -> list[nn.Parameter]:
        head = [] if self._head is None else list(self._head.base.parameters())
        return [*self.anatomy.own_parameters(), *head]

    def _modules(self) -> list[tuple[str, nn.Module]]:
        modules = [*super()._modules(), *self.anatomy.others().items()]
        if self._head is not None and self.phase != "new":
            modules += self._head_layer().named_modules(prefix=self._head.name)
        return modules

    def _head_layer(self) -> nn.Module:
        layer: nn.Module = next(s.layer for s in self._slots if s.target is self._head)
        return layer

    def _everything(self) -> dict[str, Tensor]:
        return {
            f"{prefix}.{name}" if prefix else name: tensor
            for prefix, module in self.anatomy.modules.items()
            for name, tensor in module.state_dict(keep_vars=True).items()
        }

    def exchanged(self) -> dict[str, Tensor]:
        """What is learned and used, by name, itself; a tower that the head leaves idle is not."""
        return {n: t for n, t in super().exchanged().items() if not self._is_idle(n)}

    def as_state(self, flat: Tensor, shapes: Mapping[str, torch.Size]) -> AdapterState:
        """As in LoRAWrapper, without a tower that the head leaves idle."""
        state = super().as_state(flat, shapes)
        if not self.idle_text:
            return state
        A, B, other = (
            {n: t for n, t in part.items() if not self._is_idle(n)}
            for part in (state.A, state.B, state.other)
        )
        used: AdapterState = replace(state, A=A, B=B, other=other)
        return used

    def describe(self) -> dict[str, Any]:
        """What a saved adapter must say about the model that it belongs to: JSON."""
        ours = isinstance(self.federated, FederatedCLIPModel)
        about = self.federated.describe() if ours else super().describe()
        if ours and self.config.enabled and self._moved:
            about["base_model_sha256"] = self._base_sha256()
        return {**about, "towers": self.towers}

    def base_was_set(self) -> None:
        """Take the base as it is now for the pristine one."""
        super().base_was_set()
        self._moved = True
        self._tell_text()

    def roots(self) -> list[nn.Module]:
        """Every module through which the object may look at what is learned."""
        head = [] if self._head is None else [self._head_layer()]
        # An adapted head may be an attribute of a plain object, below no module.
        return [*self.anatomy.modules.values(), *head]

    def _check(self) -> None:
        """Make sure that the object's own method sees the adapter."""
        if not self.config.enabled:
            return
        factors = {id(p) for part in ("A", "B") for p in self.parameters[part].values()}
        travels = self.exchanged().values()
        adapter = sum(t.numel() for t in travels if id(t) in factors)
        other = sum(t.numel() for t in travels) - adapter
        self._methods.check(adapter, other, sum(p.numel() for p in self._originals.base))

    # Off, on, away.

    def _hang_in(self) -> None:
        super()._hang_in()
        if self.config.enabled:
            if self._optimizers is None:
                self._optimizers = self._make_optimizers()
            self._optimizers.train_adapter(optimizers_in(self.federated))
            self._methods.stand_before()
        elif self.towers == "vision":
            self._keep_vision_only()
        self._tell_text()
        ours = isinstance(self.federated, FederatedCLIPModel)
        self._moved = ours and self.federated.moved
        if not hasattr(self.federated, MARK):
            vars(self.federated)[MARK] = self
            self._marked = True

    def _make_optimizers(self) -> Optimizers:
        factors = [(n, p) for part in ("A", "B") for n, p in self.parameters[part].items()]
        weights = [self.layers[name].get_base_layer().weight for name, _ in factors]
        beside = self.anatomy.outside().values()
        return Optimizers(self._originals.base, [p for _, p in factors], weights, beside)

    def _take_out(self) -> None:
        super()._take_out()
        if self._optimizers is not None:
            self._optimizers.train_base(optimizers_in(self.federated))
        self._methods.step_back()
        self._tell_text()
        if isinstance(self.federated, FederatedCLIPModel):
            # The base was frozen meanwhile, whatever the model did.
            self.federated.moved = self._moved or not self.config.enabled

    def sees_rows(self, layer: str) -> bool:
        """Whether a layer sees pictures and not prompts."""
        return not layer.startswith("text_")  # that tower sees prompts

    def _tell_text(self) -> None:
        """Say whether the text tower moves, to a model that keeps its features."""
        if isinstance(self.federated, FederatedCLIPModel):
            text = (p for n, p in self.model.named_parameters() if n.startswith("text_"))
            self.federated.freeze_text(not any(p.requires_grad for p in text))

    def unload(self) -> Any:
        """Undo everything: the original object, bit-identical; returns it."""
        super().unload()
        return self.federated

    def merge_and_unload(self) -> Any:
        """Add the adapter to the weights: the object, plain again, with the same predictions."""
        super().merge_and_unload()
        if isinstance(self.federated, FederatedCLIPModel):
            self.federated.moved = True
        return self.federated

    def _leave(self, phase: State) -> None:
        super()._leave(phase)
        if isinstance(self.federated, FederatedCLIPModel):
            make_plain(self.federated)
        if self._marked:
            vars(self.federated).pop(MARK, None)
            self._marked = False
