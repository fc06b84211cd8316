from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from fedlora import AdapterAveraging, FederatedTrainer, FedloraError, LoRAConfig, RoundCheckpoint
from fedlora.aggregation import FedAvg, FedExLoRA, FedSALoRA, FFALoRA, WeightedMean
from fedlora.callbacks.base import FederatedCallback
from fedlora.callbacks.records import CLIENTS, METRICS
from fedlora.checkpoint import load
from tests.runs import assert_same_bits, fingerprint, fit, make_data, make_model, make_trainer, rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FederatedTrainer:
    return fit(tmp_path_factory.mktemp("run"), logger=True)


def folder_of(trainer: FederatedTrainer) -> Path:
    assert trainer.run is not None
    return trainer.run.path


def test_the_run_folder_holds_what_is_promised(finished: FederatedTrainer) -> None:
    folder = folder_of(finished)
    assert folder.name == "version_0"
    for name in ("last.ckpt", "previous.ckpt", "best.ckpt"):
        assert (folder / "checkpoints" / name).is_file()
    adapter = {path.name for path in (folder / "adapter").iterdir()}
    assert adapter == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "classifier.safetensors",
        "fedlora.json",
    }
    assert (folder / "config.yaml").is_file()
    assert list((folder / "tensorboard").glob("events.*"))
    leftovers = [p for p in folder.rglob("*") if ".tmp" in p.name or ".old" in p.name]
    assert leftovers == []


def test_metrics_have_a_row_per_round_and_row_0_is_untrained(finished: FederatedTrainer) -> None:
    table = rows(folder_of(finished) / "metrics.csv")
    assert tuple(table[0]) == METRICS
    assert [row["round"] for row in table] == ["0", "1", "2", "3"]
    assert table[0]["train/loss"] == ""
    assert float(table[-1]["val/loss"]) < float(table[0]["val/loss"])
    # 2 adapted layers per block, 4 blocks: r (in + out) each, and the head; 4 bytes; 3 clients.
    factors = 4 * 2 * 4 * (128 + 512)
    head = 10 * 64 + 10
    assert (
        int(table[1]["comm/up_bytes"])
        == int(table[1]["comm/down_bytes"])
        == 3 * 4 * (factors + head)
    )


def test_clients_have_a_row_per_round(finished: FederatedTrainer) -> None:
    table = rows(folder_of(finished) / "clients.csv")
    assert tuple(table[0]) == CLIENTS
    assert [(row["round"], row["id"]) for row in table] == [
        (str(r), str(c)) for r in (1, 2, 3) for c in (0, 1, 2)
    ]
    assert {row["steps"] for row in table} <= {"1", "2"}
    sizes = {row["id"]: int(row["samples"]) for row in table}
    assert sizes == {str(c.id): c.num_samples for c in finished.datamodule.clients()}


def test_the_summary_tells_the_end_the_best_and_the_start(finished: FederatedTrainer) -> None:
    summary = json.loads((folder_of(finished) / "summary.json").read_text())
    history = finished.server.history
    assert summary["round"] == 3
    assert summary["zero_shot"]["val/acc"] == history[0]["val/acc"]
    assert summary["best"]["val/acc"] == max(row["val/acc"] for row in history)
    assert 0 <= summary["test/acc"] <= 1
    best = load(folder_of(finished) / "checkpoints" / "best.ckpt").server
    assert best.round_idx == summary["best"]["round"]


