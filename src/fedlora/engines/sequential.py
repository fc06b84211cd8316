"""Plays the clients of a round one after the other in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedlora.engines.local import Lane, LocalLoop, NonFiniteError
from fedlora.errors import FedloraError
from fedlora.state import AdapterState, Client, ClientUpdate, Part, Round, ServerState

if TYPE_CHECKING:
    from fedlora.aggregation import Aggregator
    from fedlora.data import FederatedDataModule
    from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
    from fedlora.personal import ClientStore


class SequentialEngine:
    """One client at a time, on one frozen backbone.

    Args:
        loop: the local loop.
        data: gives each client's batches.
        store: what stays with the clients.
        on_start: called before a client trains.
        on_skip: called with a client whose loss or adapter was not finite; None stops instead.

    Attributes:
        unanswered_nbytes: sent in this round to clients that were left out of it.
    """

    def __init__(
        self,
        loop: LocalLoop,
        data: FederatedDataModule,
        store: ClientStore,
        on_start: Callable[[Client], None],
        on_skip: Callable[[Client, NonFiniteError], None] | None = None,
    ) -> None:
        self.loop = loop
        self.data = data
        self.store = store
        self.on_start = on_start
        self.on_skip = on_skip
        self.unanswered_nbytes = 0

    @property
    def lora(self) -> CLIPLoRAWrapper:
        """The adapter in the model."""
        if self.loop.module.lora is None:
            raise FedloraError("the model is not built yet.")
        return self.loop.module.lora

    def load(
        self, client: Client, rnd: Round, server: ServerState, rule: Aggregator
    ) -> tuple[AdapterState, int]:
        """Load what a client starts from; returns its public part and the bytes that travelled."""
        client = _known(client, server)
        down = rule.distribute(server.adapter, client, rnd)
        # Public knowledge, then what the client kept, then what travelled. The private part goes
        # into the model only: no rule sees it.
        kept = self.store.read(client.id, server.versions)
        public = server.adapter.cut(client.rank, client.scale)
        self.lora.load(down.over(kept.over(public)).padded(server.adapter.ranks))
        return down.over(public), down.nbytes

    def play(
        self, chosen: Sequence[Client], rnd: Round, server: ServerState, rule: Aggregator
    ) -> Generator[ClientUpdate, None, None]:
        """Train each chosen client and yield what it sends, in their order."""
        self.unanswered_nbytes = 0
        trainable, private = rule.trainable(rnd), rule.private(rnd)
        for client in (_known(client, server) for client in chosen):
            self.on_start(client)
            began = time.perf_counter()
            sent, down_nbytes = self.load(client, rnd, server, rule)
            self.lora.set_trainable(trainable)
            try:
                lane = self._train(client, rnd)
            except NonFiniteError as error:
                if self.on_skip is None:
                    raise
                self.on_skip(client, error)
                self.unanswered_nbytes += down_nbytes
                continue
            trained = self.lora.state().only(trainable).cut(client.rank)
            self._keep(client, rnd, trained, private)
            yield ClientUpdate(
                client=client,
                sent=sent,
                payload=rule.upload(sent, trained, client, rnd),
                weight=float(client.num_samples),
                metrics={**lane.metrics(), "seconds": time.perf_counter() - began},
                num_steps=lane.step,
                down_nbytes=down_nbytes,
            )

    def _train(self, client: Client, rnd: Round) -> Lane:
        return self.loop.run(
            client,
            rnd,
            self.data.num_batches(client),
            lambda epoch: self.data.client_batches(client, rnd, epoch),
        )

    def _keep(
        self, client: Client, rnd: Round, trained: AdapterState, private: frozenset[Part]
    ) -> None:
        if private:
            self.store.write(client.id, rnd.idx + 1, trained.only(private))


def _known(client: Client, server: ServerState) -> Client:
    """The client with the round in which it was last sent anything."""
    return replace(client, last_round=server.received.get(client.id))
