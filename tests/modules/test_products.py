"""Products against the algebra that autograd differentiates by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.modules import products
from fedlora.modules.products import AdaptedProduct, FrozenProduct

# Whole vectors, in whose products a row's bits depend neither on where it lies nor on how many
# there are. Not with a single row, which is another kind of product.
IN, OUT, RANK = 32, 48, 8
LANES = {"one": [12], "equal": [4, 4, 4], "unequal": [2, 6, 4]}
SCALES = [0.5, 2.0, -1.5]


@dataclass(frozen=True)
class Case:
    """What the product is of; x (6, 2, in), so 12 rows."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    mask: Tensor | None
    scales: Sequence[float]
    counts: Sequence[int]

    def run(self, function: Any, grad: Tensor | None = None) -> dict[str, Tensor]:
        """The output, and the gradients of what wants them."""
        x, A, B = (t.detach().requires_grad_(t.requires_grad) for t in (self.x, self.A, self.B))
        y = function(x, self.weight, self.bias, A, B, self.mask, self.scales, self.counts)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).sin().view_as(y))
        found = {"y": y.detach(), "x": x.grad, "A": A.grad, "B": B.grad}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def make(
    lanes: str = "unequal",
    dtype: torch.dtype = torch.float64,
    *,
    mask: bool = True,
    bias: bool = True,
    scales: Sequence[float] = SCALES,
) -> Case:
    counts = LANES[lanes]
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, weight, b = draw(6, 2, IN).requires_grad_(), draw(OUT, IN), draw(OUT)
    A = draw(len(counts), RANK, IN).requires_grad_()
    B = draw(len(counts), OUT, RANK).requires_grad_()
    kept = (torch.rand(x.shape, generator=generator) < 0.7).to(torch.int16)
    given = scales[: len(counts)]
    return Case(x, weight, b if bias else None, A, B, kept if mask else None, given, counts)


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    mask: Tensor | None,
    scales: Sequence[float],
    counts: Sequence[int],
) -> Tensor:
    """As it is written down, lane by lane."""
    flat = x.reshape(-1, x.shape[-1])
    seen = flat if mask is None else flat * mask.reshape(flat.shape)
    parts = zip(seen.split(list(counts)), A, B, scales, strict=True)
    y = flat @ weight.T + torch.cat([s * (part @ a.T @ b.T) for part, a, b, s in parts])
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        close = {"rtol": 1e-12, "atol": 1e-12}
        if tensor.dtype == torch.float32:
            close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(found[name], tensor, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scales", [SCALES, [2.0, 2.0, 2.0]], ids=["scales", "scale"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize("lanes", LANES)
def test_an_adapted_product_is_the_plain_algebra(
    lanes: str, mask: bool, bias: bool, scales: list[float], dtype: torch.dtype
) -> None:
    case = make(lanes, dtype, mask=mask, bias=bias, scales=scales)
    found = case.run(AdaptedProduct.apply)
    compare(found, case.run(plain))
    assert found.keys() == {"y", "x", "A", "B"}


@pytest.mark.parametrize("lanes", LANES)
def test_gradients_are_those_of_finite_differences(lanes: str) -> None:
    case = make(lanes)
    thin = replace(case, weight=case.weight[:3], bias=torch.ones(3, dtype=torch.float64))
    A, B = case.A.detach()[:, :2].requires_grad_(), case.B.detach()[:, :3, :2].requires_grad_()

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        rest = (thin.mask, thin.scales, thin.counts)
        return AdaptedProduct.apply(x, thin.weight, thin.bias, A, B, *rest)

    assert torch.autograd.gradcheck(function, (case.x, A, B), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, IN), (3, 4, IN), (IN,), (2, 3, 2, IN)], ids=str)
