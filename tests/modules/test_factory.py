from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from fedlora import FedloraError, create_model, quick_clip_lora
from tests.small_clip import NAMES


def plain(folder: Path, kind: str = "clip_lora", **lora: object) -> dict[str, Any]:
    return {
        "model": {"type": kind, "model_name": str(folder), "num_classes": 3},
        "lora": {"r": 3, "lora_alpha": 6, **lora},
    }


def as_namespace(config: dict[str, Any]) -> object:
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in config.items()})


def as_dataclass(config: dict[str, Any]) -> object:
    return make_dataclass("Config", config)(**config)


@pytest.mark.parametrize("form", [dict, as_namespace, as_dataclass])
def test_every_form_makes_the_same_model(folder: Path, form: Callable[..., object]) -> None:
    config = plain(folder, target_components=["encoder"], save_only_trainable=True)
    torch.manual_seed(0)
    expected = create_model(config).get_parameters()
    torch.manual_seed(0)
    given = copy.deepcopy(config)
    model = create_model(form(given))
    assert given == config  # not a key was taken out of it
    params = model.get_parameters()
    assert params.keys() == expected.keys()
    assert all(torch.equal(params[name], expected[name]) for name in params)
    assert (model.lora_wrapper.config.r, model.num_classes) == (3, 3)


def test_a_yaml_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "clip_lora.yaml"
    path.write_text(yaml.safe_dump(plain(folder)))
    for given in (path, str(path)):
        assert create_model(given).lora_wrapper.config.r == 3


@pytest.mark.parametrize(
    "config",
    [
        lambda folder: {"model": plain(folder, "clip")["model"]},
        lambda folder: plain(folder, "clip", enabled=False),
        lambda folder: plain(folder, "clip_lora", enabled=False),
    ],
)
def test_without_lora_the_whole_model_travels(folder: Path, config: Any) -> None:
    model = create_model(config(folder))
    assert not hasattr(model, "lora_wrapper")
    assert set(model.get_parameters()) == set(model.state_dict())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": {"type": "clip_lra"}},
            "should be one of clip, clip_lora but got 'clip_lra' .did",
        ),
        ({"model": {"type": "clip_lora", "model_nam": "x"}}, "did you mean 'model_name'"),
        ({"lora": {"lora_alfa": 1}}, "did you mean 'lora_alpha'"),
        ({"lor": {}}, "no key 'lor' .did you mean 'lora'"),
        ({"lora": {"r": "16"}}, r"lora\.r must be a whole number from 1, got '16'"),
        ({"lora": [1]}, r"lora must be a section with keys, got \[1\]"),
        ({"model": {"type": "clip_lora", "model_name": "x"}}, r"model\.num_classes is missing"),
        ({"model": {"type": "clip", "num_classes": 3}, "lora": {"enabled": True}}, "type is clip,"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(FedloraError, match=message):
        create_model({**plain(folder), **change})


def test_without_a_type_or_a_lora_section_it_is_not_guessed(folder: Path) -> None:
    config = plain(folder)
    del config["lora"], config["model"]["type"]
    with pytest.raises(FedloraError, match=r"model\.type should be one of clip, clip_lora but got"):
        create_model(config)


@pytest.mark.parametrize("config", [3, None, ["model"]])
def test_what_is_no_config(config: object) -> None:
    with pytest.raises(FedloraError, match="must be a mapping with the sections model and lora"):
        create_model(config)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match=r"nothing\.yaml cannot be read: No such file"):
        create_model(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("model: [1\n")
    with pytest.raises(FedloraError, match=r"broken\.yaml cannot be read as YAML"):
        create_model(str(tmp_path / "broken.yaml"))


def test_a_home_folder_that_nobody_has() -> None:
    with pytest.raises(FedloraError, match="config '~nosuchuser/x': there is no home folder for"):
        create_model("~nosuchuser/x")


@pytest.mark.parametrize("text", ["model: &a {x: *a}", "lora: &a [*a]", f"{'[' * 2000}"])
def test_a_file_that_contains_itself(tmp_path: Path, text: str) -> None:
    (tmp_path / "round.yaml").write_text(text)
    with pytest.raises(FedloraError, match=r"round\.yaml has a section that contains itself"):
        create_model(tmp_path / "round.yaml")


def test_an_object_that_contains_itself() -> None:
    config = SimpleNamespace(model=SimpleNamespace())
    config.model.parent = config
    with pytest.raises(FedloraError, match=r"the config has a section that contains itself"):
        create_model(config)


def test_quick_clip_lora_checks_before_it_loads() -> None:
    with pytest.raises(FedloraError, match=r"lora\.r must be"):
        quick_clip_lora("/never/read", num_classes=10, lora_r=0)


@pytest.mark.parametrize(("r", "alpha", "scaling"), [(4, None, 2.0), (4, 12, 3.0)])
def test_quick_alpha_is_twice_the_rank_unless_given(
    folder: Path, r: int, alpha: float | None, scaling: float
) -> None:
    model = quick_clip_lora(str(folder), 3, lora_r=r, lora_alpha=alpha)
    assert set(model.lora_wrapper.scaling.values()) == {scaling}


def test_quick_with_class_names_starts_as_zero_shot(folder: Path) -> None:
    linear = quick_clip_lora(str(folder), class_names=NAMES)
    text = quick_clip_lora(str(folder), class_names=NAMES, head="text")
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear.eval()(images), text.eval()(images), atol=1e-4, rtol=1e-4)
    # Under a text head the text tower is used, so its adapter travels too.
    assert any("text_model" in name for name in text.get_parameters())
    assert not any("text_model" in name for name in linear.get_parameters())
