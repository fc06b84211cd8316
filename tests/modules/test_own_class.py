"""The central promise: a class that knows nothing of adapters is wrapped and goes on as it is."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionModel, SiglipConfig, SiglipModel

from fedlora.errors import FedloraError
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.config import LoRAConfig
from fedlora.modules.families import vision_only
from fedlora.modules.injection import adapted_already
from fedlora.modules.lora import LoRAWrapper
from tests import own_classes as own
from tests.small_clip import pictures, shake

IMAGES = pictures(6).float() / 255 - 0.5
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
ENCODER, BOTH = ["encoder"], ["encoder", "classifier"]
HIDDEN = ("get_parameters", "set_parameters", "lora_wrapper")  # what the wrapper hangs in
WORKING = pytest.mark.parametrize("kind", own.WORKING.values(), ids=own.WORKING.keys())
COMPONENTS = pytest.mark.parametrize("components", [ENCODER, BOTH], ids=["encoder", "both"])
KINDS = ["clip", "projection", "vision", "siglip"]


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, nn.Module]:
    clip = CLIPModel.from_pretrained(folder)
    vision = CLIPVisionModel(clip.config.vision_config)
    vision.load_state_dict(
        {
            name: clip.state_dict().get(name, clip.state_dict().get(f"vision_model.{name}"))
            for name in vision.state_dict()
        }
    )
    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    tower["num_attention_heads"] = 2
    torch.manual_seed(2)
    siglip = SiglipModel(
        SiglipConfig(
            text_config={**tower, "vocab_size": 50, "max_position_embeddings": 8},
            vision_config={**tower, "image_size": 16, "patch_size": 8},
        )
    )
    projection = vision_only(clip, clip.state_dict())
    return {"clip": clip, "projection": projection, "vision": vision, "siglip": siglip}


@pytest.fixture
def fresh(loaded: dict[str, nn.Module]) -> Callable[..., nn.Module]:
    """A new CLIP, always the same."""

    def make(kind: str = "clip") -> nn.Module:
        torch.manual_seed(3)
        return copy.deepcopy(loaded[kind])

    return make


def wrapped(
    thing: Any, components: list[str] | None = None, seed: int | None = 0, **options: Any
) -> CLIPLoRAWrapper:
    """With an adapter that answers; moved at random where there is a seed."""
    settings = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
    towers = options.pop("towers", "vision")
    config = LoRAConfig(**{**settings, **options})  # type: ignore[arg-type]
    wrapper = CLIPLoRAWrapper(thing, config, target_components=components, towers=towers)
    torch.manual_seed(4)
    assert wrapper.apply_lora_to_federated_model() is thing
    if seed is not None:
        shake(wrapper, seed)
    return wrapper


def ask(thing: Any) -> Any:
    """Its parameters; with a config where it wants one."""
    try:
        return thing.get_parameters()
    except TypeError:
        return thing.get_parameters({})


def sent(thing: Any) -> Any:
    """What a server would send back: parameters without what is said besides."""
    given = ask(thing)
    if isinstance(given, tuple):
        return given[0]
    return given.get("state", given) if isinstance(given, dict) else given


def moved(given: Any, by: Callable[[Any], Any]) -> Any:
    if isinstance(given, dict):
        return {name: by(value) for name, value in given.items()}
    return [by(value) for value in given] if isinstance(given, list) else by(given)


def values(given: Any) -> list[Tensor]:
    items = given.values() if isinstance(given, dict) else given
    items = items if isinstance(given, dict | list) else [given]
    return [torch.as_tensor(item) for item in items]


def equal(one: Any, two: Any) -> bool:
    first, second = values(one), values(two)
    return len(first) == len(second) and all(map(torch.equal, first, second))


# Everything in an object, found without the code under test.


def inside(  # noqa: C901
    thing: Any, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Modules and optimizers anywhere in an object."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    parts: dict[str, Any] = {}
    if isinstance(thing, nn.Module | torch.optim.Optimizer):
        yield path, thing
    if isinstance(thing, nn.Module):
        parts = dict(thing._modules)
    elif isinstance(thing, dict):
        parts = {str(key): value for key, value in thing.items()}
    elif isinstance(thing, list | tuple):
        parts = {str(index): value for index, value in enumerate(thing)}
    if type(thing).__module__ in ("tests.own_classes", __name__):
        slots = {n: getattr(thing, n) for n in getattr(type(thing), "__slots__", ())}
        parts |= slots | getattr(thing, "__dict__", {})
    for name, value in parts.items():
        if name not in HIDDEN:
            yield from inside(value, f"{path}.{name}", seen)


def snapshot(thing: Any) -> dict[str, Any]:
    """Every tensor, flag, group and state, copied."""
    found: dict[str, Any] = {}
    for path, part in inside(thing):
        if isinstance(part, nn.Module):
            found[f"{path} training"] = part.training
            found[f"{path} type"] = type(part)
            for name, tensor in {**part._parameters, **part._buffers}.items():
                if tensor is not None:
                    found[f"{path}.{name}"] = tensor.detach().clone()
                    found[f"{path}.{name} flag"] = (type(tensor), tensor.requires_grad)
        else:
            for index, group in enumerate(part.param_groups):
                found[f"{path} {index}"] = [id(p) for p in group["params"]]
                found[f"{path} {index} options"] = {n: v for n, v in group.items() if n != "params"}
            for parameter, state in part.state.items():
                for name, value in state.items():
                    kept = value.clone() if isinstance(value, Tensor) else repr(value)
                    found[f"{path} {id(parameter)} {name}"] = kept
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(one: Any, two: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            return one.dtype == two.dtype and torch.equal(one, two)
        return type(one) is type(two) and bool(one == two)

    names = before.keys() | after.keys()
    return sorted(n for n in names if not same(before.get(n), after.get(n)))


def names_and_ids(thing: Any) -> dict[str, int]:
    """The instance's attributes, themselves."""
    return {name: id(value) for name, value in getattr(thing, "__dict__", {}).items()}


def test_a_snapshot_sees_what_matters(fresh: Callable[..., nn.Module]) -> None:
    thing = own.Holding(fresh(), ADAM)
    before = snapshot(thing)
    assert differences(before, snapshot(thing)) == []
    thing.train_step(IMAGES, LABELS)
    changed = " ".join(differences(before, snapshot(thing)))
    assert "fc1.weight" in changed
    assert "exp_avg" in changed
    assert "head.bias" in changed


