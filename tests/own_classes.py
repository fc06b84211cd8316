"""Federated classes as people write them: none knows of adapters, and none may have to.

Each takes a CLIP of transformers, whichever kind, and has ``get_parameters``, ``set_parameters``,
``train_step`` and ``evaluate`` in a way of its own.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CLASSES = 3


def features(clip: Any, images: Tensor) -> Tensor:
    """Image features of any kind of CLIP: (n, 3, H, W) -> (n, width)."""
    tower = getattr(clip, "vision_model", clip)
    pooled = tower(pixel_values=images).pooler_output
    projection = getattr(clip, "visual_projection", None)
    return pooled if projection is None else projection(pooled)


def width(clip: Any) -> int:
    projection = getattr(clip, "visual_projection", None)
    if projection is not None:
        return projection.out_features
    return getattr(clip.config, "vision_config", clip.config).hidden_size


class Loop:
    """One step and an evaluation; the optimizer is made where ``optimizer()`` says."""

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_step(self, data: Tensor, labels: Tensor) -> float:
        self.train()
        optimizer = self.optimizer()
        optimizer.zero_grad()
        loss = cross_entropy(self(data), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, data: Tensor, labels: Tensor) -> float:
        self.eval()
        return (self(data).argmax(1) == labels).float().mean().item()


class Net(Loop, nn.Module):
    """A CLIP and a linear head, without a federated interface yet."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        self.head = nn.Linear(width(clip), CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(features(self.clip, images))


class StateDicts(Net):
    def get_parameters(self) -> dict[str, Tensor]:
        return {name: t.cpu().clone() for name, t in self.state_dict().items()}

    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        self.load_state_dict(parameters)


class Arrays(Net):
    """As in Flower's tutorials."""

    def get_parameters(self) -> list[np.ndarray]:
        return [value.cpu().numpy().copy() for value in self.state_dict().values()]

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        pairs = zip(self.state_dict().keys(), parameters, strict=False)
        state = OrderedDict({name: torch.tensor(value) for name, value in pairs})
        self.load_state_dict(state, strict=True)


class FlowerClient(Arrays):
    """Flower's NumPyClient asks with a config."""

    def get_parameters(self, config: dict[str, Any]) -> list[np.ndarray]:
        assert isinstance(config, dict)
        return super().get_parameters()


class Trainable(Net):
    def get_parameters(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(parameters[name])


class Copied(Net):
    def get_parameters(self) -> list[np.ndarray]:
        return [p.detach().numpy().copy() for p in self.parameters()]

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        for parameter, value in zip(list(self.parameters()), parameters, strict=False):
            parameter.data.copy_(torch.from_numpy(value))


class Pointed(Copied):
    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        for parameter, value in zip(self.parameters(), parameters, strict=False):
            parameter.data = torch.from_numpy(value.copy())


class Replaced(Trainable):
    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        for name, value in parameters.items():
            path, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(path), leaf, nn.Parameter(value.clone()))


class Removed(Trainable):
    """Takes a parameter away before it puts the new one."""

    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        for name, value in parameters.items():
            path, _, leaf = name.rpartition(".")
            module = self.get_submodule(path)
            delattr(module, leaf)
            module.register_parameter(leaf, nn.Parameter(value.clone()))


class Assigned(StateDicts):
    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        self.load_state_dict(parameters, assign=True)


class Lenient(StateDicts):
    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        self.load_state_dict(parameters, strict=False)


class Vector(Net):
    def get_parameters(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.parameters()).detach().clone()

    def set_parameters(self, parameters: Tensor) -> None:
        nn.utils.vector_to_parameters(parameters, self.parameters())


class TwoPaths(StateDicts):
    """The same CLIP and head under two names each."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__(clip)
        self.encoder = self.clip
        self.layers = nn.ModuleList([self.head])


class Norm(Arrays):
    """A head with running statistics and dropout."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__(clip)
        self.head = nn.Sequential(
            nn.BatchNorm1d(width(clip)), nn.Dropout(0.1), nn.Linear(width(clip), CLASSES)
        )


class AssignedNorm(Norm):
    get_parameters = StateDicts.get_parameters
    set_parameters = Assigned.set_parameters


class Lightning(Loop, lightning.LightningModule):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        self.head = nn.Linear(width(clip), CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(features(self.clip, images))

    def optimizer(self) -> torch.optim.Optimizer:
        return self.configure_optimizers()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    get_parameters = StateDicts.get_parameters
    set_parameters = StateDicts.set_parameters


class Features(nn.Module):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.model = clip

    def forward(self, images: Tensor) -> Tensor:
        return features(self.model, images)


class Chain(Loop, nn.Sequential):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__(Features(clip), nn.Linear(width(clip), CLASSES))

    get_parameters = Arrays.get_parameters
    set_parameters = Arrays.set_parameters


class Named(Loop, nn.Module):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        head = nn.Linear(width(clip), CLASSES)
        self.parts = nn.ModuleDict({"clip": clip, "head": head})

    def forward(self, images: Tensor) -> Tensor:
        return self.parts["head"](features(self.parts["clip"], images))

    get_parameters = Arrays.get_parameters
    set_parameters = Arrays.set_parameters


class Plain:
    """No module itself: it only has some."""

    def __init__(self, clip: nn.Module) -> None:
        self.backbone = clip
        self.fc = nn.Linear(width(clip), CLASSES)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "fc": self.fc}

    def __call__(self, images: Tensor) -> Tensor:
        return self.modules["fc"](features(self.modules["backbone"], images))

    def get_parameters(self) -> dict[str, Tensor]:
        return {
            f"{prefix}/{name}": tensor.clone()
            for prefix, module in self.modules.items()
            for name, tensor in module.state_dict().items()
        }

    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        for prefix, module in self.modules.items():
            mine = {
                name.partition("/")[2]: tensor
                for name, tensor in parameters.items()
                if name.startswith(f"{prefix}/")
            }
            module.load_state_dict(mine)

    def train_step(self, data: Tensor, labels: Tensor) -> float:
        parameters = [p for module in self.modules.values() for p in module.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for module in self.modules.values():
            module.train()
        optimizer.zero_grad()
        loss = cross_entropy(self(data), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, data: Tensor, labels: Tensor) -> float:
        for module in self.modules.values():
            module.eval()
        return (self(data).argmax(1) == labels).float().mean().item()


class Parts:
    def __init__(self, clip: nn.Module) -> None:
        self.net = Features(clip)
        self.fc = nn.Linear(width(clip), CLASSES)


class Nested(Plain):
    def __init__(self, clip: nn.Module) -> None:
        self.parts = Parts(clip)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"backbone": self.parts.net.model, "fc": self.parts.fc}


