"""Some tensors stay with their client: a head of its own, normalisation layers of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor

from fedlora.aggregation.base import Aggregator, WeightedMean, turns
from fedlora.aggregation.wrappers.base import Wrapper
from fedlora.errors import FedloraError
from fedlora.state import PARTS, AdapterState, Client, ClientUpdate, Part, Round


class Local(Wrapper):
    """What is named stays with its client; the rule sees, sends and averages the rest.

    A kept tensor is never in what leaves a client nor in what is sent to it. The server's own stays
    the one that the run started from, to the bit, and a client that has not played starts from it.
    The rule works as if what is kept were not adapted at all: ``exact`` is about the rest, and
    where a factor is kept ``agg/error`` is empty.

    Args:
        rule: what averages the rest; None means FedAvg.
        keep: patterns of names, as of :mod:`fnmatch`, that begin with their part: ``A/classifier``,
            ``B/vision_model.*``, ``other/*bias``. Of a layer keep both factors or none, but around
            a rule that is a plain mean.

    Raises:
        FedloraError: for no pattern, and for one of no part. :meth:`start` refuses patterns that
            keep nothing, everything, or one factor of a layer where the rule needs both.
    """

    def __init__(self, rule: Aggregator | None = None, keep: list[str] | None = None) -> None:
        super().__init__(rule)
        if not keep:
            raise FedloraError(
                f"{type(self).__name__} needs aggregator.keep: patterns of the tensors that stay "
                "with their client, such as '[other/classifier.*]'."
            )
        self.keep = list(keep)
        self._patterns = [tuple(pattern.split("/", 1)) for pattern in keep]
        for pattern, of in zip(keep, self._patterns, strict=True):
            if len(of) < 2 or not any(fnmatchcase(part, of[0]) for part in PARTS):
                raise FedloraError(
                    f"aggregator.keep has {pattern!r}, which is of no part of an adapter. Let it "
                    "begin with A/, B/ or other/, as in other/classifier.*."
                )

    def start(self, server: AdapterState, base: Mapping[str, Tensor], rnd: Round) -> AdapterState:
        """As the rule starts with what is shared.

        Raises:
            FedloraError: where nothing would be kept or nothing shared, or of a layer one factor,
                under a rule that does not average each tensor apart.
        """
        names = [name for name, _ in server.tensors()]
        kept = {name for name in names if self._keeps(name)}
        if not kept:
            raise FedloraError(self._nothing(names))
        shared = {part for now in turns(rnd) for part in self.rule.shared(now)}
        if kept >= {name for name in names if name.split("/", 1)[0] in shared}:
            raise FedloraError(
                f"{self.name} keeps all that {self.rule.name} shares, so that nothing is averaged. "
                "Use LocalOnly for that, or keep less."
            )
        halves = [n for n in server.A if len({f"A/{n}", f"B/{n}"} & kept) == 1]
        if halves and not _is_plain(self.rule):
            raise FedloraError(
                f"{self.name} keeps one factor of {halves[0]}, but {self.rule.name} needs both to "
                f"average either. Keep A/{halves[0]} and B/{halves[0]}, or neither."
            )
        return _beside(self.rule.start(self._seen(server), base, rnd), server)

    def distribute(self, server: AdapterState, client: Client, rnd: Round) -> AdapterState:
        """What the rule sends of the rest."""
        return self.rule.distribute(self._seen(server), client, rnd)

    def receive(self, had: AdapterState, down: AdapterState, rnd: Round) -> AdapterState:
        """What the rule makes of the rest, and of what is kept what the run started from."""
        return _beside(self.rule.receive(self._seen(had), down, rnd), had)

    def shared(self, rnd: Round) -> frozenset[Part]:
        """The rule's parts, without those that are kept whole (``B/*``)."""
        return self.rule.shared(rnd) - {
            part for part in PARTS for of in self._patterns if of[1] == "*" and _is_in(part, of)
        }

    def private(self, rnd: Round) -> frozenset[Part]:
        """The rule's own, and the parts that a pattern is of: a part may be shared as well."""
        named = {part for part in PARTS if any(_is_in(part, of) for of in self._patterns)}
        return self.rule.private(rnd) | (self.trainable(rnd) & named)

    def stays(self, trained: AdapterState, rnd: Round) -> AdapterState:
        """What the patterns name of all that was trained, and what else the rule keeps."""
        kept = {name: tensor for name, tensor in trained.tensors() if self._keeps(name)}
        theirs = self.rule.stays(self._seen(trained), rnd)
        return replace(AdapterState.from_tensors(kept).over(theirs), scaling=trained.scaling)

    def upload(
        self, sent: AdapterState, trained: AdapterState, client: Client, rnd: Round
    ) -> AdapterState:
        """What the rule sends of the rest."""
        return self.rule.upload(self._seen(sent), self._seen(trained), client, rnd)

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """What the rule makes of the rest; of what is kept the server's, as it is."""
        rest = self.rule.aggregate(self._seen(server), map(self._seen_of, updates), rnd)
        return _beside(rest, server)

    def _seen_of(self, update: ClientUpdate) -> ClientUpdate:
        return replace(update, sent=self._seen(update.sent), payload=self._seen(update.payload))

    def _seen(self, state: AdapterState) -> AdapterState:
        """What the rule sees of an adapter: what is not kept."""
        rest = {name: tensor for name, tensor in state.tensors() if not self._keeps(name)}
        return replace(
            AdapterState.from_tensors(rest),
            scaling=state.scaling,
            residual=state.residual,
            added=state.added,
        )

    def _keeps(self, name: str) -> bool:
        part, path = name.split("/", 1)
        return any(_is_in(part, of) and fnmatchcase(path, of[1]) for of in self._patterns)

    def _nothing(self, names: list[str]) -> str:
        """Why nothing is kept and what to do."""
        example = names[-1] if names else "none"
        return (
            f"{self.name} keeps nothing: no tensor of the adapter is named {' or '.join(self.keep)}"
            f", the last one is {example}. Correct aggregator.keep, or leave {type(self).__name__} "
            "out."
        )


class LocalHead(Local):
    """The classifier stays with its client, adapted or whole; the encoders' adapter is shared.

    As FedPer for the head (Arivazhagan et al., "Federated Learning with Personalization Layers",
    2019, arXiv 1912.00818). Kept are ``classifier``'s weight and bias and, where it is adapted, its
    factors; biases, normalisation layers and the logit scale are shared as before. A model of your
    own whose head has another name: :class:`Local` with ``keep=["other/my_head.*"]``.

    Args:
        rule: what averages the rest; None means FedAvg.
    """

    def __init__(self, rule: Aggregator | None = None) -> None:
        super().__init__(rule, ["other/classifier.*", "A/classifier", "B/classifier"])

    def _nothing(self, names: list[str]) -> str:
        return (
            f"{self.name} keeps the classifier with its client, but none is trained here. Set "
            "model.head=linear, or name what stays: Local with aggregator.keep."
        )


class LocalNorm(Local):
    """Normalisation layers stay with their client, with their running statistics.

    As FedBN does for batch normalisation (Li et al., "FedBN: Federated Learning on Non-IID Features
    via Local Batch Normalization", ICLR 2021, arXiv 2102.07623), where clients differ in what their
    pictures look like. Layers are known by their names: what has ``norm``, ``bn`` or ``ln_`` in it
    as CLIP's ``layer_norm1`` and ``pre_layrnorm``, and running statistics.

    Args:
        rule: what averages the rest; None means FedAvg.
    """

    def __init__(self, rule: Aggregator | None = None) -> None:
        layers = ["*[nN]orm*", "bn*", "*.bn*", "ln_*", "*.ln_*"]
        statistics = ["*running_mean", "*running_var", "*num_batches_tracked"]
        super().__init__(rule, [f"other/{pattern}" for pattern in layers + statistics])

    def _nothing(self, names: list[str]) -> str:
        return (
            f"{self.name} keeps normalisation layers with their client, but none is trained here. "
            "Set model.lora.train_norm=true, or name what stays: Local with aggregator.keep."
        )


def _is_in(part: str, of: tuple[str, ...]) -> bool:
    return fnmatchcase(part, of[0])


def _beside(rest: AdapterState, whole: AdapterState) -> AdapterState:
    """``rest`` with what only ``whole`` has: what the rule did not see."""
    return replace(rest.over(whole), residual=rest.residual, added=rest.added)


def _is_plain(rule: Aggregator) -> bool:
    """Whether a rule sends each tensor as it is and averages it apart."""
    while isinstance(rule, Wrapper):
        rule = rule.rule
    kind = type(rule)
    return kind.aggregate is WeightedMean.aggregate and kind.upload is Aggregator.upload