# It works: their own methods, in their own format.


@WORKING
@COMPONENTS
def test_its_own_methods_work_on_the_adapter(
    kind: type, components: list[str], fresh: Callable[..., nn.Module]
) -> None:
    plain, thing = kind(fresh()), kind(fresh())
    format_, full = ask(plain), sent(plain)
    wrapper = wrapped(thing, components)
    given = sent(thing)
    assert type(ask(thing)) is type(format_)
    assert type(given) is type(full)
    learned = wrapper.exchanged()
    numbers = sum(t.numel() for t in learned.values())
    # Under two paths the values go twice; plain lists of parameters have no statistics.
    assert sum(t.numel() for t in values(given)) in {numbers, 2 * numbers}
    assert {t.shape for t in values(given)} <= {t.shape for t in learned.values()} | {(numbers,)}

    before = snapshot(thing)
    thing.set_parameters(moved(given, lambda value: value + 1))
    after = wrapper.exchanged()
    assert after.keys() == learned.keys()
    assert all(after[name] is learned[name] for name in learned)  # optimizers know them
    assert equal(sent(thing), moved(given, lambda value: value + 1))
    prefixes = ("lora_A", "lora_B") if components == BOTH else ("lora_A", "lora_B", "head", "fc")
    names = (*prefixes, "parts", "layers", "1", "net", "models")
    base = [n for n in differences(before, snapshot(thing)) if "clip" in n and "lora_" not in n]
    assert base == []
    assert any(any(p in n for p in names) for n in differences(before, snapshot(thing)))


@WORKING
@COMPONENTS
def test_it_trains_the_adapter_and_nothing_else(
    kind: type, components: list[str], fresh: Callable[..., nn.Module]
) -> None:
    thing = kind(fresh())
    wrapper = wrapped(thing, components)
    thing.set_parameters(sent(thing))  # some are ready to train only then
    before = snapshot(thing)
    learned = {name: t.detach().clone() for name, t in wrapper.exchanged().items()}
    losses = [thing.train_step(IMAGES, LABELS) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert 0 <= thing.evaluate(IMAGES, LABELS) <= 1
    still = [n for n, t in wrapper.exchanged().items() if torch.equal(t, learned[n])]
    assert still == []
    known = {id(t) for t in wrapper.exchanged().values()}
    allowed = {
        f"{path}.{name}"
        for path, part in inside(thing)
        if isinstance(part, nn.Module)
        for name, t in {**part._parameters, **part._buffers}.items()
        if id(t) in known or name == "num_batches_tracked"
    }
    changed = [
        name
        for name, value in before.items()
        if isinstance(value, Tensor) and differences({0: value}, {0: snapshot(thing).get(name)})
    ]
    assert set(changed) <= allowed


@WORKING
@COMPONENTS
def test_unload_undoes_everything(
    kind: type, components: list[str], fresh: Callable[..., nn.Module]
) -> None:
    thing = kind(fresh())
    thing.evaluate(IMAGES, LABELS)
    before, attributes, full = snapshot(thing), names_and_ids(thing), sent(thing)
    wrapper = wrapped(thing, components)
    thing.set_parameters(moved(sent(thing), lambda value: value + 1))
    thing.train_step(IMAGES, LABELS)
    thing.evaluate(IMAGES, LABELS)
    after_set = {"anchor", "memory", "adam"}  # what its own set_parameters leaves behind
    assert wrapper.unload() is thing
    now = {n: v for n, v in snapshot(thing).items() if not n.startswith((".memory", ".adam"))}
    before = {n: v for n, v in before.items() if not n.startswith(".adam")}
    assert differences(before, now) == []
    there = names_and_ids(thing)
    assert there.keys() - after_set == attributes.keys() - after_set
    assert {n: there[n] for n in attributes.keys() - after_set} == {
        n: attributes[n] for n in attributes.keys() - after_set
    }
    assert equal(sent(thing), full)
    vars(thing).pop("memory", None)  # another CLIP
    wrapped(thing, components, seed=1)  # it may be wrapped again


@WORKING
@COMPONENTS
def test_merging_keeps_the_predictions_and_leaves_no_trace(
    kind: type, components: list[str], fresh: Callable[..., nn.Module]
) -> None:
    plain, thing = kind(fresh()), kind(fresh())
    wrapper = wrapped(thing, components)
    thing.evaluate(IMAGES, LABELS)
    with torch.no_grad():
        expected = thing(IMAGES)
        assert (expected - plain(IMAGES)).abs().max() > 1e-2
        assert wrapper.merge_and_unload() is thing
        torch.testing.assert_close(thing(IMAGES), expected, atol=1e-5, rtol=1e-5)
    assert not [p for p, part in inside(thing) if "peft" in type(part).__module__]
    attributes = [vars(part) for _, part in inside(thing) if isinstance(part, nn.Module)]
    hooks = [a for part in attributes for a in part if "lora" in a or a.startswith("named_")]
    assert hooks == []
    assert "lora_wrapper" not in getattr(thing, "__dict__", {})
    flags = {n: v for n, v in snapshot(plain).items() if n.endswith("flag")}
    assert {n: v for n, v in snapshot(thing).items() if n.endswith("flag")} == flags
    shapes = [t.shape for t in values(sent(plain))]
    assert [t.shape for t in values(sent(thing))] == shapes
    thing.set_parameters(sent(plain))  # full parameters again
    thing.evaluate(IMAGES, LABELS)
    plain.evaluate(IMAGES, LABELS)
    assert torch.equal(thing(IMAGES), plain(IMAGES))
    vars(thing).pop("memory", None)
    wrapped(thing, components, seed=1)


@WORKING
def test_off_is_the_original_and_on_goes_on(kind: type, fresh: Callable[..., nn.Module]) -> None:
    thing = kind(fresh())
    thing.evaluate(IMAGES, LABELS)
    original, full = thing(IMAGES), sent(thing)
    wrapper = wrapped(thing, BOTH)
    thing.set_parameters(sent(thing))
    thing.evaluate(IMAGES, LABELS)
    answer, adapter, before = thing(IMAGES), sent(thing), snapshot(thing)
    wrapper.disable_lora_layers()
    assert torch.equal(thing(IMAGES), original)
    assert equal(sent(thing), full)
    wrapper.enable_lora_layers()
    assert differences(before, snapshot(thing)) == []
    assert torch.equal(thing(IMAGES), answer)
    assert equal(sent(thing), adapter)


@pytest.mark.parametrize("towers", ["vision", "both"])
@pytest.mark.parametrize("clip", KINDS)
@pytest.mark.parametrize("kind", [own.Copied, own.Plain])
@COMPONENTS
def test_every_kind_of_clip(
    kind: type,
    clip: str,
    components: list[str],
    towers: str | None,
    fresh: Callable[..., nn.Module],
) -> None:
    thing = kind(fresh(clip))
    thing.evaluate(IMAGES, LABELS)
    before, answer = snapshot(thing), thing(IMAGES)
    wrapper = wrapped(thing, components, towers=towers)
    text = [name for name in wrapper.exchanged() if name.startswith("text_model.")]
    assert bool(text) is (clip in ("clip", "siglip") and towers != "vision")
    given = sent(thing)
    thing.set_parameters(moved(given, lambda value: value + 1))
    assert equal(sent(thing), moved(given, lambda value: value + 1))
    thing.train_step(IMAGES, LABELS)
    thing.evaluate(IMAGES, LABELS)
    assert not torch.allclose(thing(IMAGES), answer)
    wrapper.unload()
    assert differences(before, snapshot(thing)) == []
    assert torch.equal(thing(IMAGES), answer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [own.StateDicts, own.Trainable, own.Replaced, own.Assigned])
def test_other_number_types(
    kind: type, dtype: torch.dtype, fresh: Callable[..., nn.Module]
) -> None:
    thing = kind(fresh()).to(dtype)
    images = IMAGES.to(dtype)
    before = snapshot(thing)
    wrapper = wrapped(thing, BOTH)
    given = sent(thing)
    thing.set_parameters(moved(given, lambda value: value * 2))
    assert equal(sent(thing), moved(given, lambda value: value * 2))
    thing.train_step(images, LABELS)
    wrapper.unload()
    after = {n: v for n, v in snapshot(thing).items() if not n.endswith("training")}
    assert differences({n: v for n, v in before.items() if not n.endswith("training")}, after) == []


# Nothing is ever half-set.

FAULTS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "few": lambda v: v[:-1],
    "many": lambda v: [*v, v[0]],
    "shape": lambda v: [*v[:-1], v[-1][..., :-1]],
    "broadcast": lambda v: [*v[:-1], v[-1].reshape(-1)[:1]],
    "scalar": lambda v: [*v[:-1], v[-1].reshape(-1)[0]],
    "nan": lambda v: [*v[:-1], v[-1] * float("nan")],
    "inf": lambda v: [*v[:-1], v[-1] * 0 + float("inf")],
    "text": lambda v: [*v[:-1], "seven"],
    "none": lambda v: [*v[:-1], None],
}
SAYS = {
    "few": r"there are \d+ values|missing|Missing|has shape",
    "many": r"there are \d+ values|unknown here|has shape",
    "shape": "has shape",
    "broadcast": "has shape",
    "scalar": "has shape",
    "nan": "NaN or infinite",
    "inf": "NaN or infinite",
    "text": "is a str|is a list",
    "none": "is a NoneType|is a dict",
}


