"""Runs whose frozen base is kept in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora import AdapterAveraging, CLIPLoRAClassifier, FedloraError, LoRAConfig, load_adapter
from fedlora.aggregation import FedExLoRA, FFALoRA, FRLoRA
from fedlora.callbacks.base import FederatedCallback
from fedlora.checkpoint import differences
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.state import ClientUpdate
from tests.runs import (
    QUICK,
    assert_same_bits,
    fingerprint,
    fit,
    make_data,
    make_model,
    make_trainer,
)


def averaging(rule: Any = None, **settings: Any) -> AdapterAveraging:
    given = {"precision": "bf16-mixed", "base_dtype": "bfloat16", **settings}
    return AdapterAveraging(rule, **given)


def lora_of(module: CLIPLoRAClassifier) -> CLIPLoRAWrapper:
    assert module.lora is not None
    return module.lora


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_it_goes_with_bf16_mixed_only(precision: Any) -> None:
    with pytest.raises(FedloraError, match=rf"needs .*precision=bf16-mixed, got {precision}: only"):
        AdapterAveraging(precision=precision, base_dtype="bfloat16")
    assert AdapterAveraging(precision=precision).base_dtype == "float32"


def test_another_type_is_refused() -> None:
    with pytest.raises(FedloraError, match=r"base_dtype should be one of float32, bfloat16 but"):
        averaging(base_dtype="float16")


def test_without_lora_nothing_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match=r"enabled=false\) nothing is frozen\. Leave it out\."):
        fit(tmp_path, averaging=averaging(), model={"lora": LoRAConfig(enabled=False)})
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_it() -> None:
    def config(value: str) -> dict[str, Any]:
        return {"trainer": {"averaging": {"init_args": {"base_dtype": value}}}}

    (found,) = differences(config("bfloat16"), config("float32"))
    assert found == "trainer.averaging.init_args.base_dtype: 'bfloat16' -> 'float32'"


def effective(lora: CLIPLoRAWrapper, name: str) -> Tensor:
    """What an adapted layer multiplies with, (out_features, in_features)."""
    layer = lora.layers[name]
    found: Tensor = layer(torch.eye(layer.in_features)) - layer.get_base_layer().bias.float()
    return found.detach().T.double()


class Watch(FederatedCallback):
    """Compares what is served after each round with the exact average, layer by layer."""

    def __init__(self) -> None:
        self.updates: list[ClientUpdate] = []
        self.errors: list[tuple[float, float]] = []
        self.types: set[torch.dtype] = set()

    def on_client_end(self, trainer, pl_module, update) -> None:
        self.updates.append(update)

    def on_aggregate(self, trainer, pl_module, before, after, report) -> None:
        lora = lora_of(pl_module.eval())
        total = sum(update.weight for update in self.updates)
        for name, layer in lora.layers.items():
            W0 = layer.get_base_layer().weight.detach()
            self.types.add(W0.dtype)
            exact = W0.double()
            for update in self.updates:
                own = update.adapter
                change = own.scaling[name] * (own.B[name] @ own.A[name]).double()
                if name in own.residual:
                    change += own.residual[name].dense().double()
                exact += update.weight / total * change
            R, product = (
                after.residual[name].dense(),
                after.scaling[name] * (after.B[name] @ after.A[name]),
            )
            rounded = (W0.float() + R).bfloat16().double() + product.double()
            mine, theirs = (float((W - exact).norm()) for W in (effective(lora, name), rounded))
            self.errors.append((mine, theirs))
        self.updates.clear()


def test_a_residual_is_served_in_full_and_the_run_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": QUICK | {"num_clients": 2}}
    watch = Watch()
    whole = fit(
        tmp_path / "whole",
        averaging=averaging(FedExLoRA(), gradient_checkpointing=True),
        max_rounds=2,
        callbacks=[watch],
        **settings,
    )
    assert watch.types == {torch.bfloat16}
    assert len(watch.errors) == 2 * len(lora_of(whole.lightning_module).layers)
    # Exact up to float32; in the bfloat16 weight it would be lost.
    assert all(1000 * mine < theirs for mine, theirs in watch.errors), watch.errors
    fit(
        tmp_path / "two",
        averaging=averaging(FedExLoRA(), gradient_checkpointing=True),
        max_rounds=1,
        **settings,
    )
    second = fit(
        tmp_path / "two",
        averaging=averaging(FedExLoRA(), gradient_checkpointing=True),
        max_rounds=2,
        ckpt_path="last",
        **settings,
    )
    assert_same_bits(fingerprint(second.run.path), fingerprint(whole.run.path))


def test_the_numbers_are_those_of_a_float32_base_under_bf16_mixed(tmp_path: Path) -> None:
    settings = {"data": QUICK | {"num_clients": 2}, "max_rounds": 1}
    one = fit(tmp_path / "one", averaging=averaging(), **settings)
    two = fit(tmp_path / "two", averaging=averaging(base_dtype="float32"), **settings)
    assert_same_bits(fingerprint(one.run.path), fingerprint(two.run.path))


@pytest.mark.parametrize(
    ("rule", "model"),
    [
        (FFALoRA(), {"head": "text", "towers": "both"}),
        (FRLoRA(), {"lora": LoRAConfig(r=2, lora_dropout=0.0, train_norm=True, bias="all")}),
    ],
    ids=["text", "start"],
)
def test_what_comes_after_a_run(rule: Any, model: dict[str, Any], tmp_path: Path) -> None:
    run = {"max_rounds": 1, "limit_train_batches": 1}
    trainer = fit(tmp_path, averaging=averaging(rule), model=model, data=QUICK, **run)
    module = trainer.lightning_module
    lora = lora_of(module)
    # In float32 again, whatever comes: in 16 bits a merged adapter would be rounded away.
    assert {t.dtype for t in module.state_dict().values() if t.is_floating_point()} == {
        torch.float32
    }
    again = make_trainer(tmp_path, averaging=averaging(type(rule)()), **run)
    tested = again.test(make_model(**model), make_data(**QUICK), ckpt_path=str(trainer.run.path))
    summary = (trainer.run.path / "summary.json").read_text()
    assert f'"test/acc": {tested["test/acc"]}' in summary
    assert again.predict(make_model(**model), make_data(**QUICK), str(trainer.run.path)).exists()
    # The adapter knows the weights that were loaded, and fits them.
    fresh = make_model(**model)
    fresh.trainer = trainer
    fresh.configure_model()
    load_adapter(trainer.run.adapter, lora_of(fresh))
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        answers = [each.eval()(images).softmax(-1) for each in (fresh, module)]
        torch.testing.assert_close(*answers, atol=0.05, rtol=0)
        merged = lora.merge_and_unload().eval()(images).softmax(-1)
    torch.testing.assert_close(merged, answers[1], atol=1e-4, rtol=0)


def test_a_model_that_was_rounded_is_not_taken_for_the_original(tmp_path: Path) -> None:
    module = make_model()
    averaged = averaging(base_dtype="bfloat16")
    trainer = make_trainer(tmp_path, averaging=averaged, max_rounds=1, limit_train_batches=1)
    trainer.fit(module, make_data(**QUICK))
    with pytest.raises(FedloraError, match="rounded this model's frozen weights to bfloat16"):
        make_trainer(tmp_path).test(module, make_data(**QUICK))
    make_trainer(tmp_path, averaging=averaging(base_dtype="bfloat16")).test(
        module, make_data(**QUICK)
    )
