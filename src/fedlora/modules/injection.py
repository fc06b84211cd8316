"""LoRA layers made by PEFT, hung into a model and taken out again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.modules.config import LoRAConfig
from fedlora.modules.dropout import KeyedDropout
from fedlora.modules.layers import LaneLinear

ADAPTER = "default"  # PEFT's own name for the only adapter
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Place = tuple[Any, str]  # an object and the name of the attribute that holds a layer
Switch = tuple[Any, str, Any]  # an object, the name of an attribute and its value
# What makes torch read weights in evaluation mode without calling the layers that hold them.
FUSED = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
    (nn.TransformerEncoder, "use_nested_tensor"),
)
_NONE = (
    "{} has no linear or convolutional layer to adapt. LoRAWrapper takes a model that holds some; "
    "a layer alone goes into nn.Sequential(layer)."
)
_EMPTY = "lora.target_modules must name at least one layer, got []. Leave it out to adapt them all."


@dataclass(frozen=True)
class Target:
    """A layer to adapt.

    Attributes:
        name: its path in the model.
        base: the layer.
        places: every place where it hangs; more than one where modules share it.
        r: rank of its adapter.
        lora_alpha: scaled by lora_alpha / r.
        fused: torch's switches that are off while the adapter is there, and their values.
    """

    name: str
    base: nn.Module
    places: tuple[Place, ...]
    r: int
    lora_alpha: float
    fused: tuple[Switch, ...] = ()


@dataclass
class Slot:
    """An adapted layer: PEFT's wraps ``target.base`` and takes its places when it is hung in."""

    target: Target
    layer: Any

    def hang(self, chosen: nn.Module) -> None:
        """Put ``chosen`` (the adapted layer or its base) into every place."""
        base = self.target.base
        gone = base if chosen is self.layer else self.layer
        if chosen is self.layer:
            # The model may have been moved or switched while this layer was out of it.
            weight: Any = base.weight
            self.layer.to(weight.device).train(base.training)
        for owner, attribute in self.target.places:
            if getattr(owner, attribute, None) is gone:  # somebody may have put another one there
                setattr(owner, attribute, chosen)
        for owner, attribute, value in self.target.fused:
            setattr(owner, attribute, value if chosen is base else False)

    def refuse_replaced(self) -> None:
        """Refuse to come back where somebody put another layer meanwhile.

        Raises:
            FedloraError: names the layer.
        """
        for owner, attribute in self.target.places:
            if getattr(owner, attribute, None) is not self.target.base:
                raise FedloraError(
                    f"{self.target.name} was replaced while the adapter was off (by another "
                    "wrapper?), so it cannot come back. Undo that first."
                )


def why_not(module: nn.Module, shared: Container[int] = ()) -> str:
    """Why a module cannot be adapted; empty if it can.

    Args:
        module: the module.
        shared: ids of the parameters that more than one module holds.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "torch's MultiheadAttention reads its weight without calling it"
    kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
    if kind is None:
        return f"it is a {type(module).__name__}, not a linear or convolutional layer"
    own: Any = type(module)
    # A layer of ours computes with W + B A, whatever its forward() is.
    if own is not LaneLinear and any(
        getattr(own, f, 0) != getattr(kind, f, 0) for f in ("forward", "_conv_forward")
    ):
        return f"{own.__name__} has a forward() of its own, so W + B A is not what it computes with"
    # PEFT's A repeats kernel, stride and padding only; with groups it is no product B A.
    if isinstance(module, KINDS[1:]) and (
        module.groups != 1 or set(module.dilation) != {1} or module.padding_mode != "zeros"
    ):
        return "convolutions with groups, dilation or non-zero padding have no exact adapter"
    return _why_not_weight(module._parameters.get("weight"), shared)


def _why_not_weight(weight: Tensor | None, shared: Container[int]) -> str:
    """What keeps a change from being added to a weight, and to nothing else."""
    if weight is None:
        return "its weight is computed from others (a weight norm, pruning, a parametrization)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, to which nothing can be added exactly"
    if id(weight) in shared:
        return "its weight belongs to another layer too (tied weights)"
    return ""


def adapted_already(model: nn.Module) -> str:
    """The path of a layer that has an adapter; empty if none has."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return next((n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)), "")