def broken(given: Any, fault: str) -> Any:
    """Good values, moved, with one fault at the end: what comes before would be set already."""
    good = moved(given, lambda value: value + 1)
    if isinstance(good, Tensor):
        if fault in ("few", "shape", "broadcast", "scalar"):
            return good[:-1] if fault in ("few", "shape") else good[:1]
        wrong = {"many": torch.cat([good, good[:1]]), "text": ["seven"], "none": {"a": good}}
        return wrong[fault] if fault in wrong else torch.cat([good[:-1], good[:1] * float(fault)])
    if isinstance(good, list):
        return FAULTS[fault](good)
    names, rest = list(good), FAULTS[fault](list(good.values()))
    return dict(zip([*names, "stranger"], rest, strict=False))


@WORKING
@COMPONENTS
def test_nothing_is_half_set(
    kind: type, components: list[str], fresh: Callable[..., nn.Module]
) -> None:
    thing = kind(fresh())
    wrapped(thing, components)
    thing.set_parameters(sent(thing))
    thing.train_step(IMAGES, LABELS)
    before, attributes = snapshot(thing), names_and_ids(thing)
    for fault, message in SAYS.items():
        with pytest.raises(FedloraError, match=message) as error:
            thing.set_parameters(broken(sent(thing), fault))
        assert "nothing was changed" in str(error.value)
        assert differences(before, snapshot(thing)) == [], fault
        assert names_and_ids(thing) == attributes
    thing.set_parameters(sent(thing))  # and it still works


GARBAGE = [None, 7, "seven", b"seven", [], {}, (), object(), [1, 2], {"a": 1}, {1: 2}, {"a": None}]


@WORKING
def test_garbage(kind: type, fresh: Callable[..., nn.Module]) -> None:
    thing = kind(fresh())
    wrapped(thing, BOTH)
    before, attributes = snapshot(thing), names_and_ids(thing)
    for garbage in GARBAGE:
        with pytest.raises(Exception):  # noqa: B017, PT011  # ours or their own
            thing.set_parameters(copy.copy(garbage))
        assert differences(before, snapshot(thing)) == [], garbage
        assert names_and_ids(thing) == attributes


@WORKING
@COMPONENTS
def test_the_parameters_from_before_are_refused(
    kind: type, components: list[str], fresh: Callable[..., nn.Module]
) -> None:
    thing = kind(fresh())
    full = moved(sent(thing), lambda value: value + 1)
    wrapped(thing, components)
    before = snapshot(thing)
    with pytest.raises(FedloraError, match="do not fit this model, nothing was changed"):
        thing.set_parameters(full)
    assert differences(before, snapshot(thing)) == []


