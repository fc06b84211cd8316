"""What holds for every setting of an adapter, on the small CLIP and on nets of other kinds."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.config import LoRAConfig
from fedlora.modules.lora import LoRAWrapper
from fedlora.state import Residual
from tests.small_clip import DIM, LAYERS, NAMES, TEMPLATES, TEXT, VISION, pictures, shake
from tests.small_nets import NETS, equal, inputs, make_net, snapshot, train, wrap

EXAMPLES = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the thread count
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
LORA = {
    "r": st.integers(1, 9),
    "lora_alpha": st.floats(0.5, 32),
    "lora_dropout": st.sampled_from([0.0, 0.1, 0.5]),
    "use_rslora": st.booleans(),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "train_norm": st.booleans(),
}
# Merged, a product is rounded where it was added up in pieces before.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}

# CLIP.

WIDTHS = {"vision": (VISION, 40), "text": (TEXT, 36)}
KINDS = {"mlp": 2, "attention": 4, "all": 6}


@st.composite
def clips(draw: st.DrawFn) -> dict[str, Any]:
    """A head, towers, a type and an adapter's settings that go together."""
    head = draw(st.sampled_from(["linear", "text"]))
    components = [["encoder"], ["encoder", "classifier"], ["classifier"]]
    lora = {name: draw(strategy) for name, strategy in LORA.items()}
    lora["target_components"] = draw(st.sampled_from(components[: 3 if head == "linear" else 1]))
    lora["placement"] = draw(st.sampled_from(list(KINDS)))
    lora["layers"] = draw(st.sampled_from([None, [0], [-1], [0, 1]]))
    towers = draw(st.sampled_from([None, "vision", "both"]))
    return {"head": head, "towers": towers, "dtype": draw(DTYPES), "lora": lora}


@cache
def base(folder: Path, head: str, dtype: torch.dtype) -> FederatedCLIPModel:
    """Loaded once; never changed."""
    model = FederatedCLIPModel(str(folder), head=head, class_names=NAMES, templates=TEMPLATES)  # type: ignore[arg-type]
    return model.to(dtype).eval()


def make_clip(folder: Path, case: dict[str, Any]) -> CLIPLoRAWrapper:
    model = copy.deepcopy(base(folder, case["head"], case["dtype"]))
    return CLIPLoRAWrapper(model, LoRAConfig(**case["lora"]), towers=case["towers"]).apply()


def counts(model: FederatedCLIPModel, case: dict[str, Any]) -> tuple[int, int, int]:
    """By formula: parameters of the adapter, those trained in full, those that travel."""
    lora = case["lora"]
    components, r, bias = lora["target_components"], lora["r"], lora["bias"]
    blocks = LAYERS if lora["layers"] in (None, [0, 1]) else 1
    towers = ["vision"] if case["towers"] == "vision" else ["vision", "text"]
    factors, biases = {}, dict.fromkeys(("vision", "text", "head"), 0)
    for tower in towers if "encoder" in components else []:
        width, inner = WIDTHS[tower]
        mlp, attention = 2 * (width + inner), 4 * 2 * width
        factors[tower] = (
            r
            * blocks
            * {"mlp": mlp, "attention": attention}.get(lora["placement"], mlp + attention)
        )
        biases[tower] = blocks * {"mlp": inner + width, "attention": 4 * width}.get(
            lora["placement"], inner + 5 * width
        )
    if "classifier" in components:
        rank = 8 if "encoder" in components else r
        factors["head"] = rank * (DIM + len(NAMES))
        biases["head"] = len(NAMES)
    if bias == "all":
        for part, prefix in (("vision", "clip.vis"), ("text", "clip.text"), ("head", "classifier")):
            named = (p for n, p in model.named_parameters() if n.startswith(prefix) and "bias" in n)
            biases[part] = sum(parameter.numel() for parameter in named)
        if case["towers"] == "vision":  # the text tower is not touched at all
            biases["text"] = 0
    if bias == "none":
        biases = dict.fromkeys(biases, 0)
    # Two in each block and one after it, in front of the vision tower one more: weight and bias,
    # of which "all" has counted the bias.
    held = {"vision": VISION * (2 * LAYERS + 2), "text": TEXT * (2 * LAYERS + 1)}
    layers = {t: held[t] * (1 if bias == "all" else 2) * lora["train_norm"] for t in towers}
    full = sum(biases.values()) + sum(layers.values())
    if case["head"] == "linear" and "classifier" not in components:
        # Trained in full, with its bias, whatever the setting.
        full += DIM * len(NAMES) + (0 if bias == "all" else len(NAMES))
    adapter = sum(factors.values())
    text = factors.get("text", 0) + biases["text"] + layers.get("text", 0)
    idle = text if case["towers"] is None and case["head"] == "linear" else 0
    return adapter, full, adapter + full - idle


