"""LoRA in a federated class that was written without it, and not a line of it changes.

python examples/wrap_your_own_model.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import CLIPModel

from fedlora import CLIPLoRAWrapper, LoRAConfig
from fedlora.modules.loading import resolve

# ---- Somebody's own class, as it was before. It knows nothing of fedlora. ----


class HospitalCLIP(nn.Module):
    """A CLIP with a head, exchanged as a state dict."""

    def __init__(self, folder: str, num_classes: int) -> None:
        super().__init__()
        self.backbone = CLIPModel.from_pretrained(folder)
        self.head = nn.Linear(self.backbone.config.projection_dim, num_classes)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.backbone.vision_model(pixel_values=pixels).pooler_output
        return self.head(self.backbone.visual_projection(pooled))

    def get_parameters(self) -> dict[str, Tensor]:
        return {name: tensor.cpu().clone() for name, tensor in self.state_dict().items()}

    def set_parameters(self, parameters: dict[str, Tensor]) -> None:
        self.load_state_dict(parameters)

    def train_step(self, pixels: Tensor, labels: Tensor) -> float:
        self.train()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self(pixels), labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, pixels: Tensor, labels: Tensor) -> float:
        self.eval()
        return (self(pixels).argmax(1) == labels).float().mean().item()


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Real handwriting, at the size of the embedded model."""
    found = load_digits()
    images = torch.tensor(found.images[:count], dtype=torch.float32)[:, None] / 8 - 1
    pixels = nn.functional.interpolate(images, (32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return pixels.contiguous(), torch.tensor(found.target[:count])


def main() -> None:
    torch.manual_seed(0)
    pixels, labels = digits(96)
    model = HospitalCLIP(resolve("tiny-clip"), num_classes=10)
    full = sum(tensor.numel() for tensor in model.get_parameters().values())

    # ---- These two lines are new. ----
    lora = CLIPLoRAWrapper(model, LoRAConfig(r=8, lora_alpha=16), towers="vision")
    lora.apply_lora_to_federated_model()

    travels = sum(tensor.numel() for tensor in model.get_parameters().values())
    print(lora.report())
    print(f"get_parameters() gives {travels:,} numbers, before it were {full:,}")
    print(f"untrained: accuracy {model.evaluate(pixels, labels):.3f}")
    for _ in range(20):
        loss = model.train_step(pixels, labels)
    print(f"after 20 steps: loss {loss:.3f}, accuracy {model.evaluate(pixels, labels):.3f}")

    with lora.lora_disabled():
        print(f"with the layers off: accuracy {model.evaluate(pixels, labels):.3f}")
    accuracy = model.evaluate(pixels, labels)
    plain = lora.merge_and_unload()
    assert plain is model
    assert plain.evaluate(pixels, labels) == accuracy
    print(f"merged: a plain {type(plain).__name__} again, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
