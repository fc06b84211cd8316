"""What a wrapper and its object must agree on, whatever happened to either in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel

from fedlora import CLIPLoRAWrapper, FederatedCLIPModel, FedloraError, LoRAConfig, LoRAWrapper
from fedlora.modules.saved import load_adapter
from fedlora.state import Residual
from tests.small_clip import DIM, NAMES, pictures, shake

LABELS = torch.tensor([0, 1, 2, 0])


def model(folder: Path, **settings: Any) -> FederatedCLIPModel:
    return FederatedCLIPModel(folder, class_names=NAMES, **settings)


def wrap(thing: Any, towers: Any = None, **lora: Any) -> CLIPLoRAWrapper:
    config = LoRAConfig(**{"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, **lora})
    return CLIPLoRAWrapper(thing, config, towers=towers).apply()


def save(lora: CLIPLoRAWrapper, path: Path) -> Path:
    from fedlora.export import export_adapter

    export_adapter(path, lora, lora.state(), {})
    return path


def merged(thing: FederatedCLIPModel) -> None:
    lora = wrap(thing)
    shake(lora)
    lora.merge_and_unload()


def trained(thing: FederatedCLIPModel) -> None:
    thing.train_step(pictures(), LABELS, lr=1e-2)


def set_in_full(thing: FederatedCLIPModel) -> None:
    thing.set_parameters({n: t * 1.01 for n, t in thing.get_parameters().items()})


@pytest.mark.parametrize("change", [merged, trained, set_in_full])
def test_an_adapter_knows_the_base_that_it_sits_on(
    folder: Path, tmp_path: Path, change: Any
) -> None:
    moved = model(folder)
    change(moved)
    path = save(wrap(moved), tmp_path / "moved")
    with pytest.raises(FedloraError, match="other base weights"):
        load_adapter(path, wrap(model(folder)))
    # Training and exchanging an adapter leave the base as it was loaded.
    fine = model(folder)
    lora = wrap(fine)
    trained(fine)
    set_in_full(fine)
    lora.unload()
    load_adapter(save(wrap(fine), tmp_path / "fine"), wrap(model(folder)))


def test_sixteen_bit_weights_that_travel_refuse_a_residual(folder: Path) -> None:
    """They cannot hold it, and what is beside them does not travel."""
    lora = wrap(model(folder).bfloat16(), save_only_trainable=False)
    name, weight = next(iter(lora.base_weights().items()))
    before = lora.state()
    with pytest.raises(FedloraError, match=r"rounded away in the bfloat16 .* model\.float\(\)\)"):
        lora.load(replace(before, residual={name: Residual(torch.ones(weight.shape))}))
    assert all(torch.equal(t, dict(before.tensors())[n]) for n, t in lora.state().tensors())


@pytest.mark.parametrize("through", ["wrapper", "object"])
def test_a_whole_exchange_makes_a_new_base(folder: Path, through: str) -> None:
    thing = model(folder, head="text")
    lora = wrap(thing, towers="vision", save_only_trainable=False)
    name, weight = next(iter(lora.base_weights().items()))
    lora.load(replace(lora.state(), residual={name: Residual(0.1 * torch.ones(weight.shape))}))
    given = {n: t * 1.1 for n, t in thing.get_parameters().items()}
    if through == "wrapper":
        lora.set_parameters(given)
    else:
        thing.set_parameters(given)
    answer, text = thing(pictures()), thing.text_features
    assert text is not None
    assert torch.equal(text, thing.encode_text(thing._prompts))  # the text tower was set too
    with lora.lora_disabled():
        pass
    assert torch.equal(thing(pictures()), answer)
    lora.merge_and_unload()
    torch.testing.assert_close(thing(pictures()), answer, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["copy", "data", "replace"])
def test_a_whole_exchange_that_fails_is_undone_too(folder: Path, how: str) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = CLIPModel.from_pretrained(folder)
            self.head = nn.Linear(DIM, 3)

        def get_parameters(self) -> list[Tensor]:
            return [parameter.detach().clone() for parameter in self.parameters()]

        def set_parameters(self, given: list[Tensor]) -> None:
            for parameter, value in zip(self.parameters(), given, strict=True):
                if how == "copy":
                    parameter.detach().copy_(value)
                else:
                    parameter.data = value.clone()
            if how == "replace":
                self.head.weight = nn.Parameter(given[-2].clone())
            raise KeyError

    mine = Mine()
    lora = wrap(mine, save_only_trainable=False)
    parameters, before = dict(mine.named_parameters()), lora.get_parameters()
    with pytest.raises(KeyError):
        mine.set_parameters([value + 1 for value in mine.get_parameters()])
    assert all(torch.equal(t, before[n]) for n, t in lora.get_parameters().items())
    assert all(p is parameters[n] for n, p in mine.named_parameters())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"bias": "all"}, "layer_norm1.bias"),
        ({"bias": "lora_only"}, "fc1.bias"),
        ({"train_norm": True}, "layer_norm1.weight"),
    ],
)
@pytest.mark.parametrize(("head", "towers"), [("linear", None), ("text", "vision")])
def test_what_is_trained_in_full_is_of_the_adapted_towers(
    folder: Path, settings: dict[str, Any], name: str, head: str, towers: str | None
) -> None:
    thing = model(folder, head=head)
    lora = wrap(thing, towers=towers, **settings)
    blocks = thing.clip.vision_model.encoder.layers
    found = [n for n in lora.get_parameters() if n.endswith(name)]
    assert len(found) == len(blocks)
    assert not any("text_" in name for name in lora.get_parameters())
    assert not any("text_" in name for name in lora.state().other)
    if head == "text":
        assert thing.text_frozen


class HeadInside(CLIPModel):
    """A head that hangs in the CLIP itself."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.head = nn.Linear(DIM, 3)

    def get_parameters(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}