@EXAMPLES
@given(case=clips())
def test_clip_parameters_go_round_to_the_bit(folder: Path, case: dict[str, Any]) -> None:
    one, two = make_clip(folder, case), make_clip(folder, case)
    shake(one)
    parameters = one.federated.get_parameters()
    two.federated.set_parameters(parameters)
    assert equal(two.federated.get_parameters(), parameters)
    assert all(t.dtype == case["dtype"] for t in parameters.values())
    assert torch.equal(one.federated(pictures()), two.federated(pictures()))


@EXAMPLES
@given(case=clips())
def test_clip_counts_are_what_the_formulas_say(folder: Path, case: dict[str, Any]) -> None:
    lora = make_clip(folder, case)
    adapter, full, travels = counts(base(folder, case["head"], case["dtype"]), case)
    report = lora.report()
    assert (report.adapter, report.full, report.exchanged) == (adapter, full, travels)
    size = case["dtype"].itemsize
    assert report.exchanged_nbytes == travels * size
    given_back = lora.federated.get_parameters()
    assert sum(t.numel() for t in given_back.values()) == travels
    plain = base(folder, case["head"], case["dtype"])
    assert report.total == sum(p.numel() for p in plain.parameters())
    assert lora.state().nbytes == 4 * travels


@EXAMPLES
@given(case=clips())
def test_clip_off_is_the_untouched_model(folder: Path, case: dict[str, Any]) -> None:
    lora, plain = make_clip(folder, case), base(folder, case["head"], case["dtype"])
    shake(lora)
    on, before = lora.federated(pictures()), snapshot(lora.federated)
    with lora.lora_disabled():
        assert equal(snapshot(lora.federated), snapshot(plain))
        assert torch.equal(lora.federated(pictures()), plain(pictures()))
        assert equal(lora.federated.get_parameters(), plain.get_parameters())
    assert torch.equal(lora.federated(pictures()), on)
    assert equal(snapshot(lora.federated), before)


@EXAMPLES
@given(case=clips())
def test_clip_undone_is_as_it_was(folder: Path, case: dict[str, Any]) -> None:
    plain = base(folder, case["head"], case["dtype"])
    lora = make_clip(folder, case)
    shake(lora)
    model = lora.unload()
    assert equal(snapshot(model), snapshot(plain))
    assert list(vars(model)) == list(vars(plain))
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in plain.parameters()
    ]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@EXAMPLES
@given(case=clips())
def test_clip_merged_predicts_the_same(folder: Path, case: dict[str, Any]) -> None:
    lora = make_clip(folder, case)
    shake(lora, size=0.02)
    expected = lora.federated(pictures())
    merged = lora.merge_and_unload()
    assert merged is lora.federated
    tolerance = TOLERANCE[case["dtype"]]
    scale = max(1.0, float(expected.detach().abs().max()))
    assert float((merged(pictures()) - expected).detach().abs().max()) <= tolerance * scale
    assert list(merged.state_dict()) == list(base(folder, case["head"], case["dtype"]).state_dict())


# Any net.


@st.composite
def nets(draw: st.DrawFn) -> dict[str, Any]:
    """A net, some of its layers, a type and an adapter's settings."""
    kind = draw(st.sampled_from(list(NETS)))
    # "conv1" would be the ending of another name too.
    able = [name for name in NETS[kind].layers if name != "conv1"]
    names = st.lists(st.sampled_from(able), min_size=1, unique=True)
    lora = {name: draw(strategy) for name, strategy in LORA.items()}
    lora["target_modules"] = draw(st.none() | names)
    return {"kind": kind, "dtype": draw(DTYPES), "lora": lora}


