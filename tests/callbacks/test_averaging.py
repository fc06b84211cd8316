from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora import AdapterAveraging, CLIPLoRAClassifier, FedloraError, LoRAConfig, load_adapter
from fedlora.aggregation import FedExLoRA, LocalOnly
from fedlora.callbacks.base import FederatedCallback
from fedlora.main import main
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from tests.runs import assert_same_bits, fingerprint, fit, make_model


def test_bf16_is_refused_where_the_gpu_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(FedloraError, match=r"Use 16-mixed or 32-true"):
        AdapterAveraging(precision="bf16-mixed").check_device("cuda")
    AdapterAveraging(precision="16-mixed").check_device("cuda")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_cpu_has_these(precision) -> None:
    AdapterAveraging(precision=precision).check_device("cpu")


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_float16_needs_a_gpu(device: str) -> None:
    with pytest.raises(FedloraError, match=f"needs a GPU, this run is on {device}"):
        AdapterAveraging(precision="16-mixed").check_device(device)


# The rank of what is exported.


@pytest.mark.parametrize("rank", [0, -4])
def test_a_rank_below_one_is_refused_at_once(rank: int) -> None:
    with pytest.raises(FedloraError, match=rf"at least model.lora.r, got {rank}\. Leave it out"):
        AdapterAveraging(export_rank=rank)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 4}, r"export_rank must be at least model\.lora\.r=4, got 3\. Raise it, or leave"),
        ({"enabled": False}, r"export_rank is about LoRA, which is off here .* Leave it out\."),
    ],
)
def test_a_rank_that_cannot_be_is_refused_before_there_is_a_run(
    lora: dict[str, Any], message: str, tmp_path: Path
) -> None:
    averaging = AdapterAveraging(FedExLoRA(), export_rank=3)
    with pytest.raises(FedloraError, match=message):
        fit(tmp_path, averaging=averaging, model={"lora": LoRAConfig(**lora)})
    assert list(tmp_path.iterdir()) == []


def peft_of(adapter: Path) -> dict[str, Any]:
    told = json.loads((adapter / "fedlora.json").read_text())["peft"]
    assert told["rank"] == json.loads((adapter / "adapter_config.json").read_text())["r"]
    return told


class Looks(FederatedCallback):
    """Keeps what is said of the exported adapter when a round starts."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_round_start(self, trainer, pl_module, rnd, clients) -> None:
        if rnd.idx:
            self.seen.append(peft_of(trainer.run.adapter))


def test_a_run_exports_its_adapter_in_the_rank_that_it_was_given(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", FedExLoRA(), max_rounds=2)
    assert peft_of(whole.run.adapter)["exact"]
    limited = AdapterAveraging(FedExLoRA(), export_rank=4)
    first = fit(tmp_path / "changed", averaging=limited, max_rounds=1)
    told = peft_of(first.run.adapter)
    assert told["rank"] == 4
    assert not told["exact"]
    assert 0 < told["error"] < 1
    state = first.server.adapter
    read = load_adapter(first.run.adapter, lora_of(first.lightning_module)).state
    for name, beside in state.residual.items():
        assert torch.equal(read.A[name], state.A[name])
        assert torch.equal(read.B[name], state.B[name])
        assert torch.equal(read.residual[name].dense(), beside.dense())
    # Another rank when the run goes on: the folder is written anew before a round is played, and
    # no number of the run is another.
    looks, wider = Looks(), AdapterAveraging(FedExLoRA(), export_rank=5)
    second = fit(
        tmp_path / "changed", averaging=wider, max_rounds=2, ckpt_path="last", callbacks=[looks]
    )
    (seen,) = looks.seen
    assert (seen["rank"], seen["exact"]) == (5, False)
    assert seen["error"] < told["error"]
    ours, theirs = fingerprint(second.run.path), fingerprint(whole.run.path)
    for found in (ours, theirs):
        del found["adapter_model.safetensors"]
    assert_same_bits(ours, theirs)


def lora_of(module: CLIPLoRAClassifier) -> CLIPLoRAWrapper:
    assert module.lora is not None
    return module.lora


def test_a_resume_from_the_command_line_may_change_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [
        "--config=clip_lora.yaml",
        "--trainer.max_rounds=1",
        "--trainer.limit_train_batches=1",
        "--trainer.logger=false",
        "--trainer.averaging.aggregator=FedExLoRA",
        "--data.num_clients=2",
    ]
    assert main(["fit", *settings]) == 0
    adapter = tmp_path / "runs/version_0/adapter"
    assert peft_of(adapter)["exact"]
    change = ["--trainer.max_rounds=2", "--trainer.averaging.export_rank=8"]
    assert main(["fit", "--ckpt_path=last", *change]) == 0, capsys.readouterr().err
    assert (peft_of(adapter)["rank"], peft_of(adapter)["exact"]) == (8, False)


@pytest.mark.parametrize("components", [["encoder"], ["classifier"]])
def test_a_clients_folder_loads_into_a_model_of_its_rank(
    components: list[str], tmp_path: Path
) -> None:
    """With one lora_alpha for all, smaller ranks scale more."""

    def config(r: int, alpha: float) -> LoRAConfig:
        return LoRAConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_components=components)

    trainer = fit(
        tmp_path,
        LocalOnly(),
        model={"lora": config(4, 8)},
        client_ranks=[4, 2, 1],
        client_alpha="fixed",
        max_rounds=1,
    )
    rounds, module = trainer.rounds, trainer.lightning_module
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for client in rounds.clients:
        rounds.engine.load_own(client, rounds.round(1), trainer.server, rounds.rule)
        with torch.no_grad():
            want = module.model.eval()(images)
        folder = trainer.run.path / "adapters" / str(client.id)
        told = json.loads((folder / "fedlora.json").read_text())
        assert (told["lora"]["r"], told["lora"]["lora_alpha"]) == (client.rank, 8)
        head = components == ["classifier"]  # of which PEFT's files say nothing
        peft = {} if head else json.loads((folder / "adapter_config.json").read_text())
        assert (told["head_lora"] if head else peft)["r"] == client.rank
        fresh = make_model(lora=config(client.rank, 8), adapter=str(folder))
        fresh.trainer = trainer
        fresh.configure_model()
        fresh.start_from_adapter()
        with torch.no_grad():
            torch.testing.assert_close(fresh.model.eval()(images), want, atol=1e-4, rtol=1e-4)
