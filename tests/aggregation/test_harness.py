from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from fedlora.aggregation import (
    RULES,
    FedAvg,
    FedAvgM,
    FedExLoRA,
    FedSALoRA,
    FedSVD,
    FFALoRA,
    FlexLoRA,
    HetLoRA,
    RoLoRA,
    WeightedMean,
)
from fedlora.state import AdapterState, Residual
from fedlora.testing import CHECKS, check_aggregator

EXAMPLES = {"FedRPCA": 4}  # it iterates: the others take half as long with ten


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_its_promises(name):
    check_aggregator(RULES[name], examples=EXAMPLES.get(name, 10))


def times(state, factor, parts=("A", "B", "other")):
    """A state with each tensor of some parts multiplied, in new tensors."""
    return replace(
        state,
        **{part: {n: t * factor for n, t in state.part(part).items()} for part in parts},
    )


# What follows are rules with one fault each, and the check that must say so.


class SharesWhatItDoesNotTrain(FFALoRA):
    def shared(self, rnd):
        return frozenset({"A", "B", "other"})


class TrainsWhatThereIsNot(FedAvg):
    def trainable(self, rnd):
        return frozenset({"A", "B", "head"})


class CutsToTheSmallestRank(FedAvg):
    def aggregate(self, server, updates, rnd):
        kept = list(updates)
        least = min((min(u.payload.ranks.values()) for u in kept), default=0)
        kept = [
            replace(u, payload=u.payload.cut(least).padded(server.ranks))
            if max(u.payload.ranks.values()) != least
            else replace(u, payload=u.payload.padded(server.ranks))
            for u in kept
        ]
        return super().aggregate(server, kept, rnd)


class PromisesEveryRank(FedAvg):
    mixed_ranks = True


class CrashesOnOtherRanks(FedAvg):
    def aggregate(self, server, updates, rnd):
        kept = list(updates)
        for update in kept:
            for name, tensor in update.payload.tensors():
                if tensor.shape != dict(server.tensors())[name].shape:
                    raise RuntimeError("shapes differ")
        return super().aggregate(server, kept, rnd)


class GivesAnotherRank(FlexLoRA):
    def aggregate(self, server, updates, rnd):
        return super().aggregate(server, updates, rnd).cut(1)


class EditsTheServer(FedAvg):
    def aggregate(self, server, updates, rnd):
        after = super().aggregate(server, updates, rnd)
        for A in server.A.values():
            A.mul_(0.5)
        return after


class EditsAnUpdate(FedAvg):
    def aggregate(self, server, updates, rnd):
        def doubled():
            for update in updates:
                for B in update.payload.B.values():
                    B.mul_(2)
                yield update

        return super().aggregate(server, doubled(), rnd)


class EditsWhatWasTrained(FedAvg):
    def upload(self, sent, trained, client, rnd):
        for B in trained.B.values():
            B.add_(1)
        return super().upload(sent, trained, client, rnd)


class RemembersWhatWasTrained(FedSALoRA):
    def __init__(self):
        self.seen = {}

    def upload(self, sent, trained, client, rnd):
        self.seen = dict(trained.B)
        return super().upload(sent, trained, client, rnd)


class EditsWhatItDistributes(FedAvg):
    def distribute(self, server, client, rnd):
        server.other["logit_scale"].add_(1)
        return super().distribute(server, client, rnd)


class EditsTheBase(FedAvg):
    def start(self, server, base, rnd):
        for weight in base.values():
            weight.zero_()
        return server


class GivesFloat64(FedAvg):
    def aggregate(self, server, updates, rnd):
        after = super().aggregate(server, updates, rnd)
        return replace(after, A={name: A.double() for name, A in after.A.items()})


class LosesTheHead(FedAvg):
    def aggregate(self, server, updates, rnd):
        return replace(super().aggregate(server, updates, rnd), other={})


class TransposesTheResidual(FedExLoRA):
    def aggregate(self, server, updates, rnd):
        after = super().aggregate(server, updates, rnd)
        residual = {name: Residual(r.dense().T) for name, r in after.residual.items()}
        return replace(after, residual=residual)


