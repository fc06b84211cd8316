"""Validating, testing and predicting: with a checkpoint of a run, or the untrained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn

from fedlora import artefacts, checkpoint, per_class
from fedlora.engines.evaluate import evaluate_split, spread
from fedlora.errors import FedloraError
from fedlora.federation import make_clients, make_rounds
from fedlora.run_folder import RunFolder

if TYPE_CHECKING:
    from fedlora.trainer import FederatedTrainer


def load_for_evaluation(
    trainer: FederatedTrainer, ckpt_path: str | None
) -> tuple[RunFolder, checkpoint.Checkpoint] | None:
    """Load a checkpoint's adapter into the model; None leaves it untrained."""
    if ckpt_path is None:
        if not trainer.played:
            trainer.progress.say("no ckpt_path: this is the model as it is, before any run.")
        return None
    run, saved = _read(trainer, ckpt_path)
    if trainer.lightning_module.lora is None:
        raise FedloraError("the model is not built yet.")
    checkpoint.check_classes(saved, trainer.datamodule.class_names)
    if saved.identity.get("pictures_sha256") != trainer.datamodule.holdings.fingerprint():
        trainer.progress.say(
            f"the pictures, or their splits, are not those that {run.path} was trained with: some "
            "of what follows may be of pictures that it was trained on."
        )
    trainer.lightning_module.lora.load(saved.server.adapter)
    return run, saved


def _read(trainer: FederatedTrainer, ckpt_path: str) -> tuple[RunFolder, checkpoint.Checkpoint]:
    """Rank 0 reads it; the others may not see the disk."""
    found = None
    if trainer.world.is_zero:
        run, which = RunFolder.of(ckpt_path, trainer.default_root_dir)
        found = run, checkpoint.load(run.checkpoint(which))
    path, content = trainer.world.share(
        lambda: [str(found[0].path), checkpoint.to_dict(found[1])] if found else []
    )
    return found or (RunFolder(Path(path)), checkpoint.from_dict(content))


def predict(trainer: FederatedTrainer, ckpt_path: str | None) -> Path:
    """Write the predictions beside the checkpoint, or under the root without one."""
    loaded = load_for_evaluation(trainer, ckpt_path)
    path = loaded[0].predictions if loaded else trainer.default_root_dir / "predictions.csv"
    if trainer.world.is_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
    count = artefacts.write_predictions(trainer, path)
    trainer.progress.say(f"{count} predictions are in {path}")
    return path


def evaluated(trainer: FederatedTrainer, ckpt_path: str | None) -> dict[str, float]:
    """Metrics of the split that the trainer's stage names; of the test split each class's too."""
    loaded = load_for_evaluation(trainer, ckpt_path)
    model, data = trainer.lightning_module, trainer.datamodule
    testing = trainer.state.fn == TrainerFn.TESTING
    trainer.call(f"on_{'test' if testing else 'validation'}_start")
    split: Literal["val", "test"] = "test" if testing else "val"
    scores = evaluate_split(trainer.fabric, model, data, split, testing, trainer.world)
    scores = replace(scores, values=trainer.world.share(lambda: dict(scores.values)))
    if not scores.values:
        where = "testing" if testing else "validation"
        raise FedloraError(
            f"there are no pictures for {where}. Set data.{split}_fraction above 0, or give the "
            f"data a {split} split."
        )
    values = scores.defined()
    if loaded is not None:
        of_clients = _of_clients(trainer, *loaded, split)
        values |= trainer.world.share(lambda: of_clients)
    trainer.callback_metrics = {name: torch.tensor(value) for name, value in values.items()}
    trainer.call(f"on_{'test' if testing else 'validation'}_end")
    shown = dict.fromkeys([*scores.values, *values])
    trainer.progress.table({name: values.get(name, "not defined") for name in shown})
    if scores.classes:
        path = (loaded[0].path if loaded else trainer.default_root_dir) / per_class.OF_TEST
        per_class.write(path, data.class_names, scores.classes)
        per_class.show(trainer.progress, data.class_names, scores.classes, path)
    return values


def _of_clients(
    trainer: FederatedTrainer,
    run: RunFolder,
    saved: checkpoint.Checkpoint,
    split: Literal["val", "test"],
) -> dict[str, float]:
    """How clients do on their own rows with the models that they have in a checkpoint."""
    trainer.run, trainer.server = run, saved.server
    trainer.rounds = rounds = make_rounds(trainer, run, make_clients(trainer))
    same = ("rule", "objectives", "pictures_sha256", "client_samples", "client_ranks")
    if any(saved.identity.get(name) != rounds.identity[name] for name in same):
        trainer.progress.say("the clients are not those of the run: they are left out.")
        return {}
    found: dict[str, float | None] = {}
    if split == "test":
        found = artefacts.write_client_scores(rounds)
    elif rounds.personal:
        found = spread(rounds.evaluate_clients(rounds.clients, saved.server), "clients/")
    return {name: value for name, value in found.items() if value is not None}
