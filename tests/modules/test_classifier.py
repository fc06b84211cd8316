from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.data.datamodule import FederatedDataModule
from fedlora.errors import FedloraError
from fedlora.modules.classifier import CLIPLoRAClassifier
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.config import LoRAConfig
from fedlora.modules.metrics import update_metrics
from fedlora.modules.recomputation import set_gradient_checkpointing
from tests.small_clip import NAMES, SIZE, TEMPLATES, pictures, shake

BATCH = {
    "image": pictures(),
    "label": torch.tensor([2, 0, 1, 1]),
    "index": torch.tensor([40, 41, 42, 43]),
}


def make(folder: Path, **settings: object) -> CLIPLoRAClassifier:
    """A classifier that is not built yet."""
    lora = settings.pop("lora", {})
    config = LoRAConfig(**{"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, **lora})  # type: ignore[dict-item]
    return CLIPLoRAClassifier(str(folder), lora=config, **settings)  # type: ignore[arg-type]


def built(folder: Path, **settings: object) -> tuple[CLIPLoRAClassifier, CLIPLoRAWrapper]:
    """A classifier whose adapter is not at its start."""
    module = make(folder, **settings)
    lora = module.build(NAMES, TEMPLATES)
    shake(lora)
    return module.train(), lora


def losses_by_hand(logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the target (1 - s) on the label and s / classes everywhere."""
    target = torch.full_like(logits, smoothing / logits.shape[1])
    target[torch.arange(len(logits)), BATCH["label"]] += 1 - smoothing
    return -(target * (logits - logits.logsumexp(1, keepdim=True))).sum(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_training_step(folder: Path, smoothing: float) -> None:
    module, _ = built(folder, label_smoothing=smoothing)
    out = module.training_step(BATCH)
    assert set(out) == {"loss", "losses", "correct"}
    assert out["loss"].shape == ()
    assert out["losses"].shape == out["correct"].shape == (4,)
    assert out["correct"].dtype == torch.bool
    logits = module(BATCH["image"])
    torch.testing.assert_close(out["losses"], losses_by_hand(logits, smoothing))
    torch.testing.assert_close(out["loss"], out["losses"].mean())
    assert torch.equal(out["correct"], logits.argmax(1) == BATCH["label"])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_class_weights_weigh_each_sample_of_the_training_loss(
    folder: Path, smoothing: float
) -> None:
    weights = torch.tensor([0.5, 2.0, 4.0])
    module, _ = built(folder, label_smoothing=smoothing, class_weights=weights.tolist())
    out = module.training_step(BATCH)
    expected = losses_by_hand(module(BATCH["image"]), smoothing) * torch.tensor([4.0, 0.5, 2, 2])
    torch.testing.assert_close(out["losses"], expected)
    torch.testing.assert_close(out["loss"], expected.sum() / 4)  # not / (4 + 0.5 + 2 + 2)
    # The other classes' weights do not matter, as they would in torch's weighted smoothing.
    one = {name: value[2:] for name, value in BATCH.items()}
    torch.testing.assert_close(module.training_step(one)["losses"], expected[2:])
    module.loss_weights = torch.tensor([9.0, 2.0, 9.0])
    torch.testing.assert_close(module.training_step(one)["losses"], expected[2:])


def test_balanced_class_weights_come_from_the_data(folder: Path) -> None:
    module = make(folder, class_weights="balanced")
    data = SimpleNamespace(class_names=NAMES, templates=TEMPLATES, class_counts=lambda: [6, 3, 1])
    module.trainer = trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    module.configure_model()
    assert trainer.datamodule is data
    torch.testing.assert_close(module.loss_weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    assert "loss_weights" not in module.state_dict()
    assert module.double().loss_weights.dtype == torch.float64  # it moves with the model


def test_class_weights_that_cannot_be_made(folder: Path) -> None:
    balanced = make(folder, class_weights="balanced")
    with pytest.raises(FedloraError, match="balanced needs the training rows of each class"):
        balanced.build(NAMES)
    balanced.build(NAMES, class_counts=[1, 2, 3])
    with pytest.raises(FedloraError, match=r"one number per class \(3\), got 2"):
        make(folder, class_weights=[1.0, 2.0]).build(NAMES)
    with pytest.raises(FedloraError, match=r"one number per class \(3\), got 2"):
        make(folder, class_weights=[1.0, 2.0], num_classes=3).build(None)


@pytest.mark.parametrize("step", ["validation_step", "test_step"])
def test_validation_and_test_steps_neither_smooth_nor_weigh(folder: Path, step: str) -> None:
    module, _ = built(folder, label_smoothing=0.3, class_weights=[1.0, 5.0, 9.0])
    out = getattr(module.eval(), step)(BATCH)
    assert set(out) == {"losses", "logits", "label"}
    assert out["logits"].shape == (4, 3)
    assert out["logits"].dtype == torch.float32
    assert torch.equal(out["label"], BATCH["label"])
    torch.testing.assert_close(out["losses"], losses_by_hand(out["logits"]))


def test_predict_step(folder: Path) -> None:
    module, _ = built(folder)
    out = module.eval().predict_step(BATCH)
    assert set(out) == {"index", "probs"}
    assert torch.equal(out["index"], BATCH["index"])
    torch.testing.assert_close(out["probs"].sum(1), torch.ones(4))
    assert torch.equal(out["probs"].argmax(1), module(BATCH["image"]).argmax(1))


def test_metrics_count_each_sample_once(folder: Path) -> None:
    module, _ = built(folder)
    metrics = module.make_metrics()
    logits = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5], [0, 5, 0], [5, 0, 0]])
    labels, losses = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([1.0, 2, 3, 4, 10])
    for rows in ([0, 1, 2, 3], [4]):  # batches of unequal sizes
        step = {"logits": logits[rows], "label": labels[rows], "losses": losses[rows]}
        update_metrics(metrics, step)
    values = metrics.compute()
    assert float(values["acc"]) == pytest.approx(3 / 5)
    assert float(values["loss"]) == 4.0
    assert values["loss"].dtype == torch.float64


def test_the_head_has_a_learning_rate_of_its_own(folder: Path) -> None:
    module, lora = built(folder, head_lr=0.5, optimizer=partial(torch.optim.SGD, lr=0.1))
    adapter, head = module.configure_optimizers().param_groups
    assert (adapter["lr"], head["lr"]) == (0.1, 0.5)
    assert {id(p) for p in head["params"]} == {id(p) for p in lora.parameters["other"].values()}
    factors = [*lora.parameters["A"].values(), *lora.parameters["B"].values()]
    assert {id(p) for p in adapter["params"]} == {id(p) for p in factors}


def test_without_head_lr_the_head_takes_that_of_the_optimizer(folder: Path) -> None:
    module, _ = built(folder, optimizer=partial(torch.optim.SGD, lr=0.1))
    assert [group["lr"] for group in module.configure_optimizers().param_groups] == [0.1, 0.1]


def test_the_optimizer_holds_what_is_trained_now(folder: Path) -> None:
    module, lora = built(folder)
    lora.set_trainable({"B"})
    (group,) = module.optimizer_groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in lora.parameters["B"].values()}
    lora.set_trainable({"other"})
    (group,) = module.optimizer_groups()
    assert len(group["params"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, r"model.label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"head_lr": -1.0}, "model.head_lr must be 0 or above, got -1.0"),
        ({"head_lr": math.nan}, "head_lr"),
        ({"class_weights": [1.0, 0.0]}, r"model.class_weights must be numbers above 0, got 0\.0"),
        ({"metrics": ["auroc", "f1"]}, "model.metrics must be a list of macro_f1, .*, got 'f1'"),
        ({"lora": {"r": 0}}, r"lora\.r must be"),
        ({"lora": {"save_only_trainable": False}}, "save_only_trainable must be true here"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(FedloraError, match=message):
        make(Path("/never/read"), **settings)


def test_the_number_of_classes_is_checked_against_the_data(folder: Path) -> None:
    with pytest.raises(FedloraError, match=r"num_classes is 7 but the data has 3 classes"):
        make(folder, num_classes=7).build(NAMES)
    make(folder, num_classes=3).build(NAMES)


def test_before_it_is_built_it_says_so(folder: Path) -> None:
    module = make(folder)
    for use in (lambda: module(pictures()), module.make_metrics, module.optimizer_groups):
        with pytest.raises(FedloraError, match="not built yet"):
            use()
    assert module.preprocess.size == SIZE  # needs one small file only


@pytest.mark.parametrize(("head", "towers"), [("linear", "vision"), ("text", "both")])
def test_gradients_with_checkpointing_equal_those_without(
    folder: Path, head: str, towers: str
) -> None:
    module, lora = built(folder, head=head, towers=towers, lora={"lora_dropout": 0.5})
    assert module.model is not None
    calls: list[str] = []
    fc1 = [name for name in lora.layers if name.endswith("fc1")]
    for name in fc1:
        lora.layers[name].register_forward_hook(lambda *_, name=name: calls.append(name))

    def gradients(checkpointing: bool, key: int = 3) -> dict[str, Tensor]:
        set_gradient_checkpointing(module.model, checkpointing)
        module.zero_grad()
        calls.clear()
        lora.set_dropout_key(key, 1)
        module.training_step(BATCH)["loss"].backward()
        return {name: p.grad.clone() for name, p in lora.trainable().items()}

    plain = gradients(False)
    assert sorted(calls) == sorted(fc1)
    recomputed = gradients(True)
    assert sorted(calls) == sorted([*fc1, *fc1])  # each ran twice
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-6)
    other = gradients(True, key=4)
    assert any(not torch.allclose(other[name], plain[name], atol=1e-4) for name in plain)


def test_mixed_precision_is_seen_inside_the_adapter(folder: Path) -> None:
    """Fabric does not autocast around a step on one device; the local loop does as here."""
    module, lora = built(folder)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    seen: dict[str, torch.dtype] = {}
    for name, layer in lora.layers.items():
        inside = {key: getattr(layer, key)["default"] for key in ("lora_A", "lora_B")}
        for key, part in {**inside, "layer": layer}.items():
            part.register_forward_hook(
                lambda _, __, y, key=f"{name}/{key}": seen.update({key: y.dtype})
            )
    with fabric.autocast():
        out = module.training_step(BATCH)
    fabric.backward(out["loss"])
    assert len(seen) == 3 * len(lora.layers)
    assert set(seen.values()) == {torch.bfloat16}
    assert out["losses"].dtype == torch.float32
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in lora.trainable().values()} == {torch.float32}
    seen.clear()
    module.training_step(BATCH)
    assert set(seen.values()) == {torch.float32}  # without autocast: the spy sees the difference


@pytest.fixture(scope="module")
def data() -> FederatedDataModule:
    return FederatedDataModule(num_clients=3)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(
        max_epochs=1,
        limit_train_batches=4,
        limit_val_batches=1,
        limit_test_batches=1,
        limit_predict_batches=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_lightning_fits_it_as_it_is(
    folder: Path, data: FederatedDataModule, trainer: Trainer
) -> None:
    module = make(
        folder,
        lora={"lora_dropout": 0.1},
        optimizer=partial(torch.optim.SGD, lr=0.05),
        class_weights="balanced",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found .* in eval mode")  # checkpointing would be off
        trainer.fit(module, datamodule=data)
    assert module.model is not None
    assert module.lora is not None
    assert module.model.class_names == data.class_names
    assert module.model.num_classes == 10
    assert {"train/loss", "val/acc", "val/loss"} <= trainer.callback_metrics.keys()
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert all((B != 0).any() for B in module.lora.state().B.values())  # it was trained
    counts = torch.tensor(data.class_counts())
    torch.testing.assert_close(module.loss_weights, counts.sum() / (10 * counts))
    base = make(folder).build(data.class_names, data.templates).base_weights()
    assert all(torch.equal(W, base[name]) for name, W in module.lora.base_weights().items())

    (val,) = trainer.validate(module, datamodule=data, verbose=False)
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        logits = module.eval()(batch["image"])
    expected = (logits.argmax(1) == batch["label"]).double().mean()
    assert val["val/acc"] == pytest.approx(float(expected))
    loss = cross_entropy(logits, batch["label"])
    assert val["val/loss"] == pytest.approx(float(loss), rel=1e-5)

    (test,) = trainer.test(module, datamodule=data, verbose=False)
    assert set(test) == {"test/acc", "test/loss"}
    (predicted,) = trainer.predict(module, datamodule=data)
    assert predicted["probs"].shape == (len(predicted["index"]), 10)
    assert list(Path(trainer.default_root_dir).iterdir()) == []


def test_the_untrained_model_is_evaluated_as_zero_shot(
    data: FederatedDataModule, trainer: Trainer
) -> None:
    """The linear head starts with CLIP's answers, so both heads have the same accuracy."""
    text, linear = (
        trainer.test(CLIPLoRAClassifier(head=head), datamodule=data, verbose=False)[0]
        for head in ("text", "linear")
    )
    assert text["test/acc"] == linear["test/acc"]
    assert text["test/loss"] == pytest.approx(linear["test/loss"], rel=1e-4)
