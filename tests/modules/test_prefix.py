from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.modules import families
from fedlora.modules.classifier import CLIPLoRAClassifier
from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.config import LoRAConfig
from fedlora.modules.prefix import FrozenPrefix, frozen_blocks, keeping_frozen
from fedlora.state import Residual
from tests.small_clip import LAYERS, NAMES, TEMPLATES, VISION, pictures, shake
from tests.small_siglip import make_siglip

COUNT = 12
IMAGES = pictures(COUNT)
LABELS = torch.arange(COUNT) % len(NAMES)
ROWS = torch.arange(100, 100 + COUNT)
EACH = (2 * 2 + 1) * VISION * 4  # bytes of a picture: tokens, width, float32


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip(tmp_path_factory.mktemp("siglip") / "small")


def make(folder: Path, lora: dict[str, Any] | None = None, **settings: Any) -> CLIPLoRAClassifier:
    config = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "layers": [-1]} | (lora or {})
    module = CLIPLoRAClassifier(str(folder), lora=LoRAConfig(**config), **settings)
    shake(module.build(NAMES, TEMPLATES))
    return module.train()


def batch(places: Tensor | list[int]) -> dict[str, Tensor]:
    places = torch.as_tensor(places)
    return {"image": IMAGES[places], "label": LABELS[places], "index": ROWS[places]}


def of_client(places: list[int], size: int = 4) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(places), size):
        yield batch(places[start : start + size])


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures of each pass through the frozen blocks."""
    seen: list[int] = []
    whole = families.first_blocks

    def counted(clip: Any, pixels: Tensor, count: int) -> Tensor:
        seen.append(len(pixels))
        return whole(clip, pixels, count)

    monkeypatch.setattr(families, "first_blocks", counted)
    return seen


@contextmanager
def kept(
    module: CLIPLoRAClassifier, trained: int = COUNT, others: int = COUNT, **settings: Any
) -> Iterator[FrozenPrefix]:
    with keeping_frozen(module, trained, others, **settings):
        assert module.model is not None
        assert module.model.prefix is not None
        yield module.model.prefix
    assert module.model.prefix is None


def gradients(module: CLIPLoRAClassifier, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses of a step and every gradient."""
    module.zero_grad(set_to_none=True)
    out = module.training_step(data)
    out["loss"].backward()
    assert module.lora is not None
    found = {n: p.grad.clone() for n, p in module.lora.trainable().items() if p.grad is not None}
    assert found.keys() == module.lora.trainable().keys()
    return {"losses": out["losses"].detach(), **found}


SETTINGS: dict[str, dict[str, Any]] = {
    "linear head": {},
    "text head": {"head": "text"},
    "text tower trained": {"head": "text", "towers": "both"},
    "biases": {"lora": {"bias": "lora_only"}},
    "head alone": {"lora": {"target_components": ["classifier"], "layers": None}},
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bfloat16 base"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_what_is_kept_gives_the_same_numbers(
    request: pytest.FixtureRequest,
    family: str,
    settings: dict[str, Any],
    checkpointing: bool,
    precision: str,
    computed: list[int],
) -> None:
    folder = request.getfixturevalue("folder" if family == "clip" else "siglip")
    module = make(folder, **settings)
    assert module.lora is not None
    if checkpointing:
        module.lora.enable_gradient_checkpointing()
    if precision == "bfloat16 base":
        module.lora.set_base_dtype(torch.bfloat16)
    data, val = batch([7, 0, 11, 3, 4]), batch(list(range(COUNT)))
    with ExitStack() as stack:
        if precision != "32-true":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        plain = gradients(module, data)
        with torch.no_grad():
            logits = module.validation_step(val)["logits"]
        assert not computed
        with kept(module) as prefix:
            module.keep_frozen(0, COUNT, of_client(list(range(COUNT))))
            assert prefix.nbytes == COUNT * prefix.nbytes_each()
            computed.clear()
            found = gradients(module, data)
            assert not computed
            with torch.no_grad():
                again = [module.validation_step(val)["logits"] for _ in range(2)]
            assert computed == [COUNT]
    close = {"atol": 1e-5, "rtol": 1e-4} if precision == "32-true" else {"atol": 0.03, "rtol": 0.03}
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, **close, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(again[0], logits, **close)
    assert torch.equal(*again)


