"""What is learned in a model, declared once by part and seen as an AdapterState."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.flat import joined, split
from fedlora.modules.config import LoRAConfig
from fedlora.modules.dropout import Draws, KeyedDropout, Rows
from fedlora.modules.frozen import keep_frozen_in
from fedlora.modules.injection import ADAPTER
from fedlora.modules.originals import Originals
from fedlora.modules.parameters import copy_of, fill, refuse
from fedlora.modules.served import ServedWeights
from fedlora.sampling import derive_seed
from fedlora.state import PARTS, AdapterState, Part

State = Literal["new", "on", "off", "merged", "unloaded"]


class LearnedParts:
    """The factors A and B of each adapted layer, and ``other``: what is trained in full.

    Args:
        model: the model that it is learned in.
        config: the adapter's settings.

    Attributes:
        phase: whether the adapter is in the model.
        layers: path -> PEFT's layer.
        parameters: part -> path -> parameter. A kernel's factors have its shape.
        scaling: path -> lora_alpha / rank.
        served: the residual beside the frozen weights.
        parts: those that gradients reach.
        rounded: whether frozen weights were rounded to 16 bits since they were loaded.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig) -> None:
        self.model = model
        self.config = config
        self.phase: State = "new"
        self.layers: dict[str, Any] = {}
        self.parameters: dict[Part, dict[str, nn.Parameter]] = {"A": {}, "B": {}, "other": {}}
        self.scaling: dict[str, float] = {}
        self.served = ServedWeights(self.layers)
        self.parts: frozenset[Part] = PARTS
        self.rounded = False
        self._originals = Originals()

    def _declare(self, layers: Mapping[str, Any], other: Mapping[str, nn.Parameter]) -> None:
        self.layers.update(layers)
        self.scaling = {name: layer.scaling[ADAPTER] for name, layer in layers.items()}
        self.parameters = {
            "A": {name: layer.lora_A[ADAPTER].weight for name, layer in layers.items()},
            "B": {name: layer.lora_B[ADAPTER].weight for name, layer in layers.items()},
            "other": dict(other),
        }

    def _require(self, *phases: State) -> None:
        if self.phase not in phases:
            what = {
                "new": "is not applied yet. Call apply() first",
                "off": "is off. Call enable_lora_layers() first",
                "on": "is on. Call disable_lora_layers() first",
                "merged": "was merged into the model and is gone. Wrap the model anew",
                "unloaded": "was unloaded and is gone. Wrap the model anew",
            }[self.phase]
            raise FedloraError(f"this adapter {what}.")

    def set_trainable(self, parts: Iterable[Part]) -> None:
        """Let gradients reach these parts only."""
        self._require("on")
        chosen = frozenset(parts)
        if not chosen <= PARTS:
            raise FedloraError(f"parts must be of A, B and other, got {sorted(map(str, chosen))}.")
        self.parts = chosen
        for part, parameters in self.parameters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(part in chosen)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that gradients reach, named ``A/<path>``, ``B/<path>``, ``other/…``."""
        return {
            f"{part}/{name}": parameter
            for part, parameters in self.parameters.items()
            for name, parameter in parameters.items()
            if parameter.requires_grad
        }

    def set_dropout_key(self, key: int | None, step: int = 0, rows: Rows | None = None) -> None:
        """Fix the dropout masks of the next step; None hands them back to torch's generator.

        Args:
            key: what the masks are drawn from, with the layer's path.
            step: likewise.
            rows: those of the batch that the model will see, whose masks are then a part of the
                whole batch's; None: all.
        """
        self.set_draws(None if key is None else Draws([derive_seed(key, step)], part=rows))

    def set_draws(self, draws: Draws | None) -> None:
        """Likewise, of several lanes."""
        text = draws and replace(draws, counts=None, part=None)
        for name, layer in self.layers.items():
            dropout = layer.lora_dropout[ADAPTER]
            if isinstance(dropout, KeyedDropout):  # there is none where the rate is 0
                dropout.draws = draws if self.sees_rows(name) else text

    def sees_rows(self, layer: str) -> bool:
        """Whether the first dimension of what a layer sees is that of the batch."""
        return True

    def exchanged(self) -> dict[str, Tensor]:
        """What is learned, by name, itself: factors, ``other``, running statistics."""
        named: dict[str, Tensor] = {}
        for name in self.parameters["A"]:
            named[f"{name}.lora_A"] = self.parameters["A"][name]
            named[f"{name}.lora_B"] = self.parameters["B"][name]
        return {**named, **self._own("other")}

    def get_parameters(self) -> dict[str, Tensor]:
        """Copies on the CPU of what is learned.

        Everything in the model where ``save_only_trainable`` is False or the layers are off.
        """
        self._require("on", "off")
        return copy_of(self.travels())

    def set_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`get_parameters` gave.

        Raises:
            FedloraError: names every value that does not fit; nothing is changed then.
        """
        self._require("on", "off")
        fill(self.travels(), parameters)
        if self.exchanges_all():
            self.base_was_set()

    def travels(self) -> dict[str, Tensor]:
        """What travels, by name, itself."""
        return self._everything() if self.exchanges_all() else self.exchanged()

    def exchanges_all(self) -> bool:
        """Whether the whole model travels, as without an adapter."""
        return self.phase == "off" or not self.config.enabled or not self.config.save_only_trainable

    def base_was_set(self) -> None:
        """Take the base as it is now for the pristine one, whatever was served in it."""
        self.served.settle()

    def _everything(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict(keep_vars=True))  # itself, to be set or put back

    def set_base_dtype(self, dtype: torch.dtype) -> None:
        """Keep the frozen Linear and Conv2d weights of the model in another type.

        What is learned and served stays as it is. Normalisation layers, embeddings, weights that
        several layers share and a head beside the model keep their types.

        Args:
            dtype: ``torch.bfloat16``, or ``torch.float32``, which does not bring back what was
                rounded away.
        """
        learned = {id(p) for part in self.parameters.values() for p in part.values()}
        served = self.served.forget()
        keep_frozen_in(dtype, self.model, learned)
        self.rounded = self.rounded or dtype == torch.bfloat16
        if served:  # beside a 16-bit weight, inside of another
            self.served.serve(served)

    def base_weights(self) -> dict[str, Tensor]:
        """The frozen weight of each adapted layer, (out_features, in_features); not copies."""
        return {name: self.served.weight(name) for name in self.layers}

    def state(self) -> AdapterState:
        """A copy of all that is learned on the CPU in float32, with what is served."""
        self._require("on")
        tensors = [t for part in self.parameters for t in self._own(part).values()]
        # At once: from a GPU each copy would be waited for.
        flat = joined(tensor.to(torch.float32) for tensor in tensors)
        return self.as_state(flat.cpu(), self.shapes())

    def shapes(self) -> dict[str, torch.Size]:
        """What a state has, named ``A/<path>``, ``B/<path>``, ``other/<path>``."""
        return {
            f"{part}/{name}": _as_in_states(part, tensor)
            for part in self.parameters
            for name, tensor in self._own(part).items()
        }

    def as_state(self, flat: Tensor, shapes: Mapping[str, torch.Size]) -> AdapterState:
        """Values end to end, float32 on the CPU, as a state with what is served beside them.

        Args:
            flat: the values.
            shapes: of :meth:`shapes`.
        """
        values = dict(zip(shapes, split(flat, [*shapes.values()]), strict=True))
        state = AdapterState.from_tensors(values)
        return replace(state, scaling=dict(self.scaling), residual=dict(self.served.residual))

    @torch.no_grad()
    def load(self, state: AdapterState, into: Mapping[str, Tensor] | None = None) -> None:
        """Put a whole or partial state into the model, its scaling and residual included.

        Args:
            state: of :meth:`state`, or a part of it.
            into: where its tensors go in the place of the model's own, named ``A/<path>``,
                ``B/<path>``, ``other/<path>``.

        Raises:
            FedloraError: names every tensor that does not fit; nothing is changed then.
        """
        self._require("on")
        if not isinstance(state, AdapterState):
            raise FedloraError(
                f"state must be an AdapterState, got {type(state).__name__}. What get_parameters() "
                "gives goes to set_parameters()."
            )
        refuse(list(self._faults(state)), "the adapter's tensors")
        if into is None:
            into = {
                f"{p}/{name}": own for p in self.parameters for name, own in self._own(p).items()
            }
        pairs = [(into[name], tensor) for name, tensor in state.tensors()]
        if pairs:
            values = [t if t.shape == own.shape else t.view_as(own) for own, t in pairs]
            torch._foreach_copy_([own for own, _ in pairs], values)
        self.set_scaling(state.scaling)
        self.served.serve(state.residual)

    def set_scaling(self, scaling: Mapping[str, float]) -> None:
        """Scale the adapters of these layers so."""
        for name, value in scaling.items():
            self.scaling[name] = self.layers[name].scaling[ADAPTER] = value

    def has_statistics(self) -> bool:
        """Whether there are running statistics beside what is trained."""
        return bool(self._originals.statistics())

    def _own(self, part: Part) -> dict[str, Tensor]:
        statistics = self._originals.statistics() if part == "other" else {}
        return {**self.parameters[part], **statistics}

    def _faults(self, state: AdapterState) -> Iterator[str]:
        for part in self.parameters:
            own = self._own(part)
            for name, tensor in state.part(part).items():
                if name not in own:
                    yield f"{part} of {name!r} is not trained here"
                    continue
                want = _as_in_states(part, own[name])
                if tensor.shape != want:
                    got = tuple(tensor.shape)
                    yield f"{part} of {name!r} has shape {got}, expected {tuple(want)}"
        for name in state.scaling:
            if name not in self.layers:
                yield f"the scaling of {name!r} has no adapted layer here"
        yield from self.served.faults(state.residual)
        if self.exchanges_all():
            yield from self.served.not_inside(state.residual)


def _as_in_states(part: Part, tensor: Tensor) -> torch.Size:
    """A convolution's factors are matrices there, which is what rules average."""
    return tensor.shape if part == "other" or tensor.dim() == 2 else tensor.flatten(1).shape
