from __future__ import annotations

import pytest
import torch

from fedlora.flat import ALIGNED, as_one, joined, split


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_what_was_joined_comes_apart_again(dtype: torch.dtype) -> None:
    shapes = [(10,), (8, 64), (), (0, 3), (5, 3), (1,), (4, 4)]
    tensors = [torch.randn(shape).mul(9).to(dtype) for shape in shapes]
    parts = list(split(joined(tensors), shapes))
    for part, tensor in zip(parts, tensors, strict=True):
        assert (part.dtype, part.shape) == (dtype, tensor.shape)
        assert torch.equal(part, tensor)
        assert part.data_ptr() % ALIGNED == 0


def test_it_is_a_copy_of_values() -> None:
    leaf = torch.nn.Parameter(torch.ones(2, 3).T)
    flat = joined([leaf])
    assert not flat.requires_grad
    flat.zero_()
    assert leaf.sum() == 6


def test_most_of_it_is_not_copied_when_it_comes_apart() -> None:
    first, second = split(torch.zeros(32), [(16,), (4, 4)])
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_what_lies_end_to_end_is_one_without_a_copy() -> None:
    flat = torch.randn(48)
    parts = list(split(flat, [(16,), (2, 8), (4, 4)]))
    assert as_one(parts[1:]).data_ptr() == parts[1].data_ptr()
    assert torch.equal(as_one(parts), flat)


FLAT = torch.arange(64.0)


@pytest.mark.parametrize(
    "parts",
    [
        [FLAT[16:32], FLAT[:16]],
        [FLAT[:8], FLAT[9:]],
        [FLAT[:16].view(4, 4).T, FLAT[16:32]],
        [FLAT[:16], FLAT[16:].view(torch.int32)],
        [FLAT[:16], torch.ones(16)],
        [torch.ones(0), FLAT[:16]],
        [torch.ones(0)],
    ],
)
def test_else_it_is_joined(parts: list[torch.Tensor]) -> None:
    found = as_one(parts)
    assert torch.equal(found, joined(parts))
    found.zero_()
    assert torch.equal(FLAT, torch.arange(64.0))


def test_one_is_no_part_of_the_graph() -> None:
    leaf = torch.nn.Parameter(torch.ones(2, 3))
    assert not as_one([leaf]).requires_grad
    assert not as_one([leaf, leaf]).requires_grad


def test_a_part_of_a_vector_comes_apart_too() -> None:
    parts = list(split(torch.arange(40.0)[3:19], [(2, 3), (10,)]))
    assert parts[0].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert parts[1].tolist() == list(range(9, 19))


@pytest.mark.parametrize(("count", "said"), [(5, "5 entries"), (3, "3 entries")])
def test_sizes_must_fit(count: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        list(split(torch.zeros(10)[:count], [(2,), (2,)]))
