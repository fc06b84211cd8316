from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fedlora import FedloraError
from fedlora.main import main
from fedlora.modules.plain_config import from_plain, is_plain

PLAIN = {
    "model": {"type": "clip_lora", "model_name": "tiny-clip", "num_classes": 10},
    "lora": {
        "enabled": True,
        "r": 4,
        "lora_alpha": 8,
        "target_components": ["encoder"],
        "save_only_trainable": True,
        "train_norm": True,
    },
}


def test_what_the_plain_form_is() -> None:
    assert is_plain(PLAIN)
    assert is_plain({"model": {"type": "clip"}})
    assert not is_plain({"model": {"model_name": "tiny-clip", "lora": {"r": 3}}})
    assert not is_plain(None)


def test_it_is_mapped_onto_our_sections() -> None:
    assert from_plain(PLAIN, "x") == {
        "model": {"model_name": "tiny-clip", "num_classes": 10, "lora": PLAIN["lora"]}
    }
    assert from_plain({"model": {"type": "clip"}}, "x") == {"model": {"lora": {"enabled": False}}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {"type": "clip_lara"}}, r"model\.type should be one of clip, clip_lora but got"),
        ({"modle": {}, "lora": {}}, "no key 'modle' .did you mean 'model'"),
        ({"lora": {"lora_aplha": 3}}, "no key 'lora_aplha' .did you mean 'lora_alpha'"),
        ({"model": {"type": "clip", "name": "a"}}, "did you mean 'model_name'"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest(config: dict, message: str) -> None:
    with pytest.raises(FedloraError, match=message):
        from_plain(config, "x")


def test_fit_takes_the_plain_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(PLAIN))
    options = ["--trainer.max_rounds=1", "--trainer.limit_train_batches=1", "--data.num_clients=2"]
    assert main(["fit", "--config", "mine.yaml", "--quiet", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "model.lora.*" in captured.err
    exported = json.loads(Path("runs/version_0/adapter/adapter_config.json").read_text())
    assert exported["r"] == 4
    told = json.loads(Path("runs/version_0/adapter/fedlora.json").read_text())
    assert told["lora"]["train_norm"] is True
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_rounds=2", *options[1:]]) == 0

    seven = {**PLAIN, "model": {**PLAIN["model"], "num_classes": 7}}
    Path("mine.yaml").write_text(yaml.safe_dump(seven))
    assert main(["fit", "--config", "mine.yaml", *options]) == 1
    assert "model.num_classes is 7 but the data has 10 classes" in capsys.readouterr().err
