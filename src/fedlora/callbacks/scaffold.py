"""SCAFFOLD: control variates against the drift of clients that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlora.callbacks.base import Row
from fedlora.callbacks.objective import Objective, Setting, check_averaged
from fedlora.errors import FedloraError
from fedlora.state import AdapterState, Client, ClientUpdate, Round

if TYPE_CHECKING:
    from fedlora.engines.lane import Lane

CONTROL = "control/"  # and a parameter's name: how a control variate is called


class SCAFFOLD(Objective):
    """Corrects each step by what the server knows of all clients' gradients.

    From Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    ICML 2020, arXiv 1910.06378, algorithm 1 with option II. A client steps ``y <- y - eta (g - c_k
    + c)``; after T steps from x it keeps ``c_k' = c_k - c + (x - y) / (T eta)`` and sends ``c_k' -
    c_k``, as many bytes again as it sends of the adapter. The server adds their sum over N, the
    number of all clients, to c, and sends c along from the second round on. Clients count alike in
    c; in the model they weigh as the rule has it. What stays with a client is not corrected.
    ``weight_decay`` of the optimizer is a part of g.

    The formula of c_k' holds for plain SGD only: other optimizers are refused.
    """

    def __init__(self) -> None:
        self.control: dict[str, Tensor] = {}  # the server's c, float64
        self._sum: dict[str, Tensor] = {}
        self._num_clients = 1

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget another run's c; a run that goes on gets its own back after this."""
        self.control = {}

    def check(self, setting: Setting) -> None:
        """Refuse whatever makes (x - y) / (T eta) another thing than a mean gradient."""
        check_averaged("SCAFFOLD", setting)
        name = setting.rule.name
        faults = {
            "model.optimizer must be torch.optim.SGD without momentum": not _is_plain(
                setting.optimizer
            ),
            "trainer.gradient_clip_val must be left out": setting.clip is not None,
            "averaging.precision=16-mixed, which leaves steps out, must be bf16-mixed or 32-true": (
                setting.precision == "16-mixed"
            ),
            "trainer.client_ranks must be left out": any(
                client.rank not in (0, setting.rank) for client in setting.clients
            ),
            f"{name}, which makes its factors anew each round, must be another rule": (
                setting.rule.factors == "anew"
            ),
        }
        for what, wrong in faults.items():
            if wrong:
                raise FedloraError(
                    "SCAFFOLD takes a client's mean gradient from how far it moved, as plain SGD "
                    f"moves it: {what}. FedProx has no such demand."
                )

    def download(self, client: Client, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The server's c, float32, of what is trained; nothing before there is one."""
        control = self.control
        return {f"{CONTROL}{name}": control[name].float() for name in shared if name in control}

    def sent(self, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The change of c_k."""
        return self.remembered(shared)

    def remembered(self, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """c_k, of each parameter that is averaged."""
        return {f"{CONTROL}{name}": tensor for name, tensor in shared.items()}

    def on_lane_start(self, lane: Lane) -> None:
        """Get c - c_k of each parameter ready on the device."""
        for name, anchor in lane.anchor.items():
            key = f"{CONTROL}{name}"
            shift = torch.zeros_like(anchor)
            if key in lane.received:
                shift += lane.received[key].to(anchor)
            if key in lane.memory:
                shift -= lane.memory[key].to(anchor)
            lane.scratch[name] = shift

    def on_lane_gradients(self, lane: Lane) -> None:
        """Add ``c - c_k``."""
        for name, shift in lane.scratch.items():
            gradient = lane.parameters[name].grad
            if gradient is not None:
                gradient.add_(shift)

    def on_lane_end(self, lane: Lane) -> None:
        """Keep c_k' and send its change."""
        lr = {id(p): group["lr"] for group in lane.optimizer.param_groups for p in group["params"]}
        for name, anchor in lane.anchor.items():
            parameter = lane.parameters[name]
            reach = lane.step * float(lr[id(parameter)])
            if not reach:  # it did not move, which says nothing of its gradient
                continue
            key = f"{CONTROL}{name}"
            new = ((anchor - parameter.detach()) / reach - lane.scratch[name]).cpu()
            old = lane.memory.get(key)
            lane.memory[key] = new
            lane.extra[key] = new.clone() if old is None else new - old

    def on_round_start(
        self, trainer: Any, pl_module: Any, rnd: Round, clients: Sequence[Client]
    ) -> None:
        """Begin to add up."""
        self._sum, self._num_clients = {}, rnd.num_clients

    def on_client_end(self, trainer: Any, pl_module: Any, update: ClientUpdate) -> None:
        """Add up what a client sent."""
        for key, change in update.extra.items():
            if key.startswith(CONTROL):
                name = key.removeprefix(CONTROL)
                old = self._sum.get(name)
                self._sum[name] = change.double() if old is None else old + change

    def on_aggregate(
        self,
        trainer: Any,
        pl_module: Any,
        before: AdapterState,
        after: AdapterState,
        report: Row,
    ) -> None:
        """``c <- c + sum (c_k' - c_k) / N``."""
        for name, total in self._sum.items():
            change = total / self._num_clients
            self.control[name] = self.control[name] + change if name in self.control else change

    def state_dict(self) -> dict[str, Any]:
        """The server's c."""
        return {"control": dict(self.control)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.control = dict(state_dict["control"])


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) is torch.optim.SGD and not any(
        group["momentum"] or group["nesterov"] or group["maximize"]
        for group in optimizer.param_groups
    )
