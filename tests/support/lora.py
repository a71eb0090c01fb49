"""LoRA adapters of random weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8


def save_adapter(folder: Path, modules: Sequence[str], hidden_size: int, seed: int = 1) -> str:
    """Save an adapter of square projections, and return its folder.

    Args:
        folder: Where to write it.
        modules: Names of the projections, such as "model.layers.0.self_attn.q_proj".
        hidden_size: Inputs and outputs of each projection.
        seed: Of the weights, which are large enough to change greedy text.
    """
    torch.manual_seed(seed)
    names = [f"base_model.model.{module}" for module in modules]
    weights = {f"{n}.lora_A.weight": torch.randn(RANK, hidden_size) for n in names}
    weights |= {f"{n}.lora_B.weight": torch.randn(hidden_size, RANK) * 0.3 for n in names}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)