class Failing(own.StateDicts):
    """Fails when half is done, in more ways than one can list."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__(clip)
        self.adam = torch.optim.AdamW(self.parameters(), lr=0.1)
        self.rounds = 0

    def optimizer(self) -> torch.optim.Optimizer:
        return self.adam

    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        self.rounds += 1
        for state in self.adam.state.values():
            for value in state.values():
                value.zero_()
        self.adam.param_groups[0]["lr"] = 7
        self.adam = torch.optim.AdamW(self.parameters(), lr=0.2)
        for number, (name, parameter) in enumerate(list(self.named_parameters())):
            if number == 3:
                path, _, leaf = name.rpartition(".")
                delattr(self.get_submodule(path), leaf)
            elif number == 4:
                parameter.data = parameters[name].double()
            elif number > 4:
                raise KeyboardInterrupt
            else:
                parameter.data.copy_(parameters[name])


def test_an_exception_in_the_middle(fresh: Callable[..., nn.Module]) -> None:
    thing = Failing(fresh())
    wrapped(thing, ENCODER)
    thing.train_step(IMAGES, LABELS)
    before, attributes = snapshot(thing), names_and_ids(thing)
    order = list(thing.state_dict())
    with pytest.raises(KeyboardInterrupt):
        thing.set_parameters(moved(sent(thing), lambda value: value + 1))
    assert differences(before, snapshot(thing)) == []
    assert names_and_ids(thing) == attributes
    assert thing.rounds == 0
    assert list(thing.state_dict()) == order
    thing.train_step(IMAGES, LABELS)


def test_a_type_that_it_would_take_over_is_refused(fresh: Callable[..., nn.Module]) -> None:
    """Averages in float64, put in by reference, would change the model's type."""
    for kind in (own.Pointed, own.Assigned):
        thing = kind(fresh())
        wrapped(thing, ENCODER)
        before = snapshot(thing)
        double = moved(sent(thing), lambda v: torch.as_tensor(v).double())
        if kind is own.Pointed:
            double = [value.numpy() for value in double]
        with pytest.raises(FedloraError, match=r"is torch\.float64, expected torch\.float32"):
            thing.set_parameters(double)
        assert differences(before, snapshot(thing)) == []


def test_averages_in_another_type_that_it_converts_are_taken(
    fresh: Callable[..., nn.Module],
) -> None:
    thing = own.Copied(fresh())
    wrapped(thing, ENCODER)
    given = sent(thing)
    thing.set_parameters([value.astype(np.float64) for value in given])
    assert equal(sent(thing), given)


