"""Floating-point operations that a training step cannot do without, and what a machine can do.

A multiplication and an addition are two operations. Counted are products of matrices alone, from
the shapes of the layers: norms, activations, softmax and optimizer are a few operations an entry.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

LARGE = 2048  # a product of this size is as fast as the machine can be


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    Attributes:
        name: in the model.
        place: (block, order inside of it): what is smaller is upstream.
        tokens: of a picture, that it has to see.
        inputs: features.
        outputs: features.
    """

    name: str
    place: tuple[int, int]
    tokens: int
    inputs: int
    outputs: int

    @property
    def operations(self) -> float:
        """Of one pass over a picture's tokens."""
        return 2.0 * self.tokens * self.inputs * self.outputs


@dataclass(frozen=True)
class Operations:
    """Of one picture in a training step.

    Attributes:
        forward: the frozen tower and the head.
        backward: gradients of activations, down to the first adapted layer.
        adapter: of the factors, both passes, and the gradient of a linear head.
    """

    forward: float
    backward: float
    adapter: float

    @property
    def all(self) -> float:
        """The sum."""
        return self.forward + self.backward + self.adapter


@dataclass(frozen=True)
class Tower:
    """CLIP's vision tower, of which the first token is pooled.

    The last block's other tokens are read by its keys and values only.
    """

    width: int
    inner: int
    blocks: int
    patches: int
    patch_inputs: int
    features: int

    @classmethod
    def of(cls, clip: Any) -> Tower:
        """That of transformers' CLIPModel."""
        vision = clip.config.vision_config
        return cls(
            width=vision.hidden_size,
            inner=vision.intermediate_size,
            blocks=vision.num_hidden_layers,
            patches=(vision.image_size // vision.patch_size) ** 2,
            patch_inputs=vision.num_channels * vision.patch_size**2,
            features=clip.visual_projection.out_features,
        )

    @property
    def tokens(self) -> int:
        """The patches and the token that is pooled."""
        return self.patches + 1

    def read(self, block: int) -> int:
        """Tokens of a block's output that anything reads."""
        return 1 if block == self.blocks - 1 else self.tokens

    def linears(self) -> Iterator[Linear]:
        """The linear layers of all blocks."""
        for block in range(self.blocks):
            path, read = f"vision_model.encoder.layers.{block}", self.read(block)
            for name in ("q_proj", "k_proj", "v_proj"):
                tokens = read if name == "q_proj" else self.tokens
                where = f"{path}.self_attn.{name}"
                yield Linear(where, (block, 0), tokens, self.width, self.width)
            yield Linear(f"{path}.self_attn.out_proj", (block, 2), read, self.width, self.width)
            yield Linear(f"{path}.mlp.fc1", (block, 3), read, self.width, self.inner)
            yield Linear(f"{path}.mlp.fc2", (block, 4), read, self.inner, self.width)

    def attention(self, block: int) -> float:
        """The two products of a block's attention, forward."""
        return 2 * 2.0 * self.read(block) * self.tokens * self.width

    def count(self, adapted: Collection[str], rank: int, classes: int) -> Operations:
        """The operations of one picture.

        Args:
            adapted: names of the adapted layers.
            rank: of their adapters.
            classes: of the head, linear on the features or class features that stand still.
        """
        linears, blocks = list(self.linears()), range(self.blocks)
        own = [each for each in linears if each.name in adapted]
        first = min(each.place for each in own)
        ends = 2.0 * self.features * (self.width + classes)  # projection and head
        forward = 2.0 * self.patches * self.patch_inputs * self.width + ends
        forward += sum(each.operations for each in linears) + sum(map(self.attention, blocks))
        # A gradient is wanted of what lies behind an adapted layer.
        backward = ends + sum(each.operations for each in linears if each.place > first)
        # Of queries, keys, values and of the weights that they make.
        backward += sum(2 * self.attention(block) for block in blocks if (block, 1) > first)
        adapter = 2.0 * self.features * classes
        for each in own:
            pair = 2.0 * each.tokens * rank
            # Forward; then of B and of the small side; of A.
            adapter += pair * (each.inputs + each.outputs) + 2 * pair * each.outputs
            adapter += pair * each.inputs * (2 if each.place > first else 1)
        return Operations(forward, backward, adapter)


def onednn() -> Callable[..., torch.Tensor] | None:
    """oneDNN's product (m, in), (out, in) -> (m, out); None where torch has none."""
    from fedlora.modules.products import ONEDNN

    if not ONEDNN:
        return None
    return lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def kernels(device: str = "cpu") -> dict[str, Callable[[torch.Tensor, torch.Tensor], Any]]:
    """What multiplies matrices here: name -> (m, in), (out, in) -> (m, out)."""
    found: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
        "torch.mm": lambda x, weight: torch.mm(x, weight.t())
    }
    other = onednn() if device == "cpu" else None
    return found if other is None else {**found, "oneDNN": other}


def seconds(call: Callable[[], object], least: float, device: str = "cpu") -> float:
    """How long a call takes: the fastest of as many as fit into ``least`` seconds, two at least."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def matrix_rates(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int = LARGE,
    least: float = 0.5,
) -> dict[str, float]:
    """Operations a second of large products, by kernel, with the threads that torch has now."""
    x = torch.randn(size, size, device=device, dtype=dtype)
    weight = torch.randn(size, size, device=device, dtype=dtype)
    return {
        name: 2.0 * size**3 / seconds(lambda call=call: call(x, weight), least, device)
        for name, call in kernels(device).items()
    }