@pytest.mark.parametrize(
    ("lora", "blocks"),
    [
        ({"layers": None}, 0),
        ({"layers": [0]}, 0),
        ({"layers": [1]}, 1),
        ({"layers": [-1], "placement": "attention"}, 1),
        ({"layers": [1], "bias": "lora_only"}, 1),
        ({"layers": [1], "bias": "all"}, 0),
        ({"layers": [1], "train_norm": True}, 0),
        ({"layers": None, "target_components": ["classifier"]}, LAYERS),
        ({"layers": None, "enabled": False, "save_only_trainable": False}, 0),
    ],
)
def test_frozen_is_what_is_below_all_that_is_learned(
    folder: Path, lora: dict[str, Any], blocks: int
) -> None:
    module = make(folder, lora)
    assert module.model is not None
    assert module.lora is not None
    if module.lora.config.enabled:
        module.lora.set_trainable(["B"])  # what another round trains is not frozen
    learned = {id(p) for part in module.lora.parameters.values() for p in part.values()}
    assert frozen_blocks(module.model.clip, learned) == blocks
    with keeping_frozen(module, COUNT, COUNT):
        prefix = module.model.prefix
        assert (0 if prefix is None else prefix.blocks) == blocks
        module.keep_frozen(0, COUNT, of_client([0, 1]))  # nothing where there is none


def test_nothing_is_frozen_for_who_trains_it_all(folder: Path) -> None:
    module = make(folder)
    assert module.model is not None
    module.model.clip.vision_model.embeddings.requires_grad_(True)
    assert frozen_blocks(module.model.clip, set()) == 0


def test_frozen_blocks_run_without_gradients(folder: Path) -> None:
    module = make(folder)
    assert module.model is not None
    modes: list[bool] = []
    block = module.model.clip.vision_model.encoder.layers[0]
    block.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    with kept(module, trained=0):  # as with augmented pictures
        gradients(module, batch([0, 1, 2]))
    assert modes[-1:] == [False]


def test_the_bits_of_a_picture_depend_on_who_holds_it_alone(
    folder: Path, computed: list[int]
) -> None:
    module = make(folder)
    mine, order = [5, 2, 9, 0, 1, 7], [1, 9, 5, 0, 2, 7]
    found = []
    for first in ([3, 4], list(range(COUNT)), [9, 1]):  # seen before, in whatever batches
        with kept(module), torch.no_grad():
            module.training_step(batch(first))
            module.eval().validation_step(batch(first))
            module.train().keep_frozen(3, len(mine), of_client(mine))
            found.append(module.training_step(batch(order))["losses"])
            more = module.training_step(batch([*order, 8]))["losses"]  # of which one is not kept
            torch.testing.assert_close(more[:6], found[-1], atol=1e-5, rtol=1e-4)
    assert all(torch.equal(found[0], each) for each in found[1:])


def test_a_client_is_computed_once(folder: Path, computed: list[int]) -> None:
    module = make(folder)
    started: list[int] = []

    def batches(client: int, places: list[int]) -> Iterator[dict[str, Tensor]]:
        started.append(client)
        yield from of_client(places)

    with kept(module):
        computed.clear()
        for client, places in ((0, [0, 1, 2, 3, 4, 5]), (1, [6, 7, 8]), (0, [0, 1, 2, 3, 4, 5])):
            module.keep_frozen(client, len(places), batches(client, places))
        module.keep_frozen(2, 0, of_client([]))
        assert started == [0, 1]
        assert computed == [4, 2, 3]
        plain = module.model.encode_image(module.model.as_pixels(IMAGES[[6, 1, 8, 0]]))
        # Several clients in a batch, as lanes have them.
        mixed = module.model.prefix.image_features(IMAGES, ROWS[[6, 1, 8, 0]], fixed=False)
        torch.testing.assert_close(mixed, plain, atol=1e-5, rtol=1e-5)
        assert computed == [4, 2, 3]


def test_a_client_that_breaks_off_is_computed_anew(folder: Path, computed: list[int]) -> None:
    def broken() -> Iterator[dict[str, Tensor]]:
        yield batch([0, 1])
        raise OSError("unreadable")

    module = make(folder)
    with kept(module) as prefix:
        with pytest.raises(OSError, match="unreadable"):
            module.keep_frozen(0, 4, broken())
        assert prefix.nbytes == 0
        module.keep_frozen(0, 4, of_client([0, 1, 2, 3]))
        assert prefix.nbytes == 4 * EACH


def test_the_bound_is_all_or_nothing_and_said(folder: Path, computed: list[int]) -> None:
    said: list[str] = []
    need = 2 * COUNT * EACH / 1e9
    module = make(folder, frozen_cache_gb=need)
    with kept(module, say=said.append) as prefix:
        assert prefix.keeps_trained
        assert prefix.most_fixed == COUNT
        assert prefix.nbytes == 0  # grows with what is seen
    assert not said
    for gb in (need * 0.99, 0.0):
        module = make(folder, frozen_cache_gb=gb)
        with kept(module, say=said.append) as prefix:
            module.keep_frozen(0, 4, of_client([0, 1, 2, 3]))
            with torch.no_grad():
                module.validation_step(batch([0, 1]))
            gradients(module, batch([0, 1]))
            assert prefix.nbytes == 0
    (line,) = said  # not where it was turned off
    assert line.startswith("what the 1 frozen vision blocks give is computed each time")
    assert "model.frozen_cache_gb is" in line
    with pytest.raises(FedloraError, match=r"model\.frozen_cache_gb must be 0 or above, got -1"):
        make(folder, frozen_cache_gb=-1)


