"""Functions that write checkpoints of a few kilobytes for the tests that load them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizerFast

SHIFT = 999
WORDS = [f"w{i}" for i in range(150)] + ["shark", "fish", "pilot", "whale", "the", ".", "##s"]
CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": SHIFT + len(WORDS),
    "max_position_embeddings": 64,
}


def tokenizer(folder: Path) -> None:
    """Write a BERT tokenizer whose words begin at the same ID as in BERT's own vocabulary."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    filler = [f"[unused{i}]" for i in range(SHIFT - len(special))]
    (folder / "vocab.txt").write_text("\n".join([*special, *filler, *WORDS]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


def masked_lm(folder: Path, seed: int = 0) -> BertForMaskedLM:
    """Write a masked language model, and return it."""
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    model = BertForMaskedLM(BertConfig(**CONFIG)).eval()
    torch.nn.init.normal_(model.cls.predictions.bias, 0, 0.2)
    model.save_pretrained(folder)
    tokenizer(folder)
    return model


def encoder(folder: Path, seed: int = 0) -> BertModel:
    """Write a BERT encoder without a head, and return it."""
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    model = BertModel(BertConfig(**CONFIG), add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    tokenizer(folder)
    return model


def published_vdr(folder: Path, shared: bool = False, suffix: str = "safetensors") -> dict[str, BertModel]:
    """Write a checkpoint in the format of vsearch (two encoders, their LayerNorms, settings), and return its models."""
    torch.manual_seed(1)
    folder.mkdir(exist_ok=True)
    side = {**CONFIG, "type": "vdr", "model_id": "bert-base-uncased", "shift_vocab_num": SHIFT, "topk": 20}
    side |= {"pooling": "max", "norm": False}
    about = {
        "encoder_q": {**side, "max_len": 16},
        "encoder_p": {**side, "max_len": 32},
        "shared_encoder": shared,
        "model_type": "biencoder",
    }
    (folder / "config.json").write_text(json.dumps(about))
    sides = ("encoder_q",) if shared else ("encoder_q", "encoder_p")
    models, state = {}, {}
    for name in sides:
        models[name] = BertModel(BertConfig(**CONFIG), add_pooling_layer=False).eval()
        state |= {f"{name}.bert_model.{k}": v.contiguous() for k, v in models[name].state_dict().items()}
        state[f"{name}.ln.weight"] = torch.rand(CONFIG["hidden_size"]) + 0.5
        state[f"{name}.ln.bias"] = torch.randn(CONFIG["hidden_size"]) * 0.1
    if suffix == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    tokenizer(folder)
    for name, model in models.items():
        model.ln = torch.nn.LayerNorm(CONFIG["hidden_size"])  # type: ignore[assignment]
        model.ln.load_state_dict({k: state[f"{name}.ln.{k}"] for k in ("weight", "bias")})  # type: ignore[union-attr]
    return models
