from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest

from fedlora.errors import FedloraError
from fedlora.modules.config import LoRAConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 0, "lora.r must be a whole number from 1, got 0."),
        ("r", -4, "lora.r must be a whole number from 1, got -4."),
        ("r", 2.5, "lora.r must be a whole number from 1, got 2.5."),
        ("lora_alpha", 0, "lora.lora_alpha must be above 0, got 0."),
        ("lora_alpha", -1.0, "lora.lora_alpha must be above 0, got -1.0."),
        ("lora_alpha", math.nan, "lora.lora_alpha must be above 0, got nan."),
        ("lora_dropout", 1.0, "lora.lora_dropout must be in [0, 1), got 1.0."),
        ("lora_dropout", -0.1, "lora.lora_dropout must be in [0, 1), got -0.1."),
        (
            "placement",
            "mpl",
            "lora.placement should be one of mlp, attention, all but got 'mpl'.",
        ),
        ("bias", "some", "lora.bias should be one of none, all, lora_only but got 'some'."),
        (
            "target_components",
            ["decoder"],
            "lora.target_components should be a list of 'encoder', 'classifier' or both but got "
            "['decoder'].",
        ),
        (
            "target_components",
            [],
            "lora.target_components should be a list of 'encoder', 'classifier' or both but got "
            "[].",
        ),
        (
            "target_components",
            "encoder",
            "lora.target_components should be a list of 'encoder', 'classifier' or both but got "
            "'encoder'.",
        ),
        ("train_norm", "all", "lora.train_norm must be true or false, got 'all'."),
        ("enabled", "yes", "lora.enabled must be true or false, got 'yes'."),
        ("r", True, "lora.r must be a whole number from 1, got True."),
        ("lora_alpha", "32", "lora.lora_alpha must be above 0, got '32'."),
        (
            "target_modules",
            "fc1",
            "lora.target_modules must be a list of names, or null for the inferred ones, got "
            "'fc1'.",
        ),
        ("layers", [0, "1"], "lora.layers must be a list of whole numbers or null, got [0, '1']."),
    ],
)
def test_each_wrong_setting_is_named(field: str, value: object, message: str) -> None:
    config = LoRAConfig(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(FedloraError) as error:
        config.validate()
    assert str(error.value) == message


def test_defaults_and_limits_are_valid() -> None:
    LoRAConfig().validate()
    LoRAConfig(r=1, lora_alpha=0.5, lora_dropout=0.0, bias="all", placement="attention").validate()
    LoRAConfig(lora_dropout=0.999, target_components=["encoder"]).validate()


def test_fields_may_be_assigned_and_are_checked_when_asked() -> None:
    config = LoRAConfig()
    config.r = 0
    with pytest.raises(FedloraError, match=r"lora\.r"):
        config.validate()


def test_for_clip_model_is_the_mlp_of_every_block() -> None:
    config = LoRAConfig.for_clip_model()
    assert (config.r, config.lora_alpha) == (16, 32)
    assert (config.placement, config.layers, config.target_modules) == ("mlp", None, None)
    config = LoRAConfig.for_clip_model(r=2, lora_alpha=3)
    assert (config.r, config.lora_alpha) == (2, 3)


@pytest.mark.parametrize(
    ("preset", "r", "alpha"),
    [
        (LoRAConfig.small, 8, 16),
        (LoRAConfig.medium, 16, 32),
        (LoRAConfig.large, 32, 64),
        (LoRAConfig.for_classification_head, 8, 16),
    ],
)
def test_presets(preset: Callable[[], LoRAConfig], r: int, alpha: float) -> None:
    config = preset()
    config.validate()
    assert (config.r, config.lora_alpha) == (r, alpha)
    head = preset == LoRAConfig.for_classification_head
    assert list(config.target_components) == ["classifier" if head else "encoder"]


def test_to_dict_is_json_and_makes_an_equal_config() -> None:
    config = LoRAConfig(r=5, target_modules=["fc1"], layers=[-1], bias="all", train_norm=True)
    again = LoRAConfig(**json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert list(config.to_dict()) == [field.name for field in dataclasses.fields(LoRAConfig)]
