"""A random CLIP folder, smaller than the embedded model and with other widths in each tower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.config import LoRAConfig
from fedlora.modules.loading import resolve

NAMES = ["zero", "one", "a very round two"]
TEMPLATES = ["a photo of the digit {}.", "{}"]
SIZE, DIM, LAYERS = 16, 20, 2
VISION, TEXT = 24, 16  # widths; their MLPs are 40 and 36 wide
TINY = Path(resolve("tiny-clip"))


def make_folder(folder: Path) -> Path:
    """Save a random CLIP with the embedded model's tokenizer and pictures of 16 x 16."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("model.safetensors", "README.md"))
    tiny = json.loads((TINY / "config.json").read_text(encoding="utf-8"))["text_config"]
    ids = {f"{name}_token_id": tiny[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    common = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "projection_dim": DIM}
    text = {"hidden_size": TEXT, "intermediate_size": 36, "vocab_size": tiny["vocab_size"]}
    text |= {"max_position_embeddings": 32, **ids, **common}
    vision = {"hidden_size": VISION, "intermediate_size": 40, "image_size": SIZE}
    vision |= {"patch_size": 8, **common}
    # Larger than usual first weights, so that features differ clearly between pictures.
    for tower in (text, vision):
        tower["initializer_factor"] = 4.0
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        CLIPModel(config).save_pretrained(folder)
    pictures = json.loads((TINY / "preprocessor_config.json").read_text(encoding="utf-8"))
    pictures |= {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures), encoding="utf-8")
    return folder


def adapted(
    folder: Path, *, head: str = "linear", towers: str = "vision", **lora: object
) -> CLIPLoRAWrapper:
    """A classifier with an adapter in it, rank 3 unless said; ``.federated`` is the model."""
    model = FederatedCLIPModel(
        str(folder),
        head=head,  # type: ignore[arg-type]
        class_names=NAMES,
        templates=TEMPLATES,
        keep_text_tower=towers == "both",
    )
    config = LoRAConfig(**{"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, **lora})  # type: ignore[arg-type]
    return CLIPLoRAWrapper(model, config, towers=towers).apply()  # type: ignore[arg-type]


def shake(lora: CLIPLoRAWrapper, seed: int = 0, size: float = 0.2) -> None:
    """Move every trained parameter at random: B starts at zero, where A gets no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameters in lora.parameters.values():
            for parameter in parameters.values():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def pictures(count: int = 4, seed: int = 0) -> torch.Tensor:
    """Noise, (count, 3, 16, 16) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
