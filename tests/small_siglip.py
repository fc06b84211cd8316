"""Random SigLIP folders, small, as the hub's: SigLIP's tokenizer, or Gemma's as in SigLIP 2."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import SiglipConfig, SiglipModel, SiglipTokenizer

SIZE, LENGTH, DIM, LAYERS = 16, 24, 24, 2
VISION, TEXT = DIM, 16  # widths; their MLPs are 40 and 36 wide
SENTENCES = [
    "a photo of the digit zero",
    "a very round two and one more",
    "an image of three, four, five; six!",
    "seven eight nine quick brown foxes jump over lazy dogs",
]
PICTURES = {
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "processor_class": "SiglipProcessor",
}


def make_siglip(folder: Path, *, gemma: bool = False) -> Path:
    """Save a random SigLIP; ``gemma``: with the kind of tokenizer that SigLIP 2 has."""
    folder.mkdir(parents=True)
    vocabulary = gemma_tokenizer(folder) if gemma else sentencepiece_tokenizer(folder)
    write(folder / "preprocessor_config.json", PICTURES)
    ids = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": 1}
    common = {"num_hidden_layers": LAYERS, "num_attention_heads": 2}
    text = {"hidden_size": TEXT, "intermediate_size": 36, "projection_size": DIM, **ids, **common}
    text |= {"max_position_embeddings": LENGTH, "vocab_size": vocabulary}
    vision = {"hidden_size": VISION, "intermediate_size": 40, "image_size": SIZE, **common}
    vision |= {"patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-10.0)  # where SigLIP's training starts
    model.save_pretrained(folder)
    return folder


def sentencepiece_tokenizer(folder: Path) -> int:
    """Save ``spiece.model`` and its config; the number of tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=1,
        unk_id=2,
        pad_id=0,
        minloglevel=2,
    )
    file = folder / "spiece.model"
    file.write_bytes(model.getvalue())
    tokenizer = SiglipTokenizer(str(file), model_max_length=LENGTH, model_input_names=["input_ids"])
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def gemma_tokenizer(folder: Path) -> int:
    """Save a ``tokenizer.json`` that keeps capitals and a config like SigLIP 2's; its size."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.train_from_iterator(
        SENTENCES, BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {f"{name[1:-1]}_token": name for name in special}
    config |= {"tokenizer_class": "GemmaTokenizer", "processor_class": "SiglipProcessor"}
    config |= {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    write(folder / "tokenizer_config.json", config | {"model_input_names": ["input_ids"]})
    return int(tokenizer.get_vocab_size())


def write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