def places_in(model: nn.Module) -> dict[int, list[Place]]:
    """Id of a module -> where it hangs."""
    places: dict[int, list[Place]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children() says a shared one once
            places[id(child)].append((parent, name))
    return places


def find_targets(
    model: nn.Module, config: LoRAConfig, names: Iterable[str] | None = None
) -> list[Target]:
    """The layers to adapt, in the model's order.

    Args:
        model: the model.
        config: rank and alpha; ``target_modules`` where ``names`` is None.
        names: full paths, or their endings, which take those of their layers that can be adapted;
            an empty list takes none. None with no ``target_modules`` means every linear and
            convolutional layer that can be adapted.

    Raises:
        FedloraError: for a name that matches nothing or cannot be adapted, and where the model has
            no layer to adapt.
    """
    if any(map(nn.parameter.is_lazy, model.parameters())):
        raise FedloraError(
            f"{type(model).__name__} holds lazy layers, which have no weights yet. Run a batch "
            "through it first."
        )
    # Every name, also the second one of a layer that hangs in two places.
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    reasons = _reasons(model)
    able = [name for name, module in modules.items() if not reasons[id(module)]]
    # A name alone is an iterable of letters too.
    given = [names] if isinstance(names, str) else names
    wanted = config.target_modules if given is None else list(given)
    if wanted is None:
        chosen = able
    else:
        chosen = [n for n in able if any(matches(n, target) for target in wanted)]
        for target in wanted:
            _refuse_unmatched(target, modules, able, reasons)
    if not chosen and names is None:
        raise FedloraError(_NONE.format(type(model).__name__) if wanted is None else _EMPTY)
    places, fused = places_in(model), _fused_in(model)
    once = {id(modules[name]): modules[name] for name in chosen}
    first = {id(module): name for name, module in reversed(modules.items())}
    return [
        Target(first[key], layer, tuple(places[key]), config.r, config.lora_alpha, fused[key])
        for key, layer in once.items()
    ]


def _reasons(model: nn.Module) -> dict[int, str]:
    """Id of a module -> why it cannot be adapted."""
    holders = Counter(
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    shared = {key for key, count in holders.items() if count > 1}
    return {id(module): why_not(module, shared) for module in model.modules()}


def _fused_in(model: nn.Module) -> dict[int, tuple[Switch, ...]]:
    """Id of a module -> the switches of the fused computations around it."""
    found: dict[int, tuple[Switch, ...]] = defaultdict(tuple)
    for parent in model.modules():
        for kind, attribute in FUSED:
            if isinstance(parent, kind) and hasattr(parent, attribute):
                for module in parent.modules():
                    found[id(module)] += ((parent, attribute, getattr(parent, attribute)),)
    return found


def matches(name: str, target: str) -> bool:
    """Whether a path is or ends with ``target``."""
    return name == target or name.endswith(f".{target}")


def _refuse_unmatched(
    target: str, modules: Mapping[str, nn.Module], able: Sequence[str], reasons: Mapping[int, str]
) -> None:
    if any(matches(name, target) for name in able):
        return
    found = next((module for name, module in modules.items() if matches(name, target)), None)
    if found is not None:
        raise FedloraError(
            f"lora.target_modules: {target!r} cannot be adapted: {reasons[id(found)]}."
        )
    raise FedloraError(
        f"lora.target_modules: {target!r} matches no layer. There are: "
        f"{', '.join(able[:12])}{' …' if len(able) > 12 else ''}."
    )


def make_slots(targets: Sequence[Target], config: LoRAConfig) -> list[Slot]:
    """PEFT's layers around the targets; the model itself is not touched.

    PEFT sees a shell that holds the layers alone, so it leaves no trace in the model, and layers
    from different places (encoder and head) are made in one call.
    """
    if not targets:
        return []
    from peft import LoraConfig, inject_adapter_in_model

    keys = [f"t{index}" for index in range(len(targets))]
    shell = nn.ModuleDict({key: t.base for key, t in zip(keys, targets, strict=True)})
    # PEFT freezes what it sees; whose gradients are wanted is said by the wrapper.
    flags = [(parameter, parameter.requires_grad) for parameter in shell.parameters()]
    peft_config = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides by r
        lora_dropout=config.lora_dropout,
        target_modules=keys,
        use_rslora=config.use_rslora,
        rank_pattern={key: t.r for key, t in zip(keys, targets, strict=True)},
        alpha_pattern={key: t.lora_alpha for key, t in zip(keys, targets, strict=True)},
    )
    inject_adapter_in_model(peft_config, shell)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    slots = [Slot(t, shell[key]) for key, t in zip(keys, targets, strict=True)]
    if config.lora_dropout > 0:
        for slot in slots:
            dropout = KeyedDropout(config.lora_dropout, slot.target.name)
            slot.layer.lora_dropout[ADAPTER] = dropout
    return slots


def product(layer: Any) -> Tensor:
    """The scaled product B A of a layer: (out_features, in_features * kernel), float64, CPU.

    A convolution's A is (rank, in, *kernel) and its B (out, rank, 1, …): seen as matrices, their
    product is the change of the flattened kernel.
    """
    A, B = (
        factor[ADAPTER].weight.detach().to("cpu", torch.float64).flatten(1)
        for factor in (layer.lora_A, layer.lora_B)
    )
    change: Tensor = float(layer.scaling[ADAPTER]) * (B @ A)
    return change
