"""LoRA put into a model by PEFT, seen as an AdapterState."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.modules.config import LoRAConfig
from fedlora.modules.dropout import KeyedDropout
from fedlora.sampling import derive_seed
from fedlora.state import AdapterState, Part, Residual

ADAPTER = "default"  # PEFT's own name for the only adapter


class LoRAWrapper:
    """Puts LoRA into a model's linear layers, without touching its code or class.

    The base is frozen. What is trained is declared here once, by part: A and B of each adapted
    layer, and ``other`` (extra parameters that are trained in full, such as a head). With
    ``config.enabled`` False nothing is injected and ``other`` is every parameter.

    Args:
        model: the model; layers are named by their path in it.
        config: the adapter's settings.
        targets: paths of the layers to adapt.
        other: parameters trained in full besides: name -> parameter.

    Raises:
        FedloraError: for a wrong setting, or targets that the model lacks.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig,
        targets: Iterable[str],
        other: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        config.validate()
        self.model = model
        self.config = config
        self.layers: dict[str, Any] = {}
        self._dropouts: list[KeyedDropout] = []
        self._pristine: dict[str, Tensor] = {}
        self._served: dict[str, Residual] = {}
        full = dict(other or {})
        if config.enabled:
            model.requires_grad_(False)
            self._inject(sorted(targets))
            full.update(self._biases())
        else:
            full.update(model.named_parameters())
        self.parameters: dict[Part, dict[str, nn.Parameter]] = {
            "A": {name: layer.lora_A[ADAPTER].weight for name, layer in self.layers.items()},
            "B": {name: layer.lora_B[ADAPTER].weight for name, layer in self.layers.items()},
            "other": full,
        }
        self.scaling: dict[str, float] = {n: x.scaling[ADAPTER] for n, x in self.layers.items()}
        self.set_trainable({"A", "B", "other"})

    def _inject(self, targets: list[str]) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        config = self.config
        peft_config = LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides by r
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            bias=config.bias,
            use_rslora=config.use_rslora,
        )
        inject_adapter_in_model(peft_config, self.model)
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                self.layers[name] = module
                if config.lora_dropout > 0:
                    dropout = KeyedDropout(config.lora_dropout, name)
                    module.lora_dropout[ADAPTER] = dropout
                    self._dropouts.append(dropout)

    def _biases(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.config.bias == "all":
            for name, parameter in self.model.named_parameters():
                if name.endswith("bias"):
                    yield name.replace(".base_layer.", "."), parameter
        elif self.config.bias == "lora_only":
            for name, layer in self.layers.items():
                if layer.get_base_layer().bias is not None:
                    yield f"{name}.bias", layer.get_base_layer().bias

    def base_weights(self) -> dict[str, Tensor]:
        """The frozen weight of each adapted layer, (out_features, in_features); not copies."""
        return {name: layer.get_base_layer().weight.detach() for name, layer in self.layers.items()}

    def set_trainable(self, parts: Iterable[Part]) -> None:
        """Let gradients reach these parts only."""
        chosen = frozenset(parts)
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

    def set_dropout_key(self, key: int | None, step: int = 0) -> None:
        """Fix the dropout masks of the next step; None hands them back to torch's generator."""
        derived = None if key is None else derive_seed(key, step)
        for dropout in self._dropouts:
            dropout.key = derived

    def state(self) -> AdapterState:
        """A copy of all trained parameters on the CPU in float32, with what is served."""

        def copy(part: Part) -> dict[str, Tensor]:
            return {
                name: parameter.detach().to("cpu", torch.float32, copy=True)
                for name, parameter in self.parameters[part].items()
            }

        return AdapterState(
            copy("A"), copy("B"), copy("other"), dict(self.scaling), dict(self._served)
        )

    @torch.no_grad()
    def load(self, state: AdapterState) -> None:
        """Put a whole or partial state into the model, its residual included.

        Raises:
            FedloraError: names every tensor that does not fit; nothing is changed then.
        """
        faults = list(self._faults(state))
        if faults:
            more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
            raise FedloraError(
                f"the adapter does not fit this model: {'; '.join(faults[:5])}{more}."
            )
        for part, parameters in self.parameters.items():
            for name, tensor in state.part(part).items():
                parameters[name].copy_(tensor)
        self.serve(state.residual)

    def _faults(self, state: AdapterState) -> Iterator[str]:
        for part, parameters in self.parameters.items():
            for name, tensor in state.part(part).items():
                if name not in parameters:
                    yield f"{part} of {name!r} is not trained here"
                elif tensor.shape != parameters[name].shape:
                    want, got = tuple(parameters[name].shape), tuple(tensor.shape)
                    yield f"{part} of {name!r} has shape {got}, expected {want}"
        for name, residual in state.residual.items():
            if name not in self.layers:
                yield f"the residual of {name!r} has no adapted layer here"
            elif residual.shape != self.layers[name].get_base_layer().weight.shape:
                yield f"the residual of {name!r} has shape {residual.shape}"

    @torch.no_grad()
    def serve(self, residual: Mapping[str, Residual]) -> None:
        """Serve W0 + R in each adapted layer.

        Always computed from the pristine weight, kept on the CPU once a residual was seen: nothing
        is added to a weight that was changed before, so rounding cannot build up over rounds.
        """
        for name in [*residual, *(set(self._served) - set(residual))]:
            change = residual.get(name)
            if change is self._served.get(name):
                continue
            weight = self.layers[name].get_base_layer().weight
            if name not in self._pristine:
                self._pristine[name] = weight.detach().to("cpu", copy=True)
            pristine = self._pristine[name].to(weight.device)
            if change is None:
                weight.copy_(pristine)
                del self._served[name]
            else:
                weight.copy_(pristine.float() + change.to(torch.float32).dense().to(weight.device))
                self._served[name] = change
