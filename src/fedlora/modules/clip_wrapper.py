"""LoRA in a federated CLIP: ours, or an object of the user's own class."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.modules.anatomy import Anatomy
from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.clip_targets import head_target, targets_in
from fedlora.modules.config import LoRAConfig
from fedlora.modules.federated import Optimizers, refuse_blind, refuse_difference
from fedlora.modules.injection import Target, adapted_already
from fedlora.modules.lora import LoRAWrapper
from fedlora.modules.parameters import copy_of, mismatch, refuse
from fedlora.modules.view import only
from fedlora.state import AdapterState

Towers = Literal["vision", "both"]
# What the wrapper answers in the place of the object, through the object's own method.
METHODS = ("get_parameters", "set_parameters")
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
        self._theirs: dict[str, Any] = {}

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

    # The object's own methods.

    def _answer(self) -> None:
        """Stand before the object's own methods."""
        for name in METHODS:
            theirs = getattr(self.federated, name, None)
            if callable(theirs):
                # What the instance had under that name already, if anything.
                self._theirs[name] = (theirs, vars(self.federated).get(name))
                setattr(self.federated, name, getattr(self, f"_{name}"))
        if not hasattr(self.federated, MARK):
            setattr(self.federated, MARK, self)

    def _step_back(self) -> None:
        for name, (_, before) in self._theirs.items():
            if before is None:
                delattr(self.federated, name)
            else:
                setattr(self.federated, name, before)
        self._theirs.clear()

    def _view(self) -> AbstractContextManager[None]:
        """The object's modules as if they held what is exchanged only."""
        roots = list(self.anatomy.modules.values())
        if self._head is not None:
            roots.append(self._head_layer())  # an attribute of a plain object is below no module
        return only(roots, self.exchanged().values())

    def _probe(self) -> None:
        """Make sure that the object's own method sees the adapter."""
        if "get_parameters" not in self._theirs or self._whole():
            return
        other = sum(t.numel() for t in self._own("other").values())
        adapter = sum(t.numel() for t in self.exchanged().values()) - other
        base = sum(p.numel() for p in self._originals.base)
        try:
            given = self._get_parameters()
        except TypeError:  # it wants arguments that are not known here
            return
        name = f"{type(self.federated).__name__}.get_parameters"
        refuse_blind(given, adapter, other, base, name)

    def _get_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The object's ``get_parameters``, which sees the adapter only."""
        theirs = self._theirs["get_parameters"][0]
        if self._whole():
            return theirs(*args, **kwargs)
        with self._view():
            return theirs(*args, **kwargs)

    def _set_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The object's ``set_parameters``, which sees the adapter only; all or nothing."""
        theirs = self._theirs["set_parameters"][0]
        if self._whole():
            return theirs(*args, **kwargs)
        what = f"the parameters given to {type(self.federated).__name__}"
        self._compare(args[0] if args else next(iter(kwargs.values()), None), what)
        learned = self.exchanged()
        before = copy_of(learned)
        try:
            with self._view():
                result = theirs(*args, **kwargs)
            refuse([f for n, t in learned.items() for f in mismatch(n, before[n], t)], what)
        except BaseException:
            for name, tensor in learned.items():
                tensor.data = before[name].to(tensor.device)
            raise
        return result

    def _compare(self, given: object, what: str) -> None:
        if "get_parameters" in self._theirs:
            try:
                own = self._get_parameters()
            except TypeError:  # it wants arguments that are not known here
                return
            refuse_difference(own, given, what)

    # Off, on, away.

    def _hang_in(self) -> None:
        super()._hang_in()
        self._tell_text()
        if not self.config.enabled:
            return
        if self._optimizers is None:
            factors = [p for part in ("A", "B") for p in self.parameters[part].values()]
            self._optimizers = Optimizers(self._originals.base, factors)
        try:
            self._optimizers.train_adapter(Anatomy.of(self.federated).optimizers)
            self._answer()
        except BaseException:
            self.unload()
            raise

    def _take_out(self) -> None:
        super()._take_out()
        if self._optimizers is not None:
            self._optimizers.train_base(Anatomy.of(self.federated).optimizers)
        self._step_back()
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
        if vars(self.federated).get(MARK) is self:
            delattr(self.federated, MARK)
        return self.federated
