from __future__ import annotations

import math

import pytest
import torch

from fedlora.distributed.messages import decode, encode
from fedlora.state import AdapterState, Residual


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -(2**62),
        0.1 + 0.2,
        5e-324,
        math.inf,
        "clé /\n",
        [],
        {},
        {"a": [1, {"b": None}], 3: "three", "both": (1, [2], {"c"}), "bytes": b"\x80"},
        {"tensor": 1, "bytes": 3, "plain": 0.5, "hex": None, "dict": "x"},
    ],
    ids=str,
)
def test_plain_data_arrives_as_it_was(value: object) -> None:
    arrived = decode(encode(value))
    assert arrived == value
    assert type(arrived) is type(value)


def test_what_is_not_a_number_stays_so() -> None:
    assert math.isnan(decode(encode({"loss": math.nan}))["loss"])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5), (2, 0, 3)])
def test_tensors_arrive_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).mul(3).to(dtype)
    # One byte before it: what follows must be found where it starts all the same.
    odd, [arrived] = decode(encode([torch.ones(1, dtype=torch.uint8), [tensor]]))
    assert odd.tolist() == [1]
    assert arrived.dtype == dtype
    assert arrived.shape == tensor.shape
    assert torch.equal(arrived, tensor)


def test_a_view_arrives_with_its_strides() -> None:
    # A product of matrices has other last bits with other strides.
    tensor = torch.arange(12.0).view(3, 4)
    arrived = decode(encode({"T": tensor.T, "row": tensor[1, ::2]}))
    assert torch.equal(arrived["T"], tensor.T)
    assert arrived["T"].stride() == tensor.T.stride()
    assert arrived["row"].tolist() == [4, 6]


def test_arrived_tensors_share_no_memory() -> None:
    one, other = decode(encode([torch.ones(4), torch.ones(4)]))
    one.zero_()
    assert other.tolist() == [1] * 4
    assert other.untyped_storage().nbytes() == 16  # else a checkpoint would hold the whole message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_many_named_tensors_arrive_each_as_it_was(dtype: torch.dtype) -> None:
    shapes = {"bias": (10,), "A": (8, 64), "scale": (), "none": (0, 3), "B": (5, 3)}
    sent = {name: torch.randn(shape).mul(9).to(dtype) for name, shape in shapes.items()}
    sent |= {"leaf": torch.nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)}
    arrived = decode(encode({"before": torch.ones(1, dtype=torch.uint8), "here": sent}))["here"]
    assert list(arrived) == list(sent)  # in their order
    for name, tensor in sent.items():
        assert (arrived[name].dtype, arrived[name].shape) == (dtype, tensor.shape)
        assert torch.equal(arrived[name], tensor)
        # As torch's own tensors lie: products with others may have other last bits.
        assert arrived[name].data_ptr() % 64 == 0


@pytest.mark.parametrize(
    "odd",
    [
        {"x": torch.ones(2), "y": torch.ones(2, dtype=torch.float64)},
        {"x": torch.ones(2), "y": 3},
        {3: torch.ones(2), 4: torch.zeros(2)},
        {"x": torch.ones(2), "y": torch.ones(3, 2).T},
        {"x": torch.ones(2), "y": torch.zeros(1).expand(3)},
    ],
    ids=["types", "numbers", "keys", "strides", "expanded"],
)
def test_what_does_not_lie_alike_arrives_too(odd: dict[object, object]) -> None:
    arrived = decode(encode(odd))
    assert arrived.keys() == odd.keys()
    for key, value in odd.items():
        assert torch.equal(torch.as_tensor(arrived[key]), torch.as_tensor(value))
        assert type(arrived[key]) is type(value)


def test_an_adapter_arrives_to_the_bit() -> None:
    state = AdapterState(
        A={"x": torch.randn(2, 3)},
        B={"x": torch.randn(4, 2)},
        other={"head": torch.randn(5)},
        scaling={"x": 1 / 3},
        residual={
            "x": Residual(torch.randn(4, 3)),
            "y": Residual(torch.randn(4, 1), torch.ones(1, 3)),
        },
    )
    arrived = AdapterState.from_dict(decode(encode(state.to_dict())))
    assert arrived.scaling == state.scaling
    for name, tensor in state.tensors():
        assert torch.equal(dict(arrived.tensors())[name], tensor)
    for name, residual in state.residual.items():
        assert torch.equal(arrived.residual[name].dense(), residual.dense())
        assert arrived.residual[name].nbytes == residual.nbytes


def test_only_plain_data_leaves_and_arrives() -> None:
    with pytest.raises(TypeError, match="plain data and tensors, not builtin_function_or_method"):
        encode({"a": print})
    with pytest.raises(ValueError, match="no message says 'call'"):
        decode(said('{"call": ["print"]}'))
    with pytest.raises(ValueError, match="Expecting value"):
        decode(said("print()"))


def said(text: str) -> torch.Tensor:
    """A message with this text."""
    message = len(text).to_bytes(8, "little") + text.encode()
    return torch.tensor(list(message), dtype=torch.uint8)