@cache
def plain_net(kind: str, dtype: torch.dtype) -> nn.Module:
    """Made once; never changed."""
    return make_net(kind, dtype).eval()


def make(case: dict[str, Any], residual: bool = False) -> LoRAWrapper:
    lora = wrap(copy.deepcopy(plain_net(case["kind"], case["dtype"])), **case["lora"])
    shake(lora)
    if residual:
        lora.served.serve(
            {n: Residual(torch.ones(len(W), 1) / 8, W[:1].float()) for n, W in weights(lora)}
        )
    return lora


def weights(lora: LoRAWrapper) -> list[tuple[str, Tensor]]:
    return [(name, weight.clone()) for name, weight in lora.base_weights().items()]


def answer(model: nn.Module, case: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(inputs(case["kind"], dtype=case["dtype"]))
    return logits.nan_to_num()  # a step in half precision may end in NaN, which equals nothing


@EXAMPLES
@given(case=nets())
def test_parameters_go_round_to_the_bit(case: dict[str, Any]) -> None:
    one, two = make(case), make(case)
    train(one, case["kind"], steps=1)
    parameters = one.get_parameters()
    two.set_parameters(parameters)
    assert equal(two.get_parameters(), parameters)
    assert all(t.dtype == case["dtype"] for t in parameters.values())
    assert torch.equal(answer(one.model, case), answer(two.model, case))


@EXAMPLES
@given(case=nets(), residual=st.booleans())
def test_a_state_goes_round_to_the_bit(case: dict[str, Any], residual: bool) -> None:
    case["dtype"] = torch.float32
    one, two = make(case, residual), make(case)
    two.load(one.state())
    assert equal(dict(two.state().tensors()), dict(one.state().tensors()))
    assert torch.equal(answer(one.model, case), answer(two.model, case))


@EXAMPLES
@given(case=nets())
def test_counts_are_what_the_formulas_say(case: dict[str, Any]) -> None:
    lora, kind = make(case), NETS[case["kind"]]
    chosen = case["lora"]["target_modules"] or list(kind.layers)
    assert set(lora.layers) == set(chosen)
    expected = sum(i * k + o for n, (i, o, k) in kind.layers.items() if n in chosen)
    report = lora.report()
    assert report.adapter == case["lora"]["r"] * expected
    assert report.exchanged_nbytes == report.exchanged * case["dtype"].itemsize
    assert report.exchanged == sum(t.numel() for t in lora.get_parameters().values())


@EXAMPLES
@given(case=nets(), residual=st.booleans())
def test_off_is_the_untouched_model(case: dict[str, Any], residual: bool) -> None:
    lora, plain = make(case, residual), plain_net(case["kind"], case["dtype"])
    train(lora, case["kind"], steps=1)
    on, before = answer(lora.model, case), snapshot(lora.model)
    with lora.lora_disabled():
        assert equal(snapshot(lora.model), snapshot(plain))
        assert torch.equal(answer(lora.model, case), answer(plain, case))
    assert torch.equal(answer(lora.model, case), on)
    assert equal(snapshot(lora.model), before)


@EXAMPLES
@given(case=nets(), residual=st.booleans())
def test_undone_is_as_it_was(case: dict[str, Any], residual: bool) -> None:
    lora, plain = make(case, residual), plain_net(case["kind"], case["dtype"])
    train(lora, case["kind"], steps=1)
    model = lora.unload()
    assert equal(snapshot(model), snapshot(plain))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@EXAMPLES
@given(case=nets(), residual=st.booleans())
def test_merged_predicts_the_same(case: dict[str, Any], residual: bool) -> None:
    lora = make(case, residual)
    expected = answer(lora.model, case)
    merged = answer(lora.merge_and_unload(), case)
    scale = max(1.0, float(expected.abs().max()))
    assert float((merged - expected).abs().max()) <= TOLERANCE[case["dtype"]] * scale


@pytest.mark.parametrize("kind", NETS)
def test_the_untouched_models_were_not_touched(kind: str) -> None:
    """Also guards the others: what they compare with is never changed."""
    for dtype in TOLERANCE:
        assert equal(snapshot(plain_net(kind, dtype)), snapshot(make_net(kind, dtype)))