class GivesAResidualInFloat64(FedExLoRA):
    def aggregate(self, server, updates, rnd):
        after = super().aggregate(server, updates, rnd)
        residual = {name: r.to(torch.float64) for name, r in after.residual.items()}
        return replace(after, residual=residual)


class AddsInfinity(FedExLoRA):
    def aggregate(self, server, updates, rnd):
        after = super().aggregate(server, updates, rnd)
        added = {name: Residual(r.dense() / 0) for name, r in after.added.items()}
        return replace(after, added=added)


class TakesOverTheClientsScaling(HetLoRA):
    def aggregate(self, server, updates, rnd):
        kept = list(updates)
        after = super().aggregate(server, kept, rnd)
        return replace(after, scaling=kept[0].payload.scaling if kept else after.scaling)


class DividesByZero(FedAvg):
    def aggregate(self, server, updates, rnd):
        kept = list(updates)
        after = super().aggregate(server, kept, rnd)
        moved = sum((after.B[name] - server.B[name]).norm() for name in server.B)
        return times(after, moved / moved) if any(u.weight for u in kept) else after


class SendsWhatIsPrivate(FedSALoRA):
    def upload(self, sent, trained, client, rnd):
        return trained


class KeepsTheHead(FedAvg):
    def upload(self, sent, trained, client, rnd):
        return trained.only({"A", "B"})


class SendsHalves(FedAvg):
    def upload(self, sent, trained, client, rnd):
        up = super().upload(sent, trained, client, rnd)
        return replace(up, B={name: B.bfloat16() for name, B in up.B.items()})

    def aggregate(self, server, updates, rnd):
        after = super().aggregate(server, updates, rnd)
        return replace(after, B={n: B.to(server.B[n].dtype) for n, B in after.B.items()})


class SendsTheResidual(FedExLoRA):
    def upload(self, sent, trained, client, rnd):
        return replace(super().upload(sent, trained, client, rnd), residual=sent.residual)


class SendsAnotherScaling(FlexLoRA):
    def upload(self, sent, trained, client, rnd):
        return super().upload(sent, trained, client, rnd).cut(0, scale=2.0)


class SendsPaddedFactors(FlexLoRA):
    def upload(self, sent, trained, client, rnd):
        return super().upload(sent, trained, client, rnd).padded(dict.fromkeys(trained.A, 4))


class KeepsItsHead(FedAvg):
    """The head stays, though "other" is shared: right in itself."""

    def private(self, rnd):
        return frozenset({"other"})

    def stays(self, trained, rnd):
        return AdapterState(other={n: t for n, t in trained.other.items() if n[:4] == "clas"})

    def upload(self, sent, trained, client, rnd):
        kept = self.stays(trained, rnd).other
        return replace(trained, other={n: t for n, t in trained.other.items() if n not in kept})


class SendsWhatStays(KeepsItsHead):
    def upload(self, sent, trained, client, rnd):
        return trained


class KeepsWhatIsNotPrivate(KeepsItsHead):
    def private(self, rnd):
        return frozenset({"B"})


class KeepsAnother(KeepsItsHead):
    def stays(self, trained, rnd):
        return times(super().stays(trained, rnd), 2)


class LosesWhatIsNotShared(FedSALoRA):
    def stays(self, trained, rnd):
        return AdapterState()


class SendsTheLastFactorOnly(RoLoRA):
    def distribute(self, server, client, rnd):
        return WeightedMean.distribute(self, server, client, rnd)


class NeverSendsTheNewA(FedSVD):
    def distribute(self, server, client, rnd):
        return server.only({"B", "other"})


class SendsOnlyWhatWasAdded(FedExLoRA):
    def distribute(self, server, client, rnd):
        return replace(server.only({"A", "B", "other"}), added=server.added)


class SendsNoResidual(FedExLoRA):
    def distribute(self, server, client, rnd):
        return server.only({"A", "B", "other"})


class SendsAllSlots(HetLoRA):
    def distribute(self, server, client, rnd):
        return server


class Counts(FedAvg):
    """A state of its own, right in itself: rounds with weight."""

    def __init__(self):
        self.rounds = 0

    def aggregate(self, server, updates, rnd):
        kept = [update for update in updates if update.weight]
        after = super().aggregate(server, kept, rnd)
        self.rounds += bool(kept)
        return after

    def state_dict(self):
        return {"rounds": self.rounds}

    def load_state_dict(self, state):
        self.rounds = state["rounds"]


