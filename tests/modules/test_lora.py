from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.modules.config import LoRAConfig
from fedlora.modules.lora import LoRAWrapper
from fedlora.state import AdapterState, Residual

TARGETS = ["block.fc1", "block.fc2"]
ALL = {"A", "B", "other"}


class Net(nn.Module):
    """Layers of different widths, 5 -> 7 -> 4 -> 3, and one whose name ends like a target's."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"fc1": nn.Linear(5, 7), "fc2": nn.Linear(7, 4, bias=False)})
        self.norm = nn.LayerNorm(4)
        self.fc1 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(self.norm(self.block["fc2"](torch.relu(self.block["fc1"](x)))))


def make(head: nn.Module | None = None, **config: object) -> LoRAWrapper:
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.0} | config
    other = {} if head is None else {f"head.{n}": p for n, p in head.named_parameters()}
    return LoRAWrapper(Net(), LoRAConfig(**settings), TARGETS, other).apply()  # type: ignore[arg-type]


def shaken(state: AdapterState, seed: int = 0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t + torch.randn(t.shape, generator=generator) for n, t in tensors.items()}

    return AdapterState(moved(state.A), moved(state.B), moved(state.other), state.scaling)


def same(one: AdapterState, two: AdapterState) -> bool:
    first, second = dict(one.tensors()), dict(two.tensors())
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def weight(lora: LoRAWrapper, name: str) -> Tensor:
    return lora.base_weights()[name].clone()


def test_exactly_the_targets_are_adapted() -> None:
    lora = make()
    assert list(lora.layers) == TARGETS
    assert type(lora.model.fc1) is nn.Linear  # "fc1" at the end of a target's name only
    state = lora.state()
    assert {n: tuple(t.shape) for n, t in state.A.items()} == {
        "block.fc1": (2, 5),  # (r, in)
        "block.fc2": (2, 7),
    }
    assert {n: tuple(t.shape) for n, t in state.B.items()} == {
        "block.fc1": (7, 2),  # (out, r)
        "block.fc2": (4, 2),
    }
    assert state.other == {}
    assert all((t == 0).all() for t in state.B.values())
    assert all((t != 0).any() for t in state.A.values())


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 2), (True, 6 / math.sqrt(2))])
def test_the_forward_pass_is_w_plus_scaled_product(rslora: bool, scaling: float) -> None:
    lora = make(use_rslora=rslora)
    assert lora.scaling == dict.fromkeys(TARGETS, pytest.approx(scaling))
    lora.load(shaken(lora.state()))
    state, layer = lora.state(), lora.layers["block.fc1"]
    x = torch.randn(3, 5)
    W = weight(lora, "block.fc1") + scaling * state.B["block.fc1"] @ state.A["block.fc1"]
    torch.testing.assert_close(layer(x), x @ W.T + layer.get_base_layer().bias)


def test_the_base_is_frozen() -> None:
    lora = make()
    trained = {name for name, p in lora.model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{f}.default.weight" for name in TARGETS for f in "AB"}


@pytest.mark.parametrize("parts", [{"A"}, {"B"}, {"other"}, {"B", "other"}, ALL, set()])
def test_set_trainable_switches_gradients_by_part(parts: set[str]) -> None:
    lora = make(nn.Linear(2, 2))
    lora.set_trainable(parts)  # type: ignore[arg-type]
    by_part = {
        "A": {f"A/{name}" for name in TARGETS},
        "B": {f"B/{name}" for name in TARGETS},
        "other": {"other/head.weight", "other/head.bias"},
    }
    assert set(lora.trainable()) == {name for part in parts for name in by_part[part]}
    assert lora.state().A.keys() == set(TARGETS)  # the state is whole all the same
    lora.set_trainable({"A", "B", "other"})
    assert set(lora.trainable()) == {name for names in by_part.values() for name in names}


@pytest.mark.parametrize(
    ("bias", "train_norm", "names"),
    [
        ("none", False, set()),
        ("lora_only", False, {"block.fc1.bias"}),  # fc2 has none
        ("all", False, {"block.fc1.bias", "norm.bias", "fc1.bias"}),
        ("none", True, {"norm.weight", "norm.bias"}),
        ("lora_only", True, {"block.fc1.bias", "norm.weight", "norm.bias"}),
        ("all", True, {"block.fc1.bias", "norm.weight", "norm.bias", "fc1.bias"}),
    ],
)
def test_what_of_the_model_is_trained_in_full(bias: str, train_norm: bool, names: set[str]) -> None:
    lora = make(bias=bias, train_norm=train_norm)
    assert set(lora.state().other) == names
    assert {n for n in lora.trainable() if n.startswith("other/")} == {f"other/{n}" for n in names}
    if train_norm:
        lora.load(AdapterState(other={"norm.weight": torch.full((4,), 3.0)}))
        assert (lora.model.norm.weight == 3).all()
        with lora.lora_disabled():
            assert (lora.model.norm.weight == 1).all()
    if bias != "none":
        lora.load(AdapterState(other={"block.fc1.bias": torch.full((7,), 2.0)}))
        assert (lora.layers["block.fc1"].get_base_layer().bias == 2).all()


def test_a_layer_that_was_replaced_while_off_is_not_overwritten() -> None:
    lora = make()
    lora.disable_lora_layers()
    mine = lora.model.block["fc2"] = nn.Linear(7, 4)
    with pytest.raises(FedloraError, match=r"block\.fc2 was replaced while the adapter was off"):
        lora.enable_lora_layers()
    assert lora.model.block["fc2"] is mine


def test_state_is_a_copy() -> None:
    lora = make()
    before = lora.state()
    kept = shaken(before)
    lora.load(kept)
    assert all((t == 0).all() for t in before.B.values())
    state = lora.state()
    state.A["block.fc1"].zero_()
    assert same(lora.state(), kept)


def test_state_and_load_agree_to_the_bit() -> None:
    one, two = make(nn.Linear(2, 2), bias="all"), make(nn.Linear(2, 2), bias="all")
    residual = {"block.fc2": Residual(torch.randn(4, 1), torch.randn(1, 7))}
    state = shaken(one.state())
    state = AdapterState(state.A, state.B, state.other, state.scaling, residual)
    one.load(state)
    two.load(one.state())
    assert same(one.state(), state)
    assert same(two.state(), state)
    assert two.state().scaling == state.scaling
    assert two.state().residual == residual
    x = torch.randn(6, 5)
    assert torch.equal(one.model(x), two.model(x))


def test_a_partial_state_leaves_the_rest_alone() -> None:
    lora = make(nn.Linear(2, 2))
    whole = shaken(lora.state())
    lora.load(whole)
    other = shaken(whole, seed=1)
    lora.load(AdapterState(B={"block.fc2": other.B["block.fc2"]}))
    after = lora.state()
    assert torch.equal(after.B["block.fc2"], other.B["block.fc2"])
    assert torch.equal(after.B["block.fc1"], whole.B["block.fc1"])
    assert same(after.only({"A", "other"}), whole.only({"A", "other"}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"A": {"block.fc9": torch.ones(2, 5)}}, "A of 'block.fc9' is not trained here"),
        (
            {"B": {"block.fc2": torch.ones(4, 3)}},
            r"B of 'block.fc2' has shape \(4, 3\), expected \(4, 2\)",
        ),
        ({"other": {"fc1.bias": torch.ones(3)}}, r"other of 'fc1.bias' is not trained here"),
        (
            {"residual": {"fc1": Residual(torch.ones(3, 4))}},
            "the residual of 'fc1' has no adapted layer here",
        ),
        (
            {"residual": {"block.fc1": Residual(torch.ones(5, 7))}},
            r"the residual of 'block.fc1' has shape \(5, 7\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_half_set(
    wrong: dict[str, dict[str, Tensor]], message: str
) -> None:
    lora = make()
    before, W = lora.state(), weight(lora, "block.fc1")
    good = shaken(before)
    parts = {"A": dict(good.A), "B": dict(good.B), "other": {}, "residual": {}}
    parts["residual"] = {"block.fc1": Residual(torch.ones(7, 5))}
    for part, tensors in wrong.items():
        parts[part] |= tensors
    with pytest.raises(FedloraError, match=message):
        lora.load(AdapterState(**parts))
    assert same(lora.state(), before)
    assert lora.state().residual == {}
    assert torch.equal(weight(lora, "block.fc1"), W)


def test_many_faults_are_counted() -> None:
    names = {f"x{i}": torch.ones(1) for i in range(7)}
    with pytest.raises(FedloraError, match=r"'x4' is not trained here \(and 2 more\)"):
        make().load(AdapterState(other=names))


def test_a_residual_is_served_beside_the_pristine_weight() -> None:
    lora = make()
    W0 = weight(lora, "block.fc1")
    R = torch.randn(7, 5)
    lora.served.serve({"block.fc1": Residual(R)})
    assert torch.equal(weight(lora, "block.fc1"), W0 + R)
    assert torch.equal(lora.state().residual["block.fc1"].dense(), R)
    lora.served.serve({})
    assert torch.equal(weight(lora, "block.fc1"), W0)
    assert lora.state().residual == {}


def test_thin_and_dense_serve_the_same() -> None:
    U, V = torch.randn(7, 2), torch.randn(2, 5)
    thin, dense = make(), make()
    thin.served.serve({"block.fc1": Residual(U, V)})
    dense.served.serve({"block.fc1": Residual(U @ V)})
    assert torch.equal(weight(thin, "block.fc1"), weight(dense, "block.fc1"))


def test_ten_rounds_of_changing_residuals_do_not_drift() -> None:
    lora = make()
    W0 = {name: weight(lora, name) for name in TARGETS}
    shapes = {"block.fc1": (7, 5), "block.fc2": (4, 7)}
    for i in range(10):
        # Large and small by turns: added to what is there, they would lose bits of W0.
        residual = {n: Residual(torch.randn(s) * 10.0 ** (i % 5)) for n, s in shapes.items()}
        if i % 3 == 2:
            del residual["block.fc2"]
        lora.served.serve(residual)
        for name in TARGETS:
            R = residual[name].dense() if name in residual else torch.zeros(shapes[name])
            assert torch.equal(weight(lora, name), W0[name] + R)
    lora.served.serve({})
    assert all(torch.equal(weight(lora, name), W0[name]) for name in TARGETS)


def test_an_adapter_without_a_residual_takes_the_old_one_away() -> None:
    lora = make()
    W0, state = weight(lora, "block.fc1"), lora.state()
    lora.served.serve({"block.fc1": Residual(torch.ones(7, 5))})
    lora.load(state)
    assert torch.equal(weight(lora, "block.fc1"), W0)


def test_switched_off_everything_is_trained_and_exchanged() -> None:
    lora = make(enabled=False)
    assert lora.layers == {}
    state = lora.state()
    assert set(state.other) == set(dict(Net().named_parameters()))
    assert state.A == state.B == state.scaling == {}
    assert all(p.requires_grad for p in lora.model.parameters())
    moved = shaken(state)
    lora.load(moved)
    assert same(lora.state(), moved)
    assert torch.equal(lora.model.fc1.weight, moved.other["fc1.weight"])


def test_a_wrong_setting_is_refused_before_the_model_changes() -> None:
    net = Net()
    with pytest.raises(FedloraError, match=r"lora\.r"):
        LoRAWrapper(net, LoRAConfig(r=0), TARGETS)
    assert type(net.block["fc1"]) is nn.Linear
    assert all(p.requires_grad for p in net.parameters())


def test_dropout_is_keyed_by_step_and_layer() -> None:
    lora = make(lora_dropout=0.5)
    lora.load(shaken(lora.state()))
    lora.model.train()
    x = torch.randn(4, 5)

    def run(key: int | None, step: int = 0) -> Tensor:
        lora.set_dropout_key(key, step)
        return lora.model(x)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(1, step=0), run(1, step=1))
    assert not torch.equal(run(None), run(None))
    lora.model.eval()
    assert torch.equal(run(1), run(2))
