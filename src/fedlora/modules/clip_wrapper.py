"""LoRA in a federated CLIP: ours, or an object of the user's own class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.modules.anatomy import Anatomy, optimizers_in
from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.clip_targets import head_target, targets_in
from fedlora.modules.config import LoRAConfig
from fedlora.modules.injection import Target, adapted_already
from fedlora.modules.lora import LoRAWrapper
from fedlora.modules.optimizers import Optimizers
from fedlora.modules.own_methods import OwnMethods
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
        config = LoRAConfig() if lora_config is None else replace(lora_config)
        if target_components is not None:
            config.target_components = list(target_components)
        config.validate()
        if towers not in (None, "vision", "both"):
            raise FedloraError(f"towers should be one of vision, both but got {towers!r}.")
        self.federated = federated_clip_model
        self.anatomy = Anatomy.of(federated_clip_model)
        self._refuse_adapted()
        clip, other = self.anatomy.clip, self.anatomy.outside()
        self.towers: Towers = towers or ("both" if hasattr(clip, "text_model") else "vision")
        prefixes = ("vision",) if self.towers == "vision" else ("vision", "text")
        encoder = config.enabled and "encoder" in config.target_components
        names = targets_in(clip, config, prefixes) if encoder else []
        self._head: Target | None = None
        if config.enabled and "classifier" in config.target_components:
            self._head = head = head_target(self.anatomy, config)
            other = {n: p for n, p in other.items() if n.rpartition(".")[0] != head.name}
        super().__init__(clip, config, names, other)
        self._targets += [] if self._head is None else [self._head]
        unused = towers is None and not getattr(federated_clip_model, "uses_text_tower", True)
        self.idle = frozenset(n for n in names if unused and n.startswith("text_model."))
        self._optimizers: Optimizers | None = None
        self._methods = OwnMethods(self)
        self._marked = False

    def apply_lora_to_federated_model(self) -> Any:
        """Inject the adapter and let the object work on it; returns the object.

        Raises:
            FedloraError: where it was done before, and where the object's ``get_parameters`` would
                not see the adapter or none of its optimizers could train it; it is as before then.
        """
        self.apply()
        return self.federated

    def apply(self) -> CLIPLoRAWrapper:
        """As :meth:`apply_lora_to_federated_model`; returns the wrapper."""
        super().apply()
        if not self.config.enabled:
            if self.towers == "vision":
                self._keep_vision_only()
            self._tell_text()
            return self
        try:
            self._probe()
        except BaseException:
            self.unload()
            raise
        return self

    def _adapted_where(self) -> str:
        known = getattr(self.federated, MARK, None)
        if isinstance(known, CLIPLoRAWrapper) and known is not self and known.phase == "off":
            return "its blocks, which are off now"
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
        return [*super()._base(), *head]

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
            for name, tensor in module.state_dict().items()
        }

    def exchanged(self) -> dict[str, Tensor]:
        """What is learned and used, by name, itself; a tower that the head leaves idle is not."""
        idle = {f"{name}.lora_{factor}" for name in self.idle for factor in "AB"}
        return {name: t for name, t in super().exchanged().items() if name not in idle}

    def state(self) -> AdapterState:
        """As in LoRAWrapper, without a tower that the head leaves idle."""
        state = super().state()
        A, B = ({n: t for n, t in f.items() if n not in self.idle} for f in (state.A, state.B))
        used: AdapterState = replace(state, A=A, B=B)
        return used

    def describe(self) -> dict[str, Any]:
        """What a saved adapter must say about the model that it belongs to: JSON."""
        ours = isinstance(self.federated, FederatedCLIPModel)
        about = self.federated.describe() if ours else super().describe()
        return {**about, "towers": self.towers}

    def roots(self) -> list[nn.Module]:
        """Every module through which the object may look at what is learned."""
        head = [] if self._head is None else [self._head_layer()]
        # An adapted head may be an attribute of a plain object, below no module.
        return [*self.anatomy.modules.values(), *head]

    def exchanges_all(self) -> bool:
        """Whether the whole model travels, as without an adapter."""
        return self._whole()

    def _probe(self) -> None:
        """Make sure that the object's own method sees the adapter."""
        other = sum(t.numel() for t in self._own("other").values())
        adapter = sum(t.numel() for t in self.exchanged().values()) - other
        self._methods.refuse_blind(adapter, other, sum(p.numel() for p in self._originals.base))

    # Off, on, away.

    def _hang_in(self) -> None:
        super()._hang_in()
        self._tell_text()
        if not self.config.enabled:
            return
        if self._optimizers is None:
            factors = [(n, p) for part in ("A", "B") for n, p in self.parameters[part].items()]
            weights = [self.layers[name].get_base_layer().weight for name, _ in factors]
            self._optimizers = Optimizers(self._originals.base, [p for _, p in factors], weights)
        try:
            self._optimizers.train_adapter(optimizers_in(self.federated))
            self._methods.stand_before()
        except BaseException:
            self.unload()
            raise
        if not hasattr(self.federated, MARK):
            vars(self.federated)[MARK] = self
            self._marked = True

    def _take_out(self) -> None:
        super()._take_out()
        if self._optimizers is not None:
            self._optimizers.train_base(optimizers_in(self.federated))
        self._methods.step_back()
        self._tell_text()

    def _tell_text(self) -> None:
        """Say whether the text tower moves, to a model that keeps its features."""
        tell = getattr(self.federated, "freeze_text", None)
        if callable(tell):
            tell(not any(p.requires_grad for n, p in self.model.named_parameters() if "text_" in n))

    def unload(self) -> Any:
        """Undo everything: the original object, bit-identical; returns it."""
        super().unload()
        return self._farewell()

    def merge_and_unload(self) -> Any:
        """Add the adapter to the weights: the object, plain again, with the same predictions."""
        super().merge_and_unload()
        return self._farewell()

    def _farewell(self) -> Any:
        if self._marked:
            vars(self.federated).pop(MARK, None)
            self._marked = False
        return self.federated
