from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.aggregation import LocalOnly
from fedlora.state import PARTS, AdapterState, Client, Residual
from tests.aggregation.rule_builders import ROUND, adapter, fresh, names, play


def test_nothing_travels():
    rule = LocalOnly()
    server = replace(fresh(), residual={"text.fc1": Residual(torch.ones(4, 7))})
    down = rule.distribute(server, Client(0, 1, rank=1, scale=2.0), ROUND)
    [update] = play(rule, server, [adapter(1)], [4])
    for travelled in (down, update.payload):
        assert names(travelled) == []
        assert travelled.nbytes == 0
    assert update.nbytes == 0


def test_everything_is_trained_and_stays():
    assert LocalOnly().trainable(ROUND) == PARTS
    assert LocalOnly().shared(ROUND) == frozenset()


def test_the_server_stays_and_reads_nothing():
    def stream():
        raise AssertionError("read")
        yield

    server = fresh()
    assert LocalOnly().aggregate(server, stream(), ROUND) is server


def test_what_a_client_kept_is_all_that_it_has():
    # As the engine puts it together: what came, over what it kept, over the server's start.
    server, kept = fresh(rank=4), adapter(1, rank=2, scaling=4.0).only(PARTS)
    client = Client(0, 1, rank=2, scale=2.0)
    down = LocalOnly().distribute(server, client, ROUND)
    has = down.over(replace(kept, scaling={}).over(server.cut(client.rank, client.scale)))
    assert has == AdapterState(kept.A, kept.B, kept.other, kept.scaling)