def test_a_frozen_product_is_that_of_a_linear_layer(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    weight, b = torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)
    y = FrozenProduct.apply(x, weight, b if bias else None)
    expected = nn.functional.linear(twin, weight, b if bias else None)
    y.square().sum().backward()
    expected.square().sum().backward()
    compare({"y": y.detach(), "x": x.grad}, {"y": expected.detach(), "x": twin.grad})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_any_layout_in_memory(dtype: torch.dtype) -> None:
    """Heads that were transposed, rows that are repeated, gradients of a sum."""
    case = make(dtype=dtype)
    turned = case.x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    assert not turned.is_contiguous()
    strided = case.weight.T.contiguous().T
    other = replace(case, x=turned, weight=strided)
    compare(other.run(AdaptedProduct.apply), case.run(plain))

    row = torch.randn(1, 1, IN, dtype=dtype)
    found = []
    for function in (AdaptedProduct.apply, plain):
        x, A, B = row.clone().requires_grad_(), *(t.detach().clone() for t in (case.A, case.B))
        rest = (A.requires_grad_(), B.requires_grad_(), case.mask, case.scales, case.counts)
        function(x.expand(6, 2, IN), case.weight, case.bias, *rest).sum().backward()
        found.append({"x": x.grad, "A": A.grad, "B": B.grad})
    compare(*found)

    found = []
    for frozen in (FrozenProduct.apply, nn.functional.linear):
        x = row.clone().requires_grad_()
        frozen(x.expand(6, 2, IN), strided, case.bias).sum().backward()
        found.append({"x": x.grad})
    compare(*found)