@pytest.mark.parametrize("how", ["read_only", "reversed", "object"])
def test_unusual_arrays(how: str, fresh: Callable[..., nn.Module]) -> None:
    thing = own.Arrays(fresh())
    wrapped(thing, ENCODER)
    given = [value + 1 for value in sent(thing)]
    expected = copy.deepcopy(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "read_only":
            for value in given:
                value.flags.writeable = False
            thing.set_parameters = thing.set_parameters
        with warnings.catch_warnings():
            # Its own torch.tensor() may warn or fail as it did before; ours must not.
            warnings.filterwarnings("ignore", module="tests")
            if how == "object":
                array = np.empty(len(given), dtype=object)
                array[:] = given
                thing.set_parameters(array)
                wrong = array.copy()
                wrong[-1] = wrong[-1][:1] if wrong[-1].ndim == 1 else wrong[-1][:, :1]
                with pytest.raises(FedloraError, match="has shape"):
                    thing.set_parameters(wrong)
                with pytest.raises(FedloraError, match="values, expected"):
                    thing.set_parameters(array[:-1])
            else:
                thing.set_parameters(given)
    assert equal(sent(thing), expected)


# Refused, in one line, and left as it was.


@pytest.mark.parametrize("kind", [own.Cached, own.CachedAndCounted])
@COMPONENTS
def test_a_class_that_looked_at_its_parameters_once_is_refused(
    kind: type, components: list[str], fresh: Callable[..., nn.Module]
) -> None:
    thing = kind(fresh())
    before, attributes = snapshot(thing), names_and_ids(thing)
    name = rf"{kind.__name__}\.get_parameters\(\) gives [\d,]+ numbers where the adapter has"
    with pytest.raises(FedloraError, match=name):
        wrapped(thing, components)
    assert differences(before, snapshot(thing)) == []
    assert names_and_ids(thing) == attributes


class TwoClips(own.StateDicts):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__(clip)
        self.teacher = copy.deepcopy(clip)


def test_two_clips(fresh: Callable[..., nn.Module]) -> None:
    with pytest.raises(FedloraError, match=r"TwoClips holds 2 CLIPs \(clip, teacher\)"):
        CLIPLoRAWrapper(TwoClips(fresh()))


def test_no_clip() -> None:
    class Nothing(nn.Module):
        pass

    for thing in (Nothing(), object(), None, [], nn.Linear(2, 2)):
        with pytest.raises(FedloraError, match=r"no CLIP .* Supported: CLIP \(clip\), SigLIP and"):
            CLIPLoRAWrapper(thing)


class Slotted(own.Plain):
    __slots__ = ("backbone", "fc")


class PlainSlots:
    """No instance dict: nothing can be hung into it."""

    __slots__ = ("backbone", "fc")

    def __init__(self, clip: nn.Module) -> None:
        self.backbone, self.fc = clip, nn.Linear(own.width(clip), own.CLASSES)

    modules = own.Plain.modules
    get_parameters = own.Plain.get_parameters
    set_parameters = own.Plain.set_parameters
    train_step = own.Plain.train_step
    evaluate = own.Plain.evaluate
    __call__ = own.Plain.__call__


class OpenSlots(PlainSlots):
    __slots__ = ("__dict__",)


def test_slots_with_a_dict_work(fresh: Callable[..., nn.Module]) -> None:
    for kind in (OpenSlots, Slotted):
        thing = kind(fresh())
        before = snapshot(thing)
        wrapper = wrapped(thing, BOTH)
        given = sent(thing)
        thing.set_parameters(moved(given, lambda value: value + 1))
        assert equal(sent(thing), moved(given, lambda value: value + 1))
        wrapper.unload()
        assert vars(thing).keys() <= {"backbone", "fc"}
        assert differences(before, snapshot(thing)) == []


def test_slots_alone_are_refused(fresh: Callable[..., nn.Module]) -> None:
    thing = PlainSlots(fresh())
    before = snapshot(thing)
    with pytest.raises(FedloraError, match="__slots__"):
        wrapped(thing, ENCODER)
    assert differences(before, snapshot(thing)) == []


class Fixed(own.Plain):
    """Lets nobody set its attributes, as a frozen dataclass."""

    def __init__(self, clip: nn.Module) -> None:
        vars(self).update(backbone=clip, fc=nn.Linear(own.width(clip), own.CLASSES))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"cannot assign to {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"cannot delete {name}")


def test_an_object_whose_attributes_cannot_be_set(fresh: Callable[..., nn.Module]) -> None:
    thing = Fixed(fresh())
    before, attributes = snapshot(thing), names_and_ids(thing)
    wrapper = wrapped(thing, ENCODER)
    assert sum(t.numel() for t in values(sent(thing))) == sum(
        t.numel() for t in wrapper.exchanged().values()
    )
    wrapper.unload()
    assert differences(before, snapshot(thing)) == []
    assert names_and_ids(thing) == attributes


class ByProperty(own.Net):
    """Its method comes from a property, which nothing on the instance can stand before."""

    @property
    def get_parameters(self) -> Callable[[], dict[str, Tensor]]:
        return lambda: {n: t.clone() for n, t in self.state_dict().items()}

    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        self.load_state_dict(parameters)


def test_methods_from_properties_are_refused(fresh: Callable[..., nn.Module]) -> None:
    thing = ByProperty(fresh())
    before, attributes = snapshot(thing), names_and_ids(thing)
    with pytest.raises(FedloraError, match="get_parameters"):
        wrapped(thing, ENCODER)
    assert differences(before, snapshot(thing)) == []
    assert names_and_ids(thing) == attributes


class Proxy:
    """Passes everything on to what it wraps."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def test_a_proxy(fresh: Callable[..., nn.Module]) -> None:
    thing = Proxy(own.Arrays(fresh()))
    full = thing.get_parameters()
    wrapper = wrapped(thing, BOTH)
    given = thing.get_parameters()
    assert len(given) == len(wrapper.exchanged())
    thing.set_parameters([value + 1 for value in given])
    assert equal(thing.get_parameters(), [value + 1 for value in given])
    wrapper.unload()
    assert vars(thing).keys() == {"inner"}
    assert equal(thing.get_parameters(), full)


class Taken(own.StateDicts):
    """Uses the wrapper's own name for something else."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__(clip)
        self.lora_wrapper = "mine"


def test_the_name_of_the_wrapper_may_be_taken(fresh: Callable[..., nn.Module]) -> None:
    thing = Taken(fresh())
    wrapper = wrapped(thing, ENCODER)
    assert thing.lora_wrapper == "mine"
    wrapper.unload()
    assert thing.lora_wrapper == "mine"


class Renamed(own.Plain):
    """Its head hangs in two places."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__(clip)
        self.layers = Plainly(self.fc)


class Plainly:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


def test_a_head_in_two_places_is_adapted_in_both(fresh: Callable[..., nn.Module]) -> None:
    thing = Renamed(fresh())
    base = thing.fc
    wrapper = wrapped(thing, BOTH)
    assert thing.fc is thing.layers.layer is not base
    wrapper.unload()
    assert thing.fc is thing.layers.layer is base


def test_a_head_in_a_dict_cannot_be_replaced(fresh: Callable[..., nn.Module]) -> None:
    class Loose(own.Plain):
        def __init__(self, clip: nn.Module) -> None:
            self.parts = {"backbone": clip, "fc": nn.Linear(own.width(clip), own.CLASSES)}

        modules = property(lambda self: self.parts)

    thing = Loose(fresh())
    before = snapshot(thing)
    with pytest.raises(FedloraError, match=r"'parts\.fc', which is no attribute"):
        wrapped(thing, BOTH)
    assert differences(before, snapshot(thing)) == []
    wrapped(thing, ENCODER)
    assert any(name.startswith("fc/") for name in sent(thing))


# Optimizers that it holds.


def ADAM(net: Any) -> Any:  # noqa: N802
    groups = [
        {"params": net.clip.parameters(), "lr": 1e-2},
        {"params": net.head.parameters(), "lr": 2e-2, "weight_decay": 0.5},
    ]
    adam = torch.optim.AdamW(groups)
    return [adam], torch.optim.lr_scheduler.StepLR(adam, 1, 0.9)


def sgd(net: Any) -> Any:
    return [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)], None


def lbfgs(net: Any) -> Any:
    return [torch.optim.LBFGS(net.parameters(), lr=0.05, max_iter=3)], None


def lbfgs_head_first(net: Any) -> Any:
    parameters = [*net.head.parameters(), *net.clip.parameters()]
    return [torch.optim.LBFGS(parameters, lr=0.05, max_iter=3)], None


def named(net: Any) -> Any:
    return [torch.optim.AdamW(net.named_parameters(), lr=1e-2)], None


def two(net: Any) -> Any:
    first = torch.optim.SGD(net.clip.parameters(), lr=0.05, momentum=0.9)
    return [first, torch.optim.AdamW(net.head.parameters(), lr=1e-2)], None


def head_only(net: Any) -> Any:
    net.clip.requires_grad_(False)
    return [torch.optim.AdamW(net.head.parameters(), lr=1e-2)], None


HELD = pytest.mark.parametrize(
    "make", [ADAM, sgd, lbfgs, lbfgs_head_first, named, two, head_only], ids=lambda m: m.__name__
)


@HELD
@COMPONENTS
@pytest.mark.parametrize("trained", [0, 2])
def test_optimizers_that_it_holds(
    make: Callable[[Any], Any],
    components: list[str],
    trained: int,
    fresh: Callable[..., nn.Module],
) -> None:
    thing = own.Holding(fresh(), make)
    twin = own.Holding(fresh(), make)
    for _ in range(trained):
        thing.train_step(IMAGES, LABELS)
        twin.train_step(IMAGES, LABELS)
    before = snapshot(thing)
    rates = [group["lr"] for o in thing.optimizers for group in o.param_groups]

    def states() -> list[dict[str, Any]]:
        return [o.state_dict() for o in thing.optimizers]

    saved = states()
    wrapper = wrapped(thing, components, seed=None)
    assert len(states()) == len(saved)
    learned = {n: t.clone() for n, t in wrapper.exchanged().items()}
    for _ in range(3):
        thing.train_step(IMAGES, LABELS)
    assert [n for n, t in wrapper.exchanged().items() if torch.equal(t, learned[n])] == []
    held = {id(p) for o in thing.optimizers for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for p in wrapper.trainable().values()}
    states()
    wrapper.disable_lora_layers()
    states()
    changed = differences(before, snapshot(thing))
    rest = [n for n in changed if "options" not in n and not n.endswith("training")]
    assert [n for n in rest if not state_of_head(n, thing)] == []
    wrapper.enable_lora_layers()
    states()
    wrapper.unload()
    # Trained on, it goes where its twin goes that was never wrapped, but for the scheduler's rates
    # and the head's momenta, which have seen more.
    for group, rate in zip(
        (g for o in thing.optimizers for g in o.param_groups), rates, strict=True
    ):
        group["lr"] = rate
    for one, other in zip(thing.optimizers, twin.optimizers, strict=True):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    for _ in range(2):
        thing.train_step(IMAGES, LABELS)
        twin.train_step(IMAGES, LABELS)
    if thing.scheduler is None:
        assert equal(sent(thing), sent(twin))


@pytest.mark.parametrize("full", [{"bias": "all"}, {"train_norm": True}], ids=str)
@pytest.mark.parametrize("make", [ADAM, sgd, lbfgs, named, two], ids=lambda m: m.__name__)
def test_they_train_what_is_trained_in_full_in_the_clip(
    make: Callable[[Any], Any], full: dict[str, Any], fresh: Callable[..., nn.Module]
) -> None:
    thing = own.Holding(fresh(), make)
    groups = [group for o in thing.optimizers for group in o.param_groups]
    before, held = snapshot(thing.clip), [list(map(id, group["params"])) for group in groups]
    wrapper = wrapped(thing, ENCODER, seed=None, **full)
    learned = {n: t.clone() for n, t in wrapper.exchanged().items()}
    assert any("layer_norm1" in name for name in learned)
    for _ in range(3):
        thing.train_step(IMAGES, LABELS)
    assert [n for n, t in wrapper.exchanged().items() if torch.equal(t, learned[n])] == []
    now = {id(p) for group in groups for p in group["params"]}
    assert now == {id(p) for p in wrapper.trainable().values()}
    trained = {n: t.clone() for n, t in wrapper.exchanged().items()}
    wrapper.disable_lora_layers()
    wrapper.enable_lora_layers()
    assert all(torch.equal(t, trained[n]) for n, t in wrapper.exchanged().items())
    wrapper.unload()
    changed = differences(before, snapshot(thing.clip))
    assert [name for name in changed if not name.endswith("training")] == []
    assert [list(map(id, group["params"])) for group in groups] == held


def state_of_head(name: str, thing: Any) -> bool:
    """Momenta of the head are its own in every phase."""
    return any(f" {id(p)} " in name for p in thing.head.parameters())


@HELD
@COMPONENTS
def test_off_and_on_makes_no_difference_to_training(
    make: Callable[[Any], Any], components: list[str], fresh: Callable[..., nn.Module]
) -> None:
    def run(between: Callable[[CLIPLoRAWrapper], None]) -> Any:
        thing = own.Holding(fresh(), make)
        for _ in range(2):
            thing.train_step(IMAGES, LABELS)
        wrapper = wrapped(thing, components)
        for _ in range(3):
            thing.train_step(IMAGES, LABELS)
        between(wrapper)
        for _ in range(3):
            thing.train_step(IMAGES, LABELS)
        states = [dict(o.state_dict()["state"]) for o in thing.optimizers]
        return sent(thing), [state[key] for state in states for key in sorted(state)]

    def off_and_on(wrapper: CLIPLoRAWrapper) -> None:
        for _ in range(2):
            wrapper.disable_lora_layers()
            wrapper.enable_lora_layers()

    (straight, momenta), (again, others) = run(lambda _: None), run(off_and_on)
    assert equal(straight, again)
    assert len(momenta) == len(others) > 0
    for one, other in zip(momenta, others, strict=True):
        assert one.keys() == other.keys()
        assert repr(one) == repr(other)


def test_an_adapter_takes_the_place_of_its_layer(fresh: Callable[..., nn.Module]) -> None:
    """The head's factors in the head's group, the encoder's in the encoder's."""
    for make in (ADAM, two):
        thing = own.Holding(fresh(), make)
        wrapper = wrapped(thing, BOTH)
        groups = [group for o in thing.optimizers for group in o.param_groups]
        factors = [p for part in ("A", "B") for p in wrapper.parameters[part].items()]
        head = {id(p) for name, p in factors if name == "head"}
        assert {id(p) for p in groups[1]["params"]} == head
        assert {id(p) for p in groups[0]["params"]} == {id(p) for _, p in factors} - head


def test_two_optimizers_of_a_head_are_not_clear(fresh: Callable[..., nn.Module]) -> None:
    def make(net: Any) -> Any:
        net.clip.requires_grad_(False)
        first = torch.optim.AdamW([net.head.weight], lr=1e-2)
        return [first, torch.optim.AdamW([net.head.bias], lr=1e-2)], None

    thing = own.Holding(fresh(), make)
    before, attributes = snapshot(thing), names_and_ids(thing)
    with pytest.raises(FedloraError, match="there are 2 optimizers and none of them holds"):
        wrapped(thing, ENCODER)
    assert differences(before, snapshot(thing)) == []
    assert names_and_ids(thing) == attributes


class ByScheduler(own.StateDicts):
    """Knows its optimizer through the scheduler alone."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__(clip)
        adam = torch.optim.AdamW(self.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(adam, 1)

    def optimizer(self) -> torch.optim.Optimizer:
        return self.scheduler.optimizer


def test_an_optimizer_behind_a_scheduler(fresh: Callable[..., nn.Module]) -> None:
    thing = ByScheduler(fresh())
    wrapper = wrapped(thing, ENCODER)
    before = sent(thing)
    thing.train_step(IMAGES, LABELS)
    assert not [n for n, t in sent(thing).items() if torch.equal(t, before[n])]
    wrapper.unload()
    held = [id(p) for g in thing.scheduler.optimizer.param_groups for p in g["params"]]
    assert held == [id(p) for p in thing.parameters()]


@COMPONENTS
@pytest.mark.parametrize("which", ["all", "wanting", "split"])
def test_an_optimizer_made_while_it_is_wrapped_trains_the_base_afterwards(
    components: list[str], which: str, fresh: Callable[..., nn.Module]
) -> None:
    thing = own.Holding(fresh(), lambda net: ([], None))
    wrapper = wrapped(thing, components)
    if which == "split":
        parts = [list(thing.clip.parameters()), list(thing.head.parameters())]
    elif which == "all":
        parts = [list(thing.parameters())]
    else:
        parts = [[p for p in thing.parameters() if p.requires_grad]]
    thing.optimizers = [torch.optim.SGD(part, lr=0.05, momentum=0.9) for part in parts]
    thing.train_step(IMAGES, LABELS)
    wrapper.disable_lora_layers()
    held = [[id(p) for g in o.param_groups for p in g["params"]] for o in thing.optimizers]
    expected = {id(p) for p in thing.parameters()}
    assert {i for ids in held for i in ids} == expected
    assert sum(map(len, held)) == len(expected)  # nothing twice
    if which == "split":
        assert set(held[1]) == {id(p) for p in thing.head.parameters()}
    [o.state_dict() for o in thing.optimizers]
    wrapper.enable_lora_layers()
    thing.train_step(IMAGES, LABELS)
    wrapper.unload()
    thing.train_step(IMAGES, LABELS)


class WithScale(own.Plain):
    """A parameter of its own, in no module."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__(clip)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def __call__(self, images: Tensor) -> Tensor:
        return self.scale * super().__call__(images)

    def get_parameters(self) -> dict[str, Tensor]:
        return {**super().get_parameters(), "scale": self.scale.detach().clone()}

    @torch.no_grad()
    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        self.scale.copy_(parameters.pop("scale"))
        super().set_parameters(parameters)


def test_a_loose_parameter_is_trained_and_travels(fresh: Callable[..., nn.Module]) -> None:
    thing = WithScale(fresh())
    wrapper = wrapped(thing, BOTH)
    assert any(t is thing.scale for t in wrapper.exchanged().values())
    given = sent(thing)
    wrong = {**given, "scale": torch.tensor(3.0)}
    wrong[next(iter(given))] = next(iter(given.values())) * float("nan")
    kept = thing.scale.detach().clone()
    with pytest.raises(FedloraError, match="NaN"):
        thing.set_parameters(wrong)
    assert torch.equal(thing.scale, kept)
    wrapper.unload()
    assert thing.scale == 1


# Copies and files.


@pytest.mark.parametrize("kind", [own.StateDicts, own.Plain, own.Norm, own.Lightning, own.Chain])
@COMPONENTS
def test_a_copy_for_each_client(
    kind: type, components: list[str], fresh: Callable[..., nn.Module]
) -> None:
    thing = kind(fresh())
    wrapped(thing, components)
    before = snapshot(thing)
    clients = [copy.deepcopy(thing) for _ in range(2)]
    clients[0].train_step(IMAGES, LABELS)
    after = sent(clients[0])
    assert differences(before, snapshot(thing)) == []
    assert equal(sent(clients[1]), sent(thing))
    assert not equal(after, sent(thing))
    clients[1].set_parameters(after)
    assert equal(sent(clients[1]), after)
    assert differences(before, snapshot(thing)) == []
    clients[1].train_step(IMAGES, LABELS)
    assert equal(sent(clients[0]), after)
    original = clients[0].lora_wrapper.unload()
    assert original is clients[0]
    assert not adapted_already(next(part for _, part in inside(original)))
    assert differences(before, snapshot(thing)) == []
    with pytest.raises(FedloraError, match="cannot be wrapped twice"):
        CLIPLoRAWrapper(clients[1])


@HELD
def test_a_copy_has_its_own_optimizers(
    make: Callable[[Any], Any], fresh: Callable[..., nn.Module]
) -> None:
    if make in (lbfgs, lbfgs_head_first):
        pytest.skip("torch cannot copy an LBFGS optimizer")
    thing = own.Holding(fresh(), make)
    thing.train_step(IMAGES, LABELS)
    wrapped(thing, ENCODER)
    thing.train_step(IMAGES, LABELS)
    before = snapshot(thing)
    client = copy.deepcopy(thing)
    client.scheduler = None
    client.train_step(IMAGES, LABELS)
    assert differences(before, snapshot(thing)) == []
    assert not equal(sent(client), sent(thing))
    client.lora_wrapper.unload()
    held = {id(p) for o in client.optimizers for g in o.param_groups for p in g["params"]}
    mine = {id(p) for p in client.parameters()}
    assert held <= mine
    assert differences(before, snapshot(thing)) == []


@pytest.mark.parametrize("kind", [own.StateDicts, own.Plain, own.Norm, own.Nested, own.Arrays])
@pytest.mark.parametrize("whole", ["object", "wrapper", "list"])
def test_through_a_file(kind: type, whole: str, fresh: Callable[..., nn.Module]) -> None:
    thing = kind(fresh())
    wrapper = wrapped(thing, BOTH)
    saved = {"object": thing, "wrapper": wrapper, "list": [wrapper, thing]}[whole]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    again = {"object": lambda: found, "wrapper": lambda: found.federated, "list": lambda: found[1]}
    back = again[whole]()
    assert equal(sent(back), sent(thing))
    thing.evaluate(IMAGES, LABELS)
    back.evaluate(IMAGES, LABELS)
    assert torch.equal(back(IMAGES), thing(IMAGES))
    before = snapshot(thing)
    back.train_step(IMAGES, LABELS)
    back.set_parameters(moved(sent(thing), lambda value: value + 1))
    assert differences(before, snapshot(thing)) == []
    back.lora_wrapper.unload()
    wrapper.unload()
    assert equal(sent(back), sent(thing))


def test_a_model_that_it_copies_in_its_own_method_is_whole(
    fresh: Callable[..., nn.Module],
) -> None:
    thing = own.Remembering(fresh())
    wrapped(thing, ENCODER)
    thing.set_parameters(sent(thing))
    kept = thing.memory["sent"]
    names = [n for n, _ in thing.clip.named_parameters()]
    assert [n for n, _ in kept.named_parameters()] == names
    assert list(kept.state_dict()) == list(thing.clip.state_dict())
    mine = {id(p) for p in kept.modules() for p in p._parameters.values()}
    assert {id(p) for p in kept.parameters()} <= mine
    before = snapshot(thing.clip)
    with torch.no_grad():
        for parameter in kept.parameters():
            parameter.add_(1)
    kept.load_state_dict({n: t + 1 for n, t in kept.state_dict().items()})
    assert differences(before, snapshot(thing.clip)) == []
    assert not torch.equal(kept.logit_scale, thing.clip.logit_scale)


def test_a_copy_that_it_keeps_does_not_stop_the_wrapper(fresh: Callable[..., nn.Module]) -> None:
    """A best model so far, say: a second CLIP, which came after the first was adapted."""
    thing = own.StateDicts(fresh())
    before = snapshot(thing)
    wrapper = wrapped(thing, ENCODER)
    thing.best = {"model": copy.deepcopy(thing.clip)}
    wrapper.disable_lora_layers()
    wrapper.enable_lora_layers()
    wrapper.unload()
    del thing.best
    assert differences(before, snapshot(thing)) == []


# Wrapping twice.


@pytest.mark.parametrize("kind", [own.StateDicts, own.Plain])
@pytest.mark.parametrize("off", [False, True])
def test_wrapping_twice(kind: type, off: bool, fresh: Callable[..., nn.Module]) -> None:
    thing = kind(fresh())
    wrapper = wrapped(thing, BOTH)
    given = sent(thing)
    if off:
        wrapper.disable_lora_layers()
    before, attributes = snapshot(thing), names_and_ids(thing)
    for again in (lambda: CLIPLoRAWrapper(thing).apply(), wrapper.apply):
        with pytest.raises(FedloraError, match="cannot be wrapped twice"):
            again()
    assert differences(before, snapshot(thing)) == []
    assert names_and_ids(thing) == attributes
    if off:
        wrapper.enable_lora_layers()
    assert equal(sent(thing), given)


def test_two_wrappers_made_before_either_is_applied(fresh: Callable[..., nn.Module]) -> None:
    thing = own.StateDicts(fresh())
    first, second = CLIPLoRAWrapper(thing), CLIPLoRAWrapper(thing)
    first.apply()
    given = sent(thing)
    for _ in range(2):
        with pytest.raises(FedloraError, match="cannot be wrapped twice"):
            second.apply()
        assert equal(thing.get_parameters(), given) or first.phase == "off"
        first.disable_lora_layers()
    first.enable_lora_layers()
    assert equal(sent(thing), given)


@pytest.mark.parametrize("other", [LoRAWrapper, CLIPLoRAWrapper])
def test_another_wrapper_that_came_while_it_was_off(
    other: type, fresh: Callable[..., nn.Module]
) -> None:
    """Of a part of the object: it is seen when the layers go on again, if not before."""
    inner = own.StateDicts(fresh())
    thing = Proxy(inner)
    first = wrapped(thing, ENCODER)
    given = sent(thing)
    first.disable_lora_layers()
    original = snapshot(inner)
    try:
        second = other(inner.clip if other is LoRAWrapper else inner).apply()
    except FedloraError:
        second = None
    if second is not None:
        before = snapshot(inner)
        with pytest.raises(FedloraError):
            first.enable_lora_layers()
        assert differences(before, snapshot(inner)) == []
        second.unload()
        assert differences(original, snapshot(inner)) == []
    first.enable_lora_layers()
    assert equal(sent(thing), given)


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_once_more_after_the_end(end: str, fresh: Callable[..., nn.Module]) -> None:
    thing = own.Holding(fresh(), ADAM)
    before, attributes = snapshot(thing), names_and_ids(thing)
    for _ in range(3):
        wrapper = wrapped(thing, BOTH)
        getattr(wrapper, end)()
        assert names_and_ids(thing) == attributes
    if end == "unload":
        assert differences(before, snapshot(thing)) == []
    with pytest.raises(FedloraError, match="Wrap the model anew"):
        wrapper.get_parameters()


# A whole federation, by hand.


@pytest.mark.parametrize("kind", [own.Arrays, own.StateDicts, own.Norm, own.Plain])
@COMPONENTS
def test_federated_averaging_by_hand(
    kind: type, components: list[str], fresh: Callable[..., nn.Module]
) -> None:
    clients = [kind(fresh()) for _ in range(3)]
    for number, client in enumerate(clients):
        wrapped(client, components, seed=number)
    base = {n: v for n, v in snapshot(clients[0]).items() if "base_layer" in n or "clip" in n}
    base = {n: v for n, v in base.items() if isinstance(v, Tensor) and "lora_" not in n}
    assert len(base) > 20 or kind is own.Plain
    data = [(pictures(6, seed).float() / 255 - 0.5, LABELS.roll(seed)) for seed in range(3)]
    samples = [1, 2, 3]
    for _ in range(2):
        start = sent(clients[0])
        for client, (images, labels) in zip(clients, data, strict=True):
            client.set_parameters(copy.deepcopy(start))
            assert equal(sent(client), start)
            for _ in range(2):
                client.train_step(images, labels)
        updates = [sent(client) for client in clients]
        if isinstance(start, dict):
            mean = {
                n: sum(w * u[n] for w, u in zip(samples, updates, strict=True)) / 6 for n in start
            }
        else:
            columns = zip(*updates, strict=True)
            mean = [sum(w * u for w, u in zip(samples, c, strict=True)) / 6 for c in columns]
        expected = [
            sum(w * values(u)[i].double() for w, u in zip(samples, updates, strict=True)) / 6
            for i in range(len(values(start)))
        ]
        for client in clients:
            client.set_parameters(mean)
            for got, want in zip(values(sent(client)), expected, strict=True):
                torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)
    first = snapshot(clients[0])
    assert [n for n, v in base.items() if not torch.equal(v, first[n])] == []
    assert (
        len(
            {
                tuple(client(IMAGES).flatten().tolist())
                for client in clients
                if not client.evaluate(IMAGES, LABELS) < 0
            }
        )
        == 1
    )


def test_fedprox_pulls_towards_what_the_server_sent(fresh: Callable[..., nn.Module]) -> None:
    """Its anchors were listed in set_parameters and are paired in train_step."""
    thing = own.Proximal(fresh())
    wrapper = wrapped(thing, ENCODER)
    given = sent(thing)
    thing.set_parameters(given)
    assert equal([a.numpy() for a in thing.anchor], given)
    for _ in range(3):
        thing.train_step(IMAGES, LABELS)
    assert len(thing.anchor) == len(wrapper.exchanged())


def test_its_class_is_not_touched(fresh: Callable[..., nn.Module]) -> None:
    source = {n: v for n, v in vars(own.StateDicts).items() if callable(v)}
    thing = own.StateDicts(fresh())
    other = own.StateDicts(fresh())
    wrapped(thing, BOTH)
    assert {n: v for n, v in vars(own.StateDicts).items() if callable(v)} == source
    assert type(thing) is own.StateDicts
    assert len(other.get_parameters()) == len(other.state_dict())
    assert inspect.signature(type(thing).set_parameters) == inspect.signature(
        own.StateDicts.set_parameters
    )