def test_round_0_is_the_zero_shot_accuracy(finished: FederatedTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    zero_shot = trainer.validate(make_model(head="text"), make_data())
    assert finished.server.history[0]["val/acc"] == pytest.approx(zero_shot["val/acc"])


def test_same_seed_same_bits_and_another_seed_others(
    finished: FederatedTrainer, tmp_path: Path
) -> None:
    again = fit(tmp_path)
    assert_same_bits(fingerprint(folder_of(finished)), fingerprint(folder_of(again)))
    other = fit(tmp_path, seed=1, max_rounds=1)
    name = "vision_model.encoder.layers.0.mlp.fc1"
    assert not torch.equal(other.server.adapter.A[name], finished.server.adapter.A[name])


def test_a_client_does_not_depend_on_who_played_before_it(tmp_path: Path) -> None:
    class Keep(FederatedCallback):
        def __init__(self) -> None:
            self.payloads = {}

        def on_client_end(self, trainer, pl_module, update) -> None:
            self.payloads[update.client.id] = update.payload

    alone, together = Keep(), Keep()
    fit(tmp_path, max_rounds=1, callbacks=[together])
    fit(tmp_path, max_rounds=1, callbacks=[alone], clients_per_round=1)
    ((client, payload),) = alone.payloads.items()
    for name, tensor in payload.tensors():
        assert torch.equal(tensor, dict(together.payloads[client].tensors())[name]), name


def test_only_the_chosen_clients_play(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_rounds=4, clients_per_round=2, limit_train_batches=1)
    played = [row["id"] for row in rows(folder_of(trainer) / "clients.csv")]
    assert len(played) == 8
    assert set(played) == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"local_steps": 3}, 3),
        ({"local_steps": 3, "accumulate_grad_batches": 2}, 3),
        ({"local_epochs": 2, "limit_train_batches": 2}, 4),
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, 2),
    ],
)
def test_local_work_is_counted_in_steps(tmp_path: Path, settings: dict, steps: int) -> None:
    trainer = fit(tmp_path, max_rounds=1, **settings)
    most = max(int(row["steps"]) for row in rows(folder_of(trainer) / "clients.csv"))
    assert most == steps


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    model = {"lora": LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.0)}
    whole = fit(tmp_path, max_rounds=1, local_steps=1, data={"batch_size": 32}, model=model)
    parts = fit(
        tmp_path,
        max_rounds=1,
        local_steps=1,
        accumulate_grad_batches=2,
        data={"batch_size": 16},
        model=model,
    )
    for name, tensor in whole.server.adapter.tensors():
        other = dict(parts.server.adapter.tensors())[name]
        # AdamW's first step is lr * sign(g) where |g| is far above eps: differences stay tiny.
        assert (tensor - other).abs().max() < 5e-4, name


def test_clipping_bounds_the_gradient(tmp_path: Path) -> None:
    norms = []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            return super().step(closure)

    model = make_model()
    model.optimizer = lambda groups: Watch(groups, lr=1e-3)
    make_trainer(tmp_path, max_rounds=1, gradient_clip_val=0.01).fit(model, make_data())
    assert norms
    assert max(norms) <= 0.01 * 1.001


def test_ffa_never_moves_a_and_sends_b_only(tmp_path: Path) -> None:
    first = fit(tmp_path, FFALoRA(), max_rounds=1)
    third = fit(tmp_path, FFALoRA(), max_rounds=3)
    for name, tensor in first.server.adapter.A.items():
        assert torch.equal(tensor, third.server.adapter.A[name])
    factors = 4 * 4 * (512 + 128)  # B of fc1 (512, 4) and of fc2 (128, 4) in 4 blocks
    row = rows(folder_of(first) / "metrics.csv")[1]
    assert int(row["comm/up_bytes"]) == 3 * 4 * (factors + 650)
    assert float(row["agg/error"]) < 1e-6


def test_fedex_is_exact_and_what_it_exports_serves_the_same(tmp_path: Path) -> None:
    from peft import PeftModel

    from fedlora.modules.loading import load_clip

    trainer = fit(tmp_path, FedExLoRA())
    assert all(row["agg/error"] < 1e-5 for row in trainer.server.history[1:])
    assert trainer.server.adapter.residual
    model = trainer.lightning_module.model.eval()
    peft = PeftModel.from_pretrained(load_clip("tiny-clip"), str(folder_of(trainer) / "adapter"))
    batch = next(iter(trainer.datamodule.test_dataloader()))["image"]
    pixels = model.preprocess.normalise(batch)
    with torch.no_grad():
        theirs = peft.eval().get_image_features(pixel_values=pixels).pooler_output
        theirs = torch.nn.functional.normalize(theirs, dim=-1)
        assert (model.encode_image(pixels) - theirs).abs().max() < 1e-5


def test_fedsa_keeps_b_with_its_client(tmp_path: Path) -> None:
    trainer = fit(tmp_path, FedSALoRA(), max_rounds=4, clients_per_round=2)
    server = trainer.server
    assert all(not tensor.any() for tensor in server.adapter.B.values())
    assert set(server.versions) == {0, 1, 2}
    row = trainer.server.history[-1]
    assert row["agg/error"] is None
    folders = sorted((folder_of(trainer) / "adapters").iterdir())
    assert [path.name for path in folders] == ["0", "1", "2"]
    files = list((folder_of(trainer) / "clients").rglob("*.safetensors"))
    assert 3 <= len(files) <= 9  # the versions of last, previous and best, and no more


