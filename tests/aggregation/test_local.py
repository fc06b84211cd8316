from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora import FedloraError
from fedlora.aggregation import (
    FedAvg,
    FedAvgM,
    FedExLoRA,
    FedRotLoRA,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    FRLoRA,
    HetLoRA,
    Local,
    LocalHead,
    LocalNorm,
    LocalOnly,
    RoLoRA,
)
from fedlora.state import PARTS, AdapterState, Client
from fedlora.testing import check_aggregator
from fedlora.testing.cases import Case
from fedlora.testing.compare import bits
from fedlora.testing.federation import Federation
from tests.aggregation.rule_builders import HEAD, ROUND, adapter, fresh, mean, names, play

LAYER = ["[AB]/layer1", "other/classifier.*"]  # one layer and the head: other layers are shared
CASE = Case(
    seed=3,
    layers=((4, 5, 2.0), (2, 3, 1.0)),
    rank=2,
    clients=(Client(0, 2), Client(1, 5), Client(2, 3)),
    rounds=0,
    step=0.5,
    dtype=torch.float32,
)


@pytest.mark.parametrize(
    "make_rule",
    [
        LocalHead,
        lambda: LocalHead(FedExLoRA()),
        lambda: LocalHead(FedSALoRA()),
        lambda: LocalNorm(FFALoRA()),
        lambda: Local(FlexLoRA(), LAYER),
        lambda: Local(FRLoRA(), LAYER),
        lambda: Local(FLoRA(), LAYER),
        lambda: Local(RoLoRA(), LAYER),
        lambda: Local(HetLoRA(), LAYER),
        lambda: Local(FedAvg(), ["[AB]/*"]),
        lambda: Local(LocalNorm(RoLoRA()), ["A/*"]),
    ],
    ids=lambda make_rule: make_rule().name,
)
def test_every_promise_is_kept(make_rule):
    check_aggregator(make_rule, examples=3)


def played(rule, rounds):
    federation = Federation(rule, CASE)
    return federation, [federation.play() for _ in range(rounds)]


def test_keeping_all_of_b_is_fedsa_to_the_bit():
    _, ours = played(Local(FedAvg(), ["B/*"]), 3)
    _, theirs = played(FedSALoRA(), 3)
    for one, other in zip(ours, theirs, strict=True):
        assert bits(one.after) == bits(other.after)
        assert bits([turn.model for turn in one.turns]) == bits([t.model for t in other.turns])
    assert Local(FedAvg(), ["B/*"]).shared(ROUND) == FedSALoRA().shared(ROUND)


def test_the_rest_is_averaged_and_nothing_else_travels():
    rule, server, weights = Local(FedAvg(), [f"other/{HEAD}", "[AB]/text.fc1"]), fresh(), [2, 6]
    trained = [adapter(1), adapter(2)]
    updates = play(rule, server, trained, weights)
    rest = ["A/vision.fc1", "B/vision.fc1", "other/logit_scale"]
    for update in updates:
        assert names(update.payload) == rest
        assert update.nbytes == 4 * (2 * 5 + 6 * 2 + 1)
    down = rule.distribute(server, Client(0, 1), ROUND)
    assert names(down) == rest
    assert down.nbytes == updates[0].nbytes
    after, before = dict(rule.aggregate(server, updates, ROUND).tensors()), dict(server.tensors())
    for name, tensor in after.items():
        if name in rest:
            want = mean([dict(state.tensors())[name] for state in trained], weights)
            np.testing.assert_allclose(tensor.numpy(), want, rtol=1e-6)
        else:
            assert torch.equal(tensor, before[name]), name
    assert names(rule.stays(trained[0], ROUND)) == ["A/text.fc1", "B/text.fc1", f"other/{HEAD}"]


@pytest.mark.parametrize("inner", [FedAvg, FedExLoRA, FlexLoRA, FLoRA, FRLoRA, RoLoRA])
def test_a_client_that_has_not_played_starts_from_the_start(inner):
    federation = Federation(Local(inner(), LAYER), CASE)
    start, old, new = CASE.start(), *CASE.clients[:2]
    for _ in range(3):
        turn = federation.turn(old)
        federation.commit(federation.average([turn]), [turn])
    seen = {}
    for client in (old, new):
        federation.turn(client, lambda state, who: seen.setdefault(who.id, state))
    kept = ["A/layer1", "B/layer1", "other/classifier.weight"]
    first, went_on, began = (dict(s.tensors()) for s in (start, seen[old.id], seen[new.id]))
    for name in kept:
        assert torch.equal(began[name], first[name]), name
        assert not torch.equal(went_on[name], first[name]), name
        assert torch.equal(dict(turn.model.tensors())[name], went_on[name]), name
    assert not torch.equal(began["other/norm.weight"], first["other/norm.weight"])


def test_the_rule_sees_nothing_of_what_stays():
    seen = set()

    class Looks(FedAvg):
        def aggregate(self, server, updates, rnd):
            updates = list(updates)
            for state in (server, *(u.sent for u in updates), *(u.payload for u in updates)):
                seen.update(names(state))
            return super().aggregate(server, updates, rnd)

    rule, server = Local(Looks(), ["[AB]/text.fc1"]), fresh()
    rule.aggregate(server, play(rule, server, [adapter(1)], [1]), ROUND)
    assert seen == {"A/vision.fc1", "B/vision.fc1", f"other/{HEAD}", "other/logit_scale"}


