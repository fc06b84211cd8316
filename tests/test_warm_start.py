"""The adapter that a run leaves behind starts another, to the bit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora import FedloraError, LoRAConfig
from fedlora.aggregation import Aggregator, FedAvg, FedExLoRA
from fedlora.checkpoint import load
from fedlora.main import main
from tests.runs import assert_same_bits, fingerprint, fit, make_model
from tests.test_resume import KillAt, Killed

QUICK = ["--trainer.limit_train_batches=1", "--trainer.logger=false", "--data.num_clients=3"]
HEAD = {"lora": LoRAConfig(r=4, lora_alpha=8, target_components=("encoder", "classifier"))}
RESULTS = ("val/acc", "val/loss")


@pytest.mark.parametrize("rule", [FedAvg, FedExLoRA])
@pytest.mark.parametrize("model", [{}, HEAD, {"head": "text"}], ids=["linear", "lora", "text"])
def test_a_run_goes_on_as_a_new_one(
    rule: type[Aggregator], model: dict[str, Any], tmp_path: Path
) -> None:
    first = fit(tmp_path, rule(), model=model, max_rounds=1)
    saved = load(first.run.checkpoint("last")).server.adapter
    fresh = make_model(adapter=str(first.run.adapter), **model)
    lora = fresh.build(first.datamodule.class_names, first.datamodule.templates)
    state = lora.state()
    for name, tensor in saved.tensors():
        assert torch.equal(tensor, dict(state.tensors())[name]), name
    assert saved.residual.keys() == state.residual.keys()
    assert all(
        torch.equal(r.dense(), state.residual[name].dense()) for name, r in saved.residual.items()
    )
    second = fit(tmp_path, rule(), model={**model, "adapter": str(first.run.adapter)}, max_rounds=1)
    one, two = first.server.history[-1], second.server.history[0]
    assert [one[name] for name in RESULTS] == [two[name] for name in RESULTS]


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start = ["fit", "--config", "clip_lora.yaml", "--trainer.max_rounds=1", *QUICK]
    assert main(start) == 0
    assert main([*start, "--model.adapter=runs/version_0/adapter"]) == 0
    tables = []
    for number in (0, 1):
        with Path(f"runs/version_{number}/metrics.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    assert [tables[0][-1][name] for name in RESULTS] == [tables[1][0][name] for name in RESULTS]
    summaries = [json.loads(Path(f"runs/version_{n}/summary.json").read_text()) for n in (0, 1)]
    assert ["zero_shot" in summary for summary in summaries] == [True, False]
    assert summaries[1]["start"]["val/acc"] == float(tables[1][0]["val/acc"])
    # Its folder may go, and the run be gone on with, judged, and moved to another adapter.
    Path("runs/version_0").rename("elsewhere")
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_rounds=2"]) == 0
    assert main(["test", "--ckpt_path", "last"]) == 0
    more = ["--trainer.max_rounds=3", "--model.adapter=null"]
    assert main(["fit", "--ckpt_path", "last", *more]) == 0


def test_an_adapter_alone_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "clip_lora.yaml", "--trainer.max_rounds=1", *QUICK]) == 0
    adapter = "--model.adapter=runs/version_0/adapter"
    assert main(["validate", "--config", "clip_lora.yaml", *QUICK, adapter]) == 0


def test_one_that_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    start = ["fit", "--config", "clip_lora.yaml", "--trainer.max_rounds=1", *QUICK]
    assert main(start) == 0
    capsys.readouterr()
    assert main([*start, "--model.adapter=runs/version_0/adapter", "--model.lora.r=4"]) == 1
    error = capsys.readouterr().err
    assert "set lora.r=8" in error
    assert len(error.splitlines()) == 1
    assert main([*start, "--model.adapter=runs/version_9"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    model = make_model(adapter="nowhere")
    for _ in range(2):  # the second time it is not built half
        with pytest.raises(FedloraError, match="no such folder"):
            model.build(["one", "two"])
        assert model.model is None


def test_a_run_that_started_from_an_adapter_goes_on_without_its_folder(tmp_path: Path) -> None:
    first = fit(tmp_path / "first", max_rounds=1)
    warm = {"adapter": str(first.run.adapter)}
    whole = fit(tmp_path / "whole", FedExLoRA(), model=warm, max_rounds=2)
    kill = type("Kill", (KillAt,), {})("on_aggregate", 2)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", FedExLoRA(), model=warm, max_rounds=2, callbacks=[kill])
    early = type("Kill", (KillAt,), {})("on_train_start", 1)
    with pytest.raises(Killed):  # before its first checkpoint: it starts from the folder again
        fit(tmp_path / "early", FedExLoRA(), model=warm, max_rounds=2, callbacks=[early])
    (tmp_path / "early" / "version_0" / "config.yaml").write_text("{}")
    again = fit(tmp_path / "early", FedExLoRA(), model=warm, max_rounds=2, ckpt_path="last")
    assert_same_bits(fingerprint(whole.run.path), fingerprint(again.run.path))
    gone = {"adapter": str(tmp_path / "gone")}
    (tmp_path / "killed" / "version_0" / "config.yaml").write_text("{}")
    again = fit(tmp_path / "killed", FedExLoRA(), model=gone, max_rounds=2, ckpt_path="last")
    assert_same_bits(fingerprint(whole.run.path), fingerprint(again.run.path))
    with pytest.raises(FedloraError, match="there is no such folder"):
        fit(tmp_path / "new", model=gone)
