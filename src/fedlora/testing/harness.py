"""The public harness: every check over federations that hypothesis draws."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from fedlora.aggregation.base import Aggregator
from fedlora.errors import DependencyError, FedloraError
from fedlora.sampling import derive_seed
from fedlora.testing import averages, contract, memory, travel
from fedlora.testing.cases import Case, cases
from fedlora.testing.compare import PromiseError
from fedlora.testing.federation import Trial

Check = Callable[[Trial], None]
# In this order: what a later check finds wrong may have its cause in an earlier one.
CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "parts": contract.parts,
        "result": contract.result,
        "arguments": contract.arguments,
        "payload": travel.payload,
        "distribution": travel.distribution,
        "commit": memory.commit,
        "interruption": memory.interruption,
        "saved state": memory.saved_state,
        "no weight": averages.no_weight,
        "order": averages.order,
        "scale": averages.scale,
        "one client": averages.one_client,
        "equal clients": averages.equal_clients,
        "exact": averages.exact,
        "ranks": contract.ranks,
    }
)


def check_aggregator(
    make_rule: Callable[[], Aggregator],
    *,
    examples: int = 10,
    skip: Collection[str] = (),
) -> None:
    """Check that a rule keeps every promise of :class:`~fedlora.aggregation.Aggregator`.

    Each check is tried on small federations that hypothesis draws: 1 to 6 clients with 0 to 1000
    samples, 1 or 2 layers of 1 to 8 features, ranks of 1 to 4 (so also above a dimension), float32
    and float64, after 0 to 3 rounds that some clients missed; clients differ in rank and scale
    where the rule has ``mixed_ranks``. The examples are the same in every run, and nothing is
    written. The checks:

    - ``parts``: ``shared`` is in ``trainable``, and both name parts.
    - ``result``: names, shapes, type and scaling of the server; finite, also if nobody trained.
    - ``arguments``: no method edits what it is given, nor ``upload`` the rule.
    - ``payload``: exactly the shared parts leave a client, at its rank and without what ``stays``;
      what else it trained does stay, in a part that is ``private``.
    - ``distribution``: a client gets to the server's adapter with what it is sent and what it had,
      to the bit, also after rounds that it missed.
    - ``commit``: ``state_dict()`` does not change before the last update was read.
    - ``interruption``: a stream that raises leaves the rule as it was.
    - ``saved state``: a new rule with the saved state goes on to the bit.
    - ``no weight``: clients of weight zero change no bit; without any weight nothing changes.
    - ``order``: that of the clients does not matter.
    - ``scale``: s_k counts: three times as much with a third of B_k is the same.
    - ``one client``: it is served as it is.
    - ``equal clients``: they are served as they are.
    - ``exact``: where promised, ``sum_k p_k (R_k + s_k B_k A_k)`` to 1e-5 in float32 and 1e-12 in
      float64.
    - ``ranks``: all are averaged, or without ``mixed_ranks`` refused with a FedloraError.

    Rules with parts that stay at the clients are judged by what is shared. The adapter's layers are
    ``layer0`` and perhaps ``layer1``; beside them there are ``classifier.weight``, ``norm.weight``
    and ``logit_scale``. Wrappers are checked with a rule in them, as in the second example.

    Args:
        make_rule: makes a fresh rule; a class is one.
        examples: federations for each check.
        skip: names of checks that this rule fails by design.

    Raises:
        AssertionError: naming the check, the rule and the smallest federation found that fails it.
        FedloraError: when hypothesis is missing, or for an argument that cannot be.

    Example:
        >>> from fedlora.aggregation import FedAvg
        >>> check_aggregator(FedAvg, examples=2)
        >>> from fedlora.aggregation import FFALoRA, LocalHead
        >>> check_aggregator(lambda: LocalHead(FFALoRA()), examples=2)
    """
    one = _made(make_rule)
    unknown = sorted(set(skip) - CHECKS.keys())
    if unknown:
        raise FedloraError(
            f"there is no check {unknown[0]!r} to skip. Choose from {', '.join(CHECKS)}."
        )
    if examples < 1:
        raise FedloraError(f"examples must be 1 or more, got {examples}.")

    def trial(case: Case) -> Trial:
        return Trial(make_rule, case)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for matrices this small more would only wait for each other
    try:
        for title in [title for title in CHECKS if title not in skip]:
            failed = _search(title, trial, one.mixed_ranks, examples)
            if failed:
                raise AssertionError(
                    f"{one.name} fails {title!r}: {failed.said}. Example: {failed.case}"
                ) from failed.cause
    finally:
        torch.set_num_threads(threads)


def _made(make_rule: Callable[[], Aggregator]) -> Aggregator:
    """A rule; refuses what does not make a fresh one."""
    one, other = (make_rule() if callable(make_rule) else None for _ in range(2))
    if not isinstance(one, Aggregator) or one is other:
        raise FedloraError(
            "check_aggregator needs a callable that makes a fresh Aggregator each time, such as "
            "its class or 'lambda: MyRule(beta=2)'."
        )
    return one


@dataclass(frozen=True)
class _Failure:
    case: Case
    error: Exception

    @property
    def said(self) -> str:
        """What is wrong, in one line; an error of the rule's own with its type."""
        raised = f"it raised {type(self.error).__name__}: " if self.cause else ""
        return " ".join(f"{raised}{self.error}".split()).rstrip(".")

    @property
    def cause(self) -> Exception | None:
        """The error where it is the rule's own."""
        return None if isinstance(self.error, PromiseError) else self.error


def _search(
    title: str, trial: Callable[[Case], Trial], mixed: bool, examples: int
) -> _Failure | None:
    """The smallest federation found that fails a check."""
    try:
        import hypothesis
    except ImportError as error:
        raise DependencyError(
            "check_aggregator needs hypothesis and finds none. Run: pip install hypothesis"
        ) from error
    failures: list[_Failure] = []

    @hypothesis.seed(derive_seed("check_aggregator", title))
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=tuple(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(case=cases(mixed))
    def run(case: Case) -> None:
        try:
            CHECKS[title](trial(case))
        except Exception as error:
            failures.append(_Failure(case, error))
            raise

    try:
        run()
    except Exception:  # a failure that was kept is told by the caller, with its example
        if not failures:  # not the rule's
            raise
    return failures[-1] if failures else None  # the last tried is the smallest