def test_a_client_that_sat_out_finds_its_state_unchanged(tmp_path: Path) -> None:
    kept: list[dict] = []

    class Watch(FederatedCallback):
        def on_round_end(self, trainer, pl_module, row) -> None:
            store, versions = trainer.rounds.engine.store, trainer.server.versions
            kept.append({c: (v, store.read(c, versions)) for c, v in versions.items()})

    fit(tmp_path, FedSALoRA(), max_rounds=4, clients_per_round=1, callbacks=[Watch()])
    sat_out = 0
    for before, after in itertools.pairwise(kept):
        for client, (version, state) in before.items():
            if after[client][0] == version:
                sat_out += 1
                for name, tensor in state.tensors():
                    assert torch.equal(tensor, dict(after[client][1].tensors())[name])
    assert sat_out > 0


def test_a_rule_that_stops_early_still_lets_every_client_train(tmp_path: Path) -> None:
    class First(WeightedMean):
        def aggregate(self, server, updates, rnd):
            return next(iter(updates)).adapter

    trainer = fit(tmp_path, First(), max_rounds=1)
    assert len(rows(folder_of(trainer) / "clients.csv")) == 3


def test_without_lora_the_full_model_is_trained_and_exported(tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    trainer = fit(tmp_path, max_rounds=1, model={"lora": LoRAConfig(enabled=False)})
    assert not trainer.server.adapter.A
    folder = folder_of(trainer) / "adapter"
    plain = CLIPVisionModelWithProjection.from_pretrained(folder / "model").eval()
    model = trainer.lightning_module.model.eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = torch.nn.functional.normalize(plain(pixel_values=pixels).image_embeds, dim=-1)
        assert (model.encode_image(pixels) - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("towers", ["vision", "both"])
def test_the_text_head_trains(tmp_path: Path, towers: str) -> None:
    trainer = fit(tmp_path, max_rounds=2, model={"head": "text", "towers": towers})
    history = trainer.server.history
    assert history[-1]["val/loss"] < history[0]["val/loss"]


def test_mixed_precision_and_checkpointing_work_together(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    calls = {"forward": 0, "steps": 0}

    class Spy(FederatedCallback):
        def on_fit_start(self, trainer, pl_module) -> None:
            name = "vision_model.encoder.layers.0.mlp.fc1"
            layer = pl_module.lora.layers[name]

            def look(module, args, output) -> None:
                if module.training:
                    seen.append(output.dtype)
                    calls["forward"] += 1

            layer.lora_A["default"].register_forward_hook(look)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            calls["steps"] += 1

    averaging = AdapterAveraging(precision="bf16-mixed", gradient_checkpointing=True)
    trainer = fit(tmp_path, averaging=averaging, max_rounds=2, callbacks=[Spy()])
    assert set(seen) == {torch.bfloat16}
    assert calls["forward"] == 2 * calls["steps"] > 0  # every forward pass ran again in backward
    assert trainer.server.adapter.A["vision_model.encoder.layers.0.mlp.fc1"].dtype == torch.float32
    assert trainer.server.history[-1]["val/loss"] < trainer.server.history[0]["val/loss"]


def test_early_stopping_of_lightning_stops_and_stays_stopped(tmp_path: Path) -> None:
    def stopper() -> EarlyStopping:
        return EarlyStopping("val/loss", patience=1, min_delta=100.0)

    trainer = fit(tmp_path, max_rounds=9, callbacks=[stopper()], limit_train_batches=1)
    assert trainer.server.round_idx == 2
    assert "stop" in trainer.server.finished
    again = fit(
        tmp_path, max_rounds=9, callbacks=[stopper()], limit_train_batches=1, ckpt_path="last"
    )
    assert again.server.round_idx == 2


def test_round_checkpoint_can_watch_another_metric(tmp_path: Path) -> None:
    trainer = fit(tmp_path, callbacks=[RoundCheckpoint("val/loss", "min")])
    losses = [row["val/loss"] for row in trainer.server.history]
    best = load(folder_of(trainer) / "checkpoints" / "best.ckpt").server
    assert best.round_idx == losses.index(min(losses))
    with pytest.raises(FedloraError, match="must not be of the test set"):
        RoundCheckpoint("test/acc")


def test_a_callback_that_needs_what_is_missing_is_named(tmp_path: Path) -> None:
    class Asks(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            trainer.optimizers.clear()

    with pytest.raises(FedloraError, match=r"callback Asks needs trainer\.optimizers"):
        fit(tmp_path, callbacks=[Asks()])


def test_lightning_loggers_get_the_rows(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "log")
    fit(tmp_path / "runs", max_rounds=1, logger=logger)
    (path,) = (tmp_path / "log").rglob("metrics.csv")
    assert "val/acc" in path.read_text()


def explode(client: int) -> FederatedCallback:
    class Explode(FederatedCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.lane.client.id == client:
                trainer.lane.loss += math.nan

    return Explode()


def test_a_nan_loss_names_client_and_round(tmp_path: Path) -> None:
    with pytest.raises(
        FedloraError, match="the loss of client 1 became NaN or infinite in round 0"
    ):
        fit(tmp_path, callbacks=[explode(1)])


def test_a_nan_client_can_be_left_out(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_rounds=1, callbacks=[explode(1)], on_nonfinite="skip")
    table = rows(folder_of(trainer) / "clients.csv")
    assert [row["status"] for row in table] == ["answered", "not finite", "answered"]
    assert trainer.server.history[-1]["clients/answered"] == 2


def test_an_infinite_adapter_is_noticed(tmp_path: Path) -> None:
    model = make_model()
    model.optimizer = lambda groups: torch.optim.SGD(groups, lr=math.inf)
    with pytest.raises(FedloraError, match="client 0 became NaN or infinite in round 0"):
        make_trainer(tmp_path).fit(model, make_data())


def test_more_clients_a_round_than_clients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match=r"between 1 and 3 .*got 12"):
        fit(tmp_path, clients_per_round=12)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rounds": 0}, "trainer.max_rounds must be at least 1, got 0"),
        ({"local_steps": 0}, "trainer.local_steps must be at least 1"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val must be above 0"),
        ({"callbacks": [RoundCheckpoint(), RoundCheckpoint()]}, "at most one RoundCheckpoint"),
        ({"devices": 0}, "trainer.devices must be at least 1 or auto, got 0"),
        ({"num_nodes": 0}, "trainer.num_nodes must be at least 1"),
        ({"timeout": 0.0}, "trainer.timeout must be above 0"),
        ({"strategy": "dp"}, "should be one of auto, clients, ddp but got 'dp'"),
        ({"strategy": "fsdp"}, "strategy=fsdp spreads a model's weights over devices, for"),
        ({"strategy": "deepspeed_stage_2"}, "the base is frozen and each device holds it whole"),
        ({"strategy": "ddp", "on_client_error": "skip"}, "does not go with strategy=ddp"),
    ],
)
def test_settings_are_checked_in_the_constructor(settings: dict, message: str) -> None:
    with pytest.raises(FedloraError, match=message):
        FederatedTrainer(**settings)


def test_a_precision_that_the_device_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match="16-mixed needs a GPU, this run is on cpu"):
        fit(tmp_path, averaging=AdapterAveraging(precision="16-mixed"))
    with pytest.raises(FedloraError, match="should be one of 32-true, bf16-mixed, 16-mixed"):
        AdapterAveraging(precision="fp16")


def test_validate_test_and_predict_read_a_checkpoint(
    finished: FederatedTrainer, tmp_path: Path
) -> None:
    folder = folder_of(finished)
    trainer = make_trainer(folder.parent)
    row = finished.server.history[-1]
    assert trainer.validate(make_model(), make_data(), "last") == pytest.approx(
        {"val/acc": row["val/acc"], "val/loss": row["val/loss"]}
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert trainer.test(make_model(), make_data(), str(folder))["test/acc"] == summary["test/acc"]
    table = rows(trainer.predict(make_model(), make_data(), "last"))
    assert len(table) == len({row["index"] for row in table}) == 359
    assert list(table[0]) == ["index", "picture", "label", "probability", "truth"]
    index = torch.tensor([int(row["index"]) for row in table])
    assert [row["picture"] for row in table] == trainer.datamodule.keys(index)


def test_fast_dev_run_is_one_round_of_one_batch(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_rounds=50, limit_train_batches=None, fast_dev_run=True)
    assert trainer.server.round_idx == 1
    assert {row["steps"] for row in rows(folder_of(trainer) / "clients.csv")} == {"1"}


def test_fedavg_is_the_default_rule() -> None:
    assert isinstance(AdapterAveraging().aggregator, FedAvg)
