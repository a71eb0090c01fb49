"""Extras of the package by the modules that they bring, for messages about missing modules."""

EXTRAS = {
    "vllm": ("vllm", "numba", "packaging"),
    "retrieval": (
        "faiss",
        "torch",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "filelock",
        "bs4",
        "markdown_it",
        "charset_normalizer",
        "pathspec",
        "regex",
        "pypdf",
        "pyarrow",
        "ir_measures",
        "snowballstemmer",
        "fastapi",
        "starlette",
        "pydantic",
        "uvicorn",
        "prometheus_client",
    ),
    "rag": ("httpx", "openai"),
    "train": ("accelerate",),
    "report": ("jinja2", "matplotlib"),
    "demo": ("gguf", "tokenizers", "onnx", "PIL"),
    "bench": ("datasets", "arctic_inference", "bm25s"),
    "langchain": ("langchain_core",),
    "llama-index": ("llama_index",),
    "haystack": ("haystack",),
}


COMMANDS = {  # the extra that brings all that a command needs
    "index": "retrieval",
    "rag": "rag",
    "train": "train",
    "report": "report",
    **dict.fromkeys(("serve", "doctor", "tune", "prune", "datastore"), "vllm"),
}


def missing_module(error: ModuleNotFoundError, command: str) -> str | None:
    """Return a message that names the extra with the missing module, or None if no extra brings it.

    Args:
        error: Error of an import.
        command: Command that was run, such as ``index``.
    """
    module = (error.name or "").partition(".")[0]
    extra = next((name for name, modules in EXTRAS.items() if module in modules), None)
    if extra is None:
        return None
    return f"{command or 'this command'} needs {module}; pip install 'pilotfish[{COMMANDS.get(command, extra)}]'"