def test_more_batches_than_were_announced_are_not_kept(folder: Path, computed: list[int]) -> None:
    module = make(folder)
    with kept(module, others=5) as prefix, torch.no_grad():
        for places in ([0, 1, 2], [3, 4, 5], [0, 1, 2], [1, 0]):
            module.validation_step(batch(places))
        assert prefix.nbytes == 5 * EACH
        assert computed[1:] == [3, 3, 2]


def test_augmented_pictures_are_not_kept(folder: Path) -> None:
    module = make(folder)
    with kept(module, trained=0) as prefix:
        module.keep_frozen(0, 4, of_client([0, 1, 2, 3]))
        gradients(module, batch([0, 1]))
        assert prefix.nbytes == 0
        with torch.no_grad():
            module.validation_step(batch([0, 1]))
        assert prefix.nbytes == 2 * EACH


def test_nothing_is_kept_of_a_random_tower(folder: Path) -> None:
    module = make(folder)
    assert module.model is not None
    module.model.clip.config.vision_config.attention_dropout = 0.1
    with kept(module) as prefix:
        assert not prefix.keeps_trained
        assert not prefix.most_fixed


def test_other_weights_are_seen(folder: Path, computed: list[int]) -> None:
    module = make(folder)
    assert module.model is not None
    fc1 = module.model.clip.vision_model.encoder.layers[0].mlp.fc1
    with kept(module), torch.no_grad():
        module.keep_frozen(0, COUNT, of_client(list(range(COUNT))))
        val = batch(list(range(COUNT)))
        before = [step(val)["losses"] for step in (module.training_step, module.validation_step)]
        fc1.weight.mul_(1.5)
        after = [step(val)["losses"] for step in (module.training_step, module.validation_step)]
        assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
        plain = module.training_step({k: v for k, v in val.items() if k != "index"})["losses"]
        torch.testing.assert_close(after[0], plain, atol=1e-5, rtol=1e-4)
        module.keep_frozen(0, COUNT, of_client(list(range(COUNT))))
        torch.testing.assert_close(module.training_step(val)["losses"], plain, atol=1e-5, rtol=1e-4)


def test_a_served_residual_and_another_adapter_leave_what_is_kept(
    folder: Path, computed: list[int]
) -> None:
    module = make(folder)
    lora = module.lora
    assert lora is not None
    state = lora.state()
    name, A = next(iter(state.A.items()))
    change = Residual(torch.ones(state.B[name].shape[0], 1), torch.ones(1, A.shape[1]))
    with kept(module), torch.no_grad():
        module.keep_frozen(0, COUNT, of_client(list(range(COUNT))))
        computed.clear()
        before = module.training_step(batch([0, 1]))["losses"]
        lora.load(replace(state, residual={name: change}))
        assert not torch.equal(module.training_step(batch([0, 1]))["losses"], before)
        lora.load(state)
        assert torch.equal(module.training_step(batch([0, 1]))["losses"], before)
        assert not computed


def test_an_unbuilt_model_is_refused(folder: Path) -> None:
    with (
        pytest.raises(FedloraError, match="not built yet"),
        keeping_frozen(CLIPLoRAClassifier(str(folder)), 1, 1),
    ):
        pass


def test_a_trained_text_tower_is_encoded_once_for_an_evaluation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(folder, head="text", towers="both")
    model, passes = module.model, []
    assert isinstance(model, FederatedCLIPModel)
    whole = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda t: passes.append(1) or whole(t))
    with torch.no_grad():
        plain = model(IMAGES)
        passes.clear()
        with model.holding_text():
            assert not passes
            assert torch.equal(model(IMAGES), plain)
            with model.holding_text():
                model(IMAGES)
            model(IMAGES)
        assert len(passes) == 2
        model(IMAGES)
        assert len(passes) == 3
    with model.holding_text(), torch.enable_grad():
        gradients(module, batch([0, 1]))  # text factors among them
        assert not model.text_frozen
    with pytest.raises(KeyError), model.holding_text():
        raise KeyError
    assert model._held_text is None


@pytest.mark.parametrize("head", ["linear", "text"])
def test_holding_a_frozen_text_tower_does_nothing(folder: Path, head: str) -> None:
    model = make(folder, head=head).model
    assert model is not None
    with model.holding_text(), torch.no_grad():
        held = model(IMAGES)
        assert model._held_text == []
    assert torch.equal(model(IMAGES), held)