class CommitsEarly(Counts):
    def aggregate(self, server, updates, rnd):
        def counted():
            for update in updates:
                self.rounds += 1
                yield update

        return super().aggregate(server, counted(), rnd)


class LeavesARest(FedAvg):
    def __init__(self):
        self.kept = []

    def aggregate(self, server, updates, rnd):
        self.kept.extend(updates)
        after = super().aggregate(server, self.kept, rnd)
        self.kept = []
        return after


class LeavesARestOutOfSight(FedAvg):
    def __init__(self):
        self.kept = deque()

    def aggregate(self, server, updates, rnd):
        self.kept.extend(updates)
        after = super().aggregate(server, self.kept, rnd)
        self.kept.clear()
        return after


class HidesErrors(FedAvg):
    def aggregate(self, server, updates, rnd):
        kept = []
        with suppress(BaseException):
            kept.extend(updates)
        return super().aggregate(server, kept, rnd)


class Momentum(FedAvg):
    """B goes on as it went; its velocity is not saved."""

    def __init__(self):
        self.velocity = {}

    def aggregate(self, server, updates, rnd):
        kept = [update for update in updates if update.weight]
        if not kept:
            return server
        mean = super().aggregate(server, kept, rnd)
        old = self.velocity
        self.velocity = {n: B - server.B[n] + old.get(n, 0 * B) for n, B in mean.B.items()}
        return replace(mean, B={n: server.B[n] + v for n, v in self.velocity.items()})


class SavesObjects(Counts):
    def state_dict(self):
        return {"rounds": Residual(torch.zeros(1))}


class LoadsNothing(Counts):
    def load_state_dict(self, state):
        pass


class CountsEveryone(FedAvg):
    def aggregate(self, server, updates, rnd):
        return super().aggregate(server, (replace(u, weight=1.0) for u in updates), rnd)


class CountsIdleClients(Counts):
    def aggregate(self, server, updates, rnd):
        kept = list(updates)
        after = super().aggregate(server, kept, rnd)
        self.rounds += len(kept)
        return after


class ForgetsWithoutWeight(FedAvg):
    def aggregate(self, server, updates, rnd):
        kept = [update for update in updates if update.weight]
        return super().aggregate(server, kept, rnd) if kept else times(server, 0)


class TakesTheFirst(FedAvg):
    def aggregate(self, server, updates, rnd):
        kept = [update for update in updates if update.weight]
        mean = super().aggregate(server, kept, rnd)
        return replace(mean, other=kept[0].adapter.other) if kept else mean


class SwapsWeights(FedAvg):
    def aggregate(self, server, updates, rnd):
        kept = [update for update in updates if update.weight]
        weights = [update.weight for update in kept][::-1]
        swapped = [replace(u, weight=w) for u, w in zip(kept, weights, strict=True)]
        return super().aggregate(server, swapped, rnd)


class ForgetsTheScaling(HetLoRA):
    def __init__(self):
        super().__init__("samples")

    def aggregate(self, server, updates, rnd):
        def unscaled():
            for update in updates:
                payload = replace(update.payload, scaling=server.scaling)
                yield replace(update, payload=payload)

        return super().aggregate(server, unscaled(), rnd)


class GoesHalfWay(FedAvg):
    def aggregate(self, server, updates, rnd):
        mean = super().aggregate(server, updates, rnd)
        B = {name: (server.B[name] + B) / 2 for name, B in mean.B.items()}
        return replace(mean, B=B)


class LeavesTheHead(FedAvg):
    def aggregate(self, server, updates, rnd):
        return replace(super().aggregate(server, updates, rnd), other=server.other)


class DoesNotDivideByAll(FedAvg):
    def aggregate(self, server, updates, rnd):
        kept = [update for update in updates if update.weight]
        mean = super().aggregate(server, kept, rnd)
        share = sum(u.weight for u in kept) / max((u.weight for u in kept), default=1)
        return times(mean, share, ["other"]) if kept else mean


class PromisesToBeExact(FedAvg):
    exact = True