class InDict(Plain):
    def __init__(self, clip: nn.Module) -> None:
        self.models = {"clip": clip, "nets": [nn.Sequential(nn.Linear(width(clip), CLASSES))]}

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"backbone": self.models["clip"], "fc": self.models["nets"][0]}


@dataclass(slots=True)
class SlottedParts:
    clip: nn.Module
    fc: nn.Module


class InSlots(Plain):
    def __init__(self, clip: nn.Module) -> None:
        self.parts = SlottedParts(clip, nn.Linear(width(clip), CLASSES))

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"backbone": self.parts.clip, "fc": self.parts.fc}


class Counted(Arrays):
    """Says besides how many samples it has."""

    def get_parameters(self) -> tuple[list[np.ndarray], int]:
        return super().get_parameters(), 12


class Prototypes(StateDicts):
    """Sends class prototypes along, which the server keeps to itself."""

    def get_parameters(self) -> dict[str, Any]:
        return {"state": super().get_parameters(), "prototypes": torch.zeros(CLASSES, 4), "n": 12}

    def set_parameters(self, parameters: dict[str, Any]) -> None:
        super().set_parameters(parameters.get("state", parameters))


class Overridden(Net):
    """Its methods hang on the instance."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__(clip)
        self.get_parameters = self._give
        self.set_parameters = self._take

    _give = Arrays.get_parameters
    _take = Arrays.set_parameters


class Proximal(Copied):
    """FedProx: pulled towards what the server sent."""

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        super().set_parameters(parameters)
        self.anchor = [p.detach().clone() for p in self.parameters()]

    def train_step(self, data: Tensor, labels: Tensor) -> float:
        optimizer = self.optimizer()
        optimizer.zero_grad()
        pairs = zip(self.parameters(), self.anchor, strict=True)
        pull = sum(((p - anchor) ** 2).sum() for p, anchor in pairs)
        loss = cross_entropy(self(data), labels) + 0.05 * pull
        loss.backward()
        optimizer.step()
        return loss.item()


class Remembering(StateDicts):
    """MOON and its like keep the model that the server sent."""

    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        super().set_parameters(parameters)
        self.memory = {"sent": copy.deepcopy(self.clip)}


class Cached(Net):
    """Looks at its parameters once: an adapter that comes later is not among them."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__(clip)
        self.cached = list(self.parameters())

    def get_parameters(self) -> list[np.ndarray]:
        return [p.detach().numpy().copy() for p in self.cached]

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        for parameter, value in zip(self.cached, parameters, strict=True):
            parameter.data.copy_(torch.from_numpy(value))


class CachedAndCounted(Cached):
    def get_parameters(self) -> tuple[list[np.ndarray], int]:
        return super().get_parameters(), 12


class Holding(StateDicts):
    """Holds its optimizers, as ``make`` makes them; ``closure`` where the optimizer wants one."""

    def __init__(self, clip: nn.Module, make: Callable[[Any], Any]) -> None:
        super().__init__(clip)
        self.optimizers, self.scheduler = make(self)

    def train_step(self, data: Tensor, labels: Tensor) -> float:
        self.train()

        def closure() -> Tensor:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss = cross_entropy(self(data), labels)
            loss.backward()
            return loss.detach()

        loss = None if isinstance(self.optimizers[0], torch.optim.LBFGS) else closure()
        for optimizer in self.optimizers:
            loss = optimizer.step(closure) if loss is None else optimizer.step() or loss
        if self.scheduler is not None:
            self.scheduler.step()
        return float(loss)


class Remaking(StateDicts):
    """A fresh optimizer for each round."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__(clip)
        self.adam = torch.optim.AdamW(self.parameters(), lr=1e-2)

    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        self.adam = torch.optim.AdamW(self.parameters(), lr=1e-2)
        self.load_state_dict(parameters)

    def optimizer(self) -> torch.optim.Optimizer:
        return self.adam


# Name -> class: everything that must simply work.
WORKING = {
    kind.__name__: kind
    for kind in (
        StateDicts,
        Arrays,
        FlowerClient,
        Trainable,
        Copied,
        Pointed,
        Replaced,
        Removed,
        Assigned,
        Lenient,
        Vector,
        TwoPaths,
        Norm,
        AssignedNorm,
        Lightning,
        Chain,
        Named,
        Plain,
        Nested,
        InDict,
        InSlots,
        Counted,
        Prototypes,
        Overridden,
        Proximal,
        Remembering,
        Remaking,
    )
}
