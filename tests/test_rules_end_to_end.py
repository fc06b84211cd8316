"""Every rule on the embedded model: it learns, resumes to the bit, and exports what it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedlora import LoRAConfig
from fedlora.aggregation import RULES
from fedlora.data import Digits
from fedlora.modules.loading import load_clip
from fedlora.trainer import FederatedTrainer
from tests.runs import (
    KillAtClient,
    Killed,
    assert_same_bits,
    fingerprint,
    fit,
    make_data,
    make_model,
    make_trainer,
)


def play(root: Path, name: str, **settings: Any) -> FederatedTrainer:
    rule = RULES[name]()
    # Prompts that say little: the start is far from what can be learned.
    data = {"source": Digits(test_fraction=0.05, templates=["a drawing of {} things"])}
    if rule.mixed_ranks:
        settings["client_ranks"] = [1, 4, 2]
    return fit(
        root, rule, data=data, max_rounds=2, limit_train_batches=5, clients_per_round=2, **settings
    )


def pixels_of(trainer: FederatedTrainer) -> torch.Tensor:
    batch = next(iter(trainer.datamodule.test_dataloader()))["image"]
    return trainer.lightning_module.model.preprocess.normalise(batch)


@torch.no_grad()
def through_peft(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    peft = PeftModel.from_pretrained(load_clip("tiny-clip"), str(folder)).eval()
    features = peft.get_image_features(pixel_values=pixels).pooler_output
    return torch.nn.functional.normalize(features, dim=-1)


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_from_start_to_end(tmp_path: Path, name: str) -> None:
    trainer = play(tmp_path / "whole", name)
    run, rounds, server = trainer.run, trainer.rounds, trainer.server
    personal = rounds.personal

    # It learns: on what its clients use.
    first, last = (server.history[n][rounds.monitor] for n in (0, -1))
    assert last >= first + 0.10
    if rounds.rule.exact:
        assert all(row["agg/error"] < 1e-5 for row in server.history[1:])

    # PEFT serves what the trainer served.
    pixels, model = pixels_of(trainer), trainer.lightning_module.model.eval()
    with torch.no_grad():
        served = model.encode_image(pixels)
    assert (served - through_peft(run.adapter, pixels)).abs().max() < 1e-5
    if personal:
        client = next(client for client in rounds.clients if client.id in server.versions)
        rounds.engine.load_own(client, rounds.round(server.round_idx), server, rounds.rule)
        with torch.no_grad():
            own = model.eval().encode_image(pixels)
        assert (own - served).abs().max() > 1e-3
        theirs = through_peft(run.path / "adapters" / str(client.id), pixels)
        assert (own - theirs).abs().max() < 1e-5

    # Killed in the middle of its second round, it goes on to the same bits.
    with pytest.raises(Killed):
        play(tmp_path / "killed", name, callbacks=[KillAtClient(3)])
    resumed = play(tmp_path / "killed", name, ckpt_path="last")
    assert_same_bits(fingerprint(run.path), fingerprint(resumed.run.path))


@pytest.mark.parametrize("name", ["FedAvg", "FlexLoRA"])
def test_an_adapted_head_keeps_its_own_rank(tmp_path: Path, name: str) -> None:
    lora = LoRAConfig(r=2, lora_alpha=4, target_components=("encoder", "classifier"))
    trainer = fit(tmp_path, RULES[name](), max_rounds=1, model={"lora": lora})
    ranks = trainer.server.adapter.ranks
    assert ranks.pop("classifier") == 8
    assert set(ranks.values()) == {2}
    assert trainer.server.adapter.B["classifier"][:, 2:].any()  # trained in every slot


def test_a_round_that_breaks_off_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"client_ranks": [1, 4, 2], "client_alpha": "fixed"}
    trainer = make_trainer(tmp_path, RULES["HetLoRA"](), callbacks=[KillAtClient(1)], **settings)
    model = make_model()
    with pytest.raises(Killed):
        trainer.fit(model, make_data())
    before, after = trainer.server.adapter, model.lora.state()
    assert dict(after.scaling) == dict(before.scaling)
    for (name, one), (_, other) in zip(before.tensors(), after.tensors(), strict=True):
        assert torch.equal(one, other), name