class PromisesToBeExactAtRankOne(FedExLoRA):
    def __init__(self):
        super().__init__(residual_rank=1)
        self.exact = True


class ForgetsTheLastResidual(FedExLoRA):
    def aggregate(self, server, updates, rnd):
        after = super().aggregate(server, updates, rnd)
        return replace(after, residual=after.added) if after.added else after


class IsExactToFloat32(FedExLoRA):
    def aggregate(self, server, updates, rnd):
        after = super().aggregate(server, updates, rnd)
        added = {name: c.to(torch.float32).to(c.U.dtype) for name, c in after.added.items()}
        residual = dict(server.residual)
        for name, c in added.items():
            residual[name] = residual[name].add(c) if name in residual else c
        return replace(after, residual=residual, added=added)


FAULTS = {
    "parts": [SharesWhatItDoesNotTrain, TrainsWhatThereIsNot],
    "result": [
        GivesFloat64,
        LosesTheHead,
        TransposesTheResidual,
        GivesAResidualInFloat64,
        AddsInfinity,
        TakesOverTheClientsScaling,
        DividesByZero,
    ],
    "arguments": [
        EditsTheServer,
        EditsAnUpdate,
        EditsWhatWasTrained,
        EditsWhatItDistributes,
        RemembersWhatWasTrained,
        EditsTheBase,
    ],
    "payload": [
        SendsWhatIsPrivate,
        SendsWhatStays,
        KeepsWhatIsNotPrivate,
        KeepsAnother,
        LosesWhatIsNotShared,
        KeepsTheHead,
        SendsHalves,
        SendsTheResidual,
        SendsAnotherScaling,
        SendsPaddedFactors,
    ],
    "distribution": [
        SendsTheLastFactorOnly,
        NeverSendsTheNewA,
        SendsOnlyWhatWasAdded,
        SendsNoResidual,
        SendsAllSlots,
    ],
    "commit": [CommitsEarly],
    "interruption": [LeavesARest, LeavesARestOutOfSight, HidesErrors],
    "saved state": [Momentum, SavesObjects, LoadsNothing],
    "no weight": [CountsEveryone, CountsIdleClients, ForgetsWithoutWeight],
    "order": [TakesTheFirst, SwapsWeights],
    "scale": [ForgetsTheScaling],
    "one client": [ForgetsTheLastResidual, GoesHalfWay, LeavesTheHead],
    "equal clients": [DoesNotDivideByAll],
    "exact": [PromisesToBeExact, PromisesToBeExactAtRankOne, IsExactToFloat32],
    "ranks": [CutsToTheSmallestRank, PromisesEveryRank, CrashesOnOtherRanks, GivesAnotherRank],
}


def test_each_check_has_a_rule_that_fails_it():
    assert list(FAULTS) == list(CHECKS)


@pytest.mark.parametrize(
    ("check", "rule"),
    [(check, rule) for check, rules in FAULTS.items() for rule in rules],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_fault_is_found_by_its_check(check, rule):
    with pytest.raises(AssertionError, match=f"^{rule.__name__} fails '{check}': "):
        # A rule that misjudges ranks shows it in other checks too, which come before.
        check_aggregator(rule, skip=CHECKS.keys() - {"ranks"} if check == "ranks" else ())


@pytest.mark.parametrize("rule", [Counts, KeepsItsHead])
def test_a_rule_that_is_right_in_itself_passes(rule):
    check_aggregator(rule)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (SendsWhatStays, "upload() sends other/classifier.weight in round 0, which stays() keeps"),
        (KeepsWhatIsNotPrivate, "stays() keeps other/classifier.weight in round 0, of a part that"),
        (KeepsAnother, "stays() keeps another other/classifier.weight than was trained in round 0"),
        (LosesWhatIsNotShared, "stays() does not keep B/layer0 in round 0, which is not shared."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_stays_is_told_by_name(rule, said):
    with pytest.raises(AssertionError) as caught:
        check_aggregator(rule)
    assert said in str(caught.value)


def test_a_wrapper_is_named_with_its_rule():
    with pytest.raises(AssertionError, match=r"^FedAvgM\(FedAvg\) fails 'one client': "):
        check_aggregator(lambda: FedAvgM(FedAvg()))