def test_a_part_may_be_shared_and_private():
    rule = LocalHead(RoLoRA())
    odd = replace(ROUND, idx=1)
    assert rule.shared(ROUND) == rule.private(ROUND) == {"B", "other"}
    assert rule.shared(odd) == rule.private(odd) == {"A", "other"}
    assert Local(FedSALoRA(), ["other/bias"]).private(ROUND) == {"B", "other"}
    assert Local(FedAvg(), ["*/*"]).private(ROUND) == PARTS


NORMS = [
    "vision_model.encoder.layers.0.layer_norm1.weight",
    "vision_model.pre_layrnorm.bias",
    "vision_model.post_layernorm.weight",
    "encoder.LayerNorm.bias",
    "bn1.weight",
    "layer1.0.bn2.bias",
    "layer1.0.downsample.1.running_var",
    "stem.1.num_batches_tracked",
    "running_mean",
    "visual.ln_pre.weight",
    "ln_final.bias",
]
HEADS = ["classifier.weight", "classifier.bias"]
OTHERS = ["logit_scale", "blocks.0.fc1.bias", "my_classifier.weight", "my_bn.weight", "kiln_a.bias"]


@pytest.mark.parametrize(("rule", "kept"), [(LocalHead(), HEADS), (LocalNorm(), NORMS)])
def test_names_are_known(rule, kept):
    every = {name: torch.zeros(1) for name in HEADS + NORMS + OTHERS}
    trained = AdapterState(A=every, B=every, other=every)
    assert [*rule.stays(trained, ROUND).other] == kept
    assert not rule.stays(trained, ROUND).A


def test_an_adapted_head_stays_too():
    factors = {"classifier": torch.zeros(2), "vision.fc1": torch.zeros(2)}
    got = LocalHead().stays(AdapterState(A=factors, B=factors), ROUND)
    assert names(got) == ["A/classifier", "B/classifier"]


@pytest.mark.parametrize(
    ("make_rule", "said"),
    [
        (lambda: Local(FedAvg()), "Local needs aggregator.keep: patterns of the tensors that "),
        (lambda: Local(FedAvg(), []), "Local needs aggregator.keep: "),
        (lambda: Local(FedAvg(), ["classifier.*"]), "'classifier.*', which is of no part of an"),
        (lambda: Local(FedAvg(), ["other/a", "C/b"]), "'C/b', which is of no part of an adapter"),
        (
            lambda: Local(FFALoRA(), ["other/no", "A/none"]),
            "Local(FFALoRA) keeps nothing: no tensor of the adapter is named other/no or A/none, "
            "the last one is other/logit_scale. Correct aggregator.keep, or leave Local out.",
        ),
        (
            LocalHead,
            "LocalHead(FedAvg) keeps the classifier with its client, but none is trained here. Set "
            "model.head=linear, or name what stays: Local with aggregator.keep.",
        ),
        (
            LocalNorm,
            "LocalNorm(FedAvg) keeps normalisation layers with their client, but none is trained "
            "here. Set model.lora.train_norm=true, or name what stays: Local with aggregator.keep.",
        ),
        (
            lambda: Local(FFALoRA(), ["B/*", "other/*"]),
            "Local(FFALoRA) keeps all that FFALoRA shares, so that nothing is averaged. Use "
            "LocalOnly for that, or keep less.",
        ),
        (lambda: Local(LocalOnly(), ["B/*"]), "keeps all that LocalOnly shares"),
        (
            lambda: Local(FlexLoRA(), ["B/text.*"]),
            "Local(FlexLoRA) keeps one factor of text.fc1, but FlexLoRA needs both to average "
            "either. Keep A/text.fc1 and B/text.fc1, or neither.",
        ),
        (lambda: Local(FedRotLoRA(), ["A/*"]), "keeps one factor of vision.fc1, but FedRotLoRA"),
    ],
)
def test_what_cannot_be_is_refused(make_rule, said):
    with pytest.raises(FedloraError) as caught:
        make_rule().start(fresh(), {}, ROUND)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "rule",
    [
        Local(RoLoRA(), ["B/*", "other/*"]),  # A is shared in odd rounds
        Local(FedAvgM(FFALoRA()), ["B/text.fc1"]),
        Local(FedSALoRA(), ["A/text.fc1"]),
    ],
    ids=lambda rule: rule.name,
)
def test_what_can_be_is_not_refused(rule):
    server = fresh()
    assert bits(rule.start(server, {}, ROUND)) == bits(server)


def test_updates_stream():
    rule, server = Local(FedAvg(), [f"other/{HEAD}"]), fresh()
    seen, alive = [], []

    def stream():
        for number in range(5):
            [update] = play(rule, server, [adapter(number)], [1])
            seen.append(weakref.ref(update.payload.A["text.fc1"]))
            yield update
            del update
            alive.append(sum(ref() is not None for ref in seen))

    rule.aggregate(server, stream(), ROUND)
    assert max(alive) <= 1