@pytest.mark.parametrize("wanted", ["x", "A", "B", "AB", "xA", "xB"])
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no-mask"])
def test_what_nobody_wants_is_not_computed(
    wanted: str, mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(mask=mask)
    flags = {name: getattr(case, name).detach().requires_grad_(name in wanted) for name in "xAB"}
    case = replace(case, **flags)
    calls: list[str] = []

    def count(name: str) -> None:
        original = getattr(products, name)

        def counted(one: Tensor, other: Tensor, *rest: Any) -> Any:
            frozen = other.data_ptr() == case.weight.data_ptr()  # W, or W turned
            calls.append("frozen" if frozen else name)
            return original(one, other, *rest)

        monkeypatch.setattr(products, name, counted)

    for name in ("matmul", "times", "add_times", "outer"):
        count(name)
    found = case.run(AdaptedProduct.apply)
    assert found.keys() == {"y", *wanted}
    for_x = "x" in wanted
    assert {name: calls.count(name) for name in ("frozen", "times", "add_times", "outer")} == {
        "frozen": 1 + for_x,
        # A x; backward G B, which A and x want, and with a mask (G B) A apart.
        "times": 1 + bool(set(wanted) & set("xA")) + (for_x and mask),
        "add_times": 1 + (for_x and not mask),
        "outer": len(set(wanted) & set("AB")),
    }
    compare(found, case.run(plain))


def test_without_gradients_it_is_the_same() -> None:
    case = make("one", torch.float32)
    with torch.no_grad():
        y = AdaptedProduct.apply(*(getattr(case, name) for name in case.__dataclass_fields__))
    assert torch.equal(y, case.run(AdaptedProduct.apply)["y"])
    assert not y.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mask", [True, False])
def test_no_rows_at_all(mask: bool, dtype: torch.dtype) -> None:
    case = make("one", dtype, mask=mask)
    empty = case.x.detach()[:0].requires_grad_()
    case = replace(case, x=empty, mask=case.mask[:0] if mask else None, counts=[0])
    found = case.run(AdaptedProduct.apply)
    assert found["y"].shape == (0, 2, OUT)
    assert found["x"].shape == (0, 2, IN)
    assert not found["A"].any()
    assert not found["B"].any()
    x = empty.detach().requires_grad_()
    FrozenProduct.apply(x, case.weight, case.bias).sum().backward()
    assert x.grad.shape == (0, 2, IN)


def test_a_lane_without_rows_of_its_own() -> None:
    case = replace(make(dtype=torch.float32), counts=[5, 0, 7])
    found = case.run(AdaptedProduct.apply)
    compare(found, case.run(plain))
    assert not found["A"][1].any()


@pytest.mark.skipif(not products.ONEDNN, reason="oneDNN is for x86 CPUs")
@pytest.mark.parametrize("lanes", LANES)
def test_without_onednn_it_is_the_same_to_rounding(
    lanes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(lanes, torch.float32)
    taken: list[bool] = []
    asked = products._is_for_onednn
    monkeypatch.setattr(
        products, "_is_for_onednn", lambda *args: taken.append(asked(*args)) or taken[-1]
    )
    with_it = case.run(AdaptedProduct.apply)
    assert all(taken)
    taken.clear()
    with torch.backends.mkldnn.flags(enabled=False):
        without = case.run(AdaptedProduct.apply)
    assert taken
    assert not any(taken)
    compare(without, with_it)
    assert not asked(case.x.detach().double(), case.weight.double())
    assert not asked(case.x.detach().bfloat16(), case.weight.bfloat16())
    assert not asked(case.x.detach(), case.weight.bfloat16())


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("scales", [SCALES, [2.0, 2.0, 2.0]], ids=["scales", "scale"])
def test_lanes_in_one_batched_product(
    scales: list[float], mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerators do with lanes of equally many rows."""
    case = make("equal", torch.float32, mask=mask, scales=scales)
    monkeypatch.setattr(products, "_together", lambda *_: False)
    apart = case.run(AdaptedProduct.apply)
    batched: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(products.torch, "bmm", lambda *args: batched.append(1) or bmm(*args))
    monkeypatch.setattr(products, "_together", lambda *_: True)
    compare(case.run(AdaptedProduct.apply), apart)
    # A x, the gradients of A and B, and G B; with a mask (G B) A too.
    assert len(batched) == 4 + mask


def test_when_lanes_are_batched() -> None:
    cpu, other = torch.device("cpu"), torch.device("meta")
    small, large, tiny = products.FEW, products.FEW + 1, products.TINY - 1
    assert products._together(2, other, large)
    assert products._together(2, other, tiny)
    assert not products._together(1, other, large)  # there is nothing to batch
    assert products._together(2, cpu, small)
    assert not products._together(2, cpu, large)
    assert not products._together(2, cpu, tiny)
    assert not products._together(1, cpu, small)


def test_lanes_with_as_many_rows_go_together() -> None:
    assert list(products._runs([3, 3, 5, 2, 2])) == [(0, 2, 0, 3), (2, 1, 6, 5), (3, 2, 11, 2)]


def test_a_large_sum_is_made_by_the_other_product(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(dtype=torch.float32)
    small = case.run(AdaptedProduct.apply)
    monkeypatch.setattr(products, "SMALL", 0)
    compare(case.run(AdaptedProduct.apply), small)


ALONE = {"equal": [4, 4, 4], "unequal": [2, 6, 4], "large": [1100, 1300, 1200]}


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("counts", ALONE.values(), ids=ALONE)
def test_each_lane_is_as_alone_to_the_bit(counts: list[int], mask: bool) -> None:
    case, rows = make(dtype=torch.float32), sum(counts)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, IN, generator=generator).requires_grad_()
    kept = torch.randint(2, (rows, IN), generator=generator, dtype=torch.int16) if mask else None
    grad = torch.randn(rows, OUT, generator=generator)

    def run(own: slice, lanes: slice) -> list[Tensor]:
        part, A, B = (t.detach().requires_grad_() for t in (x[own], case.A[lanes], case.B[lanes]))
        rest = (None if kept is None else kept[own], SCALES[lanes], counts[lanes])
        y = AdaptedProduct.apply(part, case.weight, case.bias, A, B, *rest)
        return [y, *torch.autograd.grad(y, (part, A, B), grad[own])]

    found, start = run(slice(None), slice(None)), 0
    for lane, count in enumerate(counts):
        own, lanes = slice(start, start + count), slice(lane, lane + 1)
        mine = [
            tensor[index] for tensor, index in zip(found, (own, own, lanes, lanes), strict=True)
        ]
        assert all(map(torch.equal, mine, run(own, lanes)))
        start += count


def test_second_derivatives_are_refused() -> None:
    """Instead of given as zero."""
    case = make("one")
    y = AdaptedProduct.apply(*(getattr(case, name) for name in case.__dataclass_fields__))
    (first,) = torch.autograd.grad(y.square().sum(), case.A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