def test_a_head_inside_the_clip_is_trained_and_travels(folder: Path) -> None:
    thing = HeadInside(CLIPModel.from_pretrained(folder).config)
    lora = wrap(thing, towers="vision")
    assert thing.head.weight.requires_grad
    assert set(lora.parameters["other"]) == {"head.weight", "head.bias"}
    assert {"head.weight", "head.bias"} < set(thing.get_parameters())
    assert not thing.visual_projection.weight.requires_grad
    lora.unload()
    adapted = CLIPLoRAWrapper(thing, LoRAConfig(r=2), ["encoder", "classifier"]).apply()
    assert "head" in adapted.layers


def test_evaluation_leaves_every_mode_as_it_was(folder: Path) -> None:
    thing = model(folder)
    lora = wrap(thing, lora_dropout=0.5)
    shake(lora)
    first = thing(pictures())
    thing.evaluate(pictures(), LABELS)
    assert torch.equal(thing(pictures()), first)  # no dropout
    thing.clip.vision_model.train()
    modes = [module.training for module in thing.modules()]
    thing.evaluate(pictures(), LABELS)
    assert [module.training for module in thing.modules()] == modes


def test_the_logit_scale_of_a_text_head_is_exchanged(folder: Path) -> None:
    one, two = model(folder, head="text"), model(folder, head="text")
    with torch.no_grad():
        one.clip.logit_scale.add_(0.5)
    two.set_parameters(one.get_parameters())
    assert two.logit_scale == pytest.approx(float(one.clip.logit_scale.exp()))


def test_another_objects_optimizer_is_left_alone(folder: Path) -> None:
    one, other = model(folder), model(folder)
    trained(other)  # it has an optimizer now
    held = [len(group["params"]) for group in other._optimizer.param_groups]
    server = type("Server", (), {})()
    server.clients = [one, other]
    one.server = server  # a client that knows its server, and through it another client
    lora = wrap(one)
    lora.disable_lora_layers()
    lora.enable_lora_layers()
    assert [len(group["params"]) for group in other._optimizer.param_groups] == held
    assert lora.model is one.clip


def test_an_own_method_of_a_name_that_we_know(folder: Path) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = CLIPModel.from_pretrained(folder)

        def freeze_text(self) -> None:  # takes no argument
            raise AssertionError

    wrap(Mine()).unload()


def test_a_failing_return_keeps_the_adapter(folder: Path) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = CLIPModel.from_pretrained(folder)
            self.head = nn.Linear(DIM, 3)

    mine = Mine()
    lora = wrap(mine)
    shake(lora)
    kept = lora.state()
    lora.disable_lora_layers()
    mine.optimizers = [torch.optim.SGD([p], lr=0.1) for p in mine.head.parameters()]
    with pytest.raises(FedloraError, match="there are 2 optimizers"):
        lora.enable_lora_layers()
    assert lora.phase == "off"
    assert not any("lora" in name for name, _ in mine.named_modules())
    del mine.optimizers
    lora.enable_lora_layers()
    assert all(torch.equal(t, dict(kept.tensors())[n]) for n, t in lora.state().tensors())


def test_what_changed_before_apply_counts(folder: Path) -> None:
    thing = model(folder)
    lora = CLIPLoRAWrapper(thing, LoRAConfig(r=2), towers="vision")
    thing.classifier = nn.Linear(DIM, 3)
    lora.apply()
    assert lora.parameters["other"]["classifier.weight"] is thing.classifier.weight
    wrong = CLIPLoRAWrapper(model(folder), LoRAConfig(r=2))
    wrong.config.r = 0
    with pytest.raises(FedloraError, match=r"lora\.r must be"):
        wrong.apply()


def test_the_config_is_a_copy(folder: Path) -> None:
    config = LoRAConfig(target_modules=["fc1"])
    lora = CLIPLoRAWrapper(model(folder), config)
    config.target_modules.append("x")
    assert lora.config.target_modules == ["fc1"]


