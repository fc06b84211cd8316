from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.aggregation import FedSALoRA
from fedlora.callbacks.base import FederatedCallback
from fedlora.callbacks.progress import Progress
from fedlora.modules.report import readable
from tests.padded_mean import PaddedMean
from tests.runs import fit, make_data, make_model, make_trainer


def test_plain_lines_are_one_a_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(tmp_path, max_rounds=2, progress="plain")
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split("  ")[0] for line in lines if line.startswith("round ")]
    assert starts == ["round 0/2", "round 1/2", "round 2/2"]
    said = "\n".join(lines)
    for shown in ("tiny-clip", "FedAvg", "down in round 0", "3 a round", "zero-shot", "test/acc"):
        assert shown in said
    last = trainer.server.history[-1]
    for label, name in (
        ("agg error", "agg/error"),
        ("rank", "agg/effective_rank"),
        ("drift", "clients/drift_max"),
    ):
        assert f"  {label} {last[name]:.4f}  " in said
        assert f"  {label} " not in lines[starts_at(lines, "round 0/2")]
    log = (trainer.run.path / "fedlora.log").read_text()
    assert "round 2/2" in log


def starts_at(lines: list[str], start: str) -> int:
    return next(number for number, line in enumerate(lines) if line.startswith(start))


def test_a_personal_rule_has_no_figures_of_the_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, FedSALoRA(), max_rounds=1, limit_train_batches=1, progress="plain")
    lines = capsys.readouterr().out.splitlines()
    line = lines[starts_at(lines, "round 1/1")]
    assert "train loss" in line
    assert not any(label in line for label in ("agg error", "rank", "drift"))


@pytest.mark.parametrize(("ranks", "said"), [([1, 2, 4], True), (None, False), (2, False)])
def test_the_start_table_tells_unequal_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: list[int] | int | None, said: bool
) -> None:
    settings = {"max_rounds": 1, "limit_train_batches": 1, "progress": "plain"}
    fit(tmp_path, PaddedMean(), client_ranks=ranks, **settings)
    # the cell of a table is broken over lines
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert ("of rank 1 to 4" in out) == said


def test_the_start_table_counts_what_is_trained_and_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, max_rounds=1, progress="plain")
    out = capsys.readouterr().out
    # r 4 on fc1 and fc2 of 4 blocks of (128, 512), and a head of 10 x 64 + 10, four bytes each.
    trained = 4 * 2 * 4 * (128 + 512) + 650
    assert f"{trained:,}" in out
    assert readable(4 * trained) in out


def test_the_live_display_shows_round_client_and_step(tmp_path: Path) -> None:
    text = io.StringIO()

    progress = Progress("rich")
    progress._console = Console(file=text, force_terminal=True, width=120, highlight=False)
    trainer = make_trainer(tmp_path, max_rounds=2)
    trainer.hooks.callbacks[-1] = trainer.progress = progress
    trainer.fit(make_model(), make_data())
    shown = text.getvalue()
    for part in ("rounds", "clients", "steps", "client 2", "1/2", "round 2/2"):
        assert part in shown
    assert progress._bar is None  # closed


def test_the_display_is_closed_after_an_error(tmp_path: Path) -> None:
    class Fails(FederatedCallback):
        def on_client_end(self, trainer, pl_module, update) -> None:
            raise RuntimeError("no")

    trainer = make_trainer(tmp_path, callbacks=[Fails()])
    progress = Progress("rich")
    progress._console = Console(file=io.StringIO(), force_terminal=True)
    trainer.hooks.callbacks[-1] = trainer.progress = progress
    with pytest.raises(RuntimeError, match="no"):
        trainer.fit(make_model(), make_data())
    assert progress._bar is None
