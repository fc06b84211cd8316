"""A CLIP of ViT-B/32's size with random weights, for machines without the hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PARAMETERS = 151_277_313
SIZE = 224  # pixels


def make_vit_b32_folder(path: Path) -> Path:
    """Write a random ``CLIPModel(CLIPConfig())`` as a folder that ``model_name`` takes.

    The tokenizer is the embedded model's, whose few ids all fit into the larger vocabulary; the
    text config's bos, eos and pad ids are set to it. A folder that is already whole is kept.

    Args:
        path: where; made if it is not there. Takes 605 MB.

    Returns:
        ``path``.
    """
    import torch
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    from fedlora.modules.loading import EMBEDDED, load_preprocess_config, resolve

    processor = path / "preprocessor_config.json"  # written last
    if processor.exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(resolve(EMBEDDED))
    config = CLIPConfig()
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, more than the model's vocabulary of "
            f"{config.text_config.vocab_size}."
        )
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    for part in (config.text_config, config.vision_config):
        part.projection_dim = config.projection_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != PARAMETERS:
        raise ValueError(f"CLIPModel(CLIPConfig()) has {count:,} parameters, not {PARAMETERS:,}.")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    settings = dict(load_preprocess_config(EMBEDDED))
    settings["size"] = {"shortest_edge": SIZE}
    settings["crop_size"] = {"height": SIZE, "width": SIZE}
    processor.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    print(make_vit_b32_folder(parser.parse_args().path))