def test_what_the_user_put_in_its_place_stays(folder: Path) -> None:
    thing = model(folder)
    lora = CLIPLoRAWrapper(thing, LoRAConfig(r=2), ["encoder", "classifier"]).apply()
    mine, head = (dict), nn.Linear(DIM, 3)
    vars(thing)["get_parameters"] = mine
    del vars(thing)["set_parameters"]
    thing.classifier = head
    lora.unload()
    assert vars(thing)["get_parameters"] is mine
    assert thing.classifier is head


def test_a_step_may_ask_any_module_for_its_type(folder: Path) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = CLIPModel.from_pretrained(folder)
            self.head = nn.Linear(DIM, 3)

        def train_step(self) -> set[str]:
            next(self.clip.vision_model.embeddings.parameters())
            return {name for name, _ in self.named_parameters()}

    mine = Mine()
    wrap(mine, towers="vision")
    assert {"head.weight", "head.bias"} < mine.train_step()
    assert all("lora_" in name or "head." in name for name in mine.train_step())


def test_undoing_switches_checkpointing_off(folder: Path) -> None:
    thing = model(folder)
    lora = wrap(thing)
    lora.enable_gradient_checkpointing()
    assert any(getattr(m, "gradient_checkpointing", False) for m in thing.modules())
    lora.unload()
    assert not any(getattr(m, "gradient_checkpointing", False) for m in thing.modules())


def test_without_an_adapter_there_is_nothing_to_switch(folder: Path) -> None:
    thing = model(folder)
    lora = wrap(thing, enabled=False)
    assert thing.lora_wrapper is lora
    with pytest.raises(FedloraError, match="there is no other model"):
        lora.disable_lora_layers()
    with pytest.raises(FedloraError, match="there is nothing to merge"):
        lora.merge_and_unload()
    with pytest.raises(FedloraError, match="cannot be wrapped twice"):
        wrap(thing)
    lora.unload()
    wrap(thing)


def test_unloading_inside_the_context(folder: Path) -> None:
    thing = model(folder)
    lora = wrap(thing)
    with lora.lora_disabled():
        lora.unload()
    assert lora.phase == "unloaded"


def test_a_parameter_of_its_own_with_the_name_of_a_clips(folder: Path) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = CLIPModel.from_pretrained(folder)
            self.visual_projection = nn.Linear(DIM, 3)

    for enabled in (True, False):
        mine = Mine()
        lora = wrap(mine, enabled=enabled)
        mine_too = lora.parameters["other"]["self.visual_projection.weight"]
        assert mine_too is mine.visual_projection.weight
        lora.unload()


def test_a_base_is_told_apart_from_what_is_trained_with_it() -> None:
    def made() -> LoRAWrapper:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        with torch.no_grad():
            net[0].weight.fill_(0.5)
            net[0].bias.fill_(0.0)
        other = {f"1.{name}": p for name, p in net[1].named_parameters()}
        return LoRAWrapper(net, LoRAConfig(r=2), targets=["0"], other=other).apply()

    one, two = made(), made()  # heads of different first values, which the adapter comes with
    assert not torch.equal(one.model[1].weight, two.model[1].weight)
    assert one.describe() == two.describe()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: CLIPLoRAWrapper(model(f), {"r": 8}), "must be a LoRAConfig, got dict"),
        (lambda f: LoRAWrapper(object()), "model must be an nn.Module, got object"),
        (lambda f: LoRAWrapper(nn.Linear(2, 2), 3), "must be a LoRAConfig, got int"),
        (lambda f: FederatedCLIPModel(f, class_names="cat"), "class_names must be a list"),
        (lambda f: model(f, templates="a {}."), "templates must be a list of at least one"),
        (lambda f: model(f, templates=["a photo"]), r"exactly one \{\} each"),
        (lambda f: model(f, templates=["a {name}"]), r"exactly one \{\} each"),
        (lambda f: FederatedCLIPModel(f, 1), "num_classes must be at least 2, got 1"),
        (lambda f: model(f).train_step(pictures(), LABELS, lr="a"), "lr must be a number"),
        (lambda f: wrap(model(f)).load({}), "state must be an AdapterState, got dict"),
        (lambda f: wrap(model(f)).set_trainable(["a"]), "parts must be of A, B and other"),
        (
            lambda f: LoRAWrapper(nn.Sequential(nn.Linear(2, 2)), LoRAConfig(layers=[0])),
            "are about a CLIP",
        ),
        (
            lambda f: wrap(model(f), target_modules=["fc1"], placement="attention"),
            "leave it out beside target_modules",
        ),
    ],
)
def test_mistakes_have_one_line(folder: Path, call: Any, message: str) -> None:
    with pytest.raises(FedloraError, match=message):
        call(folder)


def test_numpy_numbers_count_as_numbers(folder: Path) -> None:
    import numpy as np

    assert FederatedCLIPModel(folder, np.int64(3)).num_classes == 3
