"""What CLIP's vision tower computes and nobody reads, left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

FACTOR = 1.702


class QuickGELU(nn.Module):
    """``x sigmoid(1.702 x)``, which is ``silu(1.702 x) / 1.702``: one pass backward, not five."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        y: Tensor = _QuickGELU.apply(x)  # type: ignore[no-untyped-call]
        return y


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inside = x * FACTOR
        ctx.save_for_backward(inside)
        return torch.sigmoid(inside).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        # The factor inside and the one outside cancel.
        of_x: Tensor = torch.ops.aten.silu_backward(grad, inside)
        return of_x


class FirstTokenLayer(CLIPEncoderLayer):  # type: ignore[no-untyped-call]
    """The last block of a tower of which the first token alone is pooled: (n, 1, width)."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The first token of what CLIP's own block gives, of (n, tokens, width)."""
        attention, seen = self.self_attn, self.layer_norm1(hidden_states)

        def heads(projected: Tensor) -> Tensor:
            shape = (*projected.shape[:2], attention.num_heads, attention.head_dim)
            return projected.view(shape).transpose(1, 2)

        mixed = nn.functional.scaled_dot_product_attention(
            heads(attention.q_proj(seen[:, :1])),
            heads(attention.k_proj(seen)),
            heads(attention.v_proj(seen)),
            attn_mask=attention_mask,
            scale=attention.scale,
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        first: Tensor = hidden_states[:, :1] + attention.out_proj(mixed)
        changed: Tensor = self.mlp(self.layer_norm2(first))
        return first + changed


def leave_out_unread(clip: Any) -> None:
    """Let a CLIP compute its activations in fewer passes, and of its last vision block one token.

    CLIP pools the first token: of the last block's queries, output projection and MLP the rest is
    never read and gets no gradient. In place; parameters and names stay. Other models, activations
    and kinds of attention are left as they are.
    """
    if clip.config.model_type != "clip":
        return
    for module in clip.modules():
        if type(getattr(module, "activation_fn", None)) is QuickGELUActivation:
            module.activation_fn = QuickGELU()
    last = clip.vision_model.encoder.layers[-1]
    attention = last.self_attn
    plain = attention.config._attn_implementation == "sdpa" and not attention.dropout
    if type(last) is CLIPEncoderLayer and plain:
        last.__class__ = FirstTokenLayer


def compute_all(clip: Any) -> None:
    """Undo :func:`leave_out_unread`, in place."""
    for module in clip.modules():
        if type(getattr(module, "activation_fn", None)) is QuickGELU:
            module.activation_fn = QuickGELUActivation()
        if type(module) is FirstTokenLayer:
            module.__class__ = CLIPEncoderLayer  # type: ignore[assignment]
