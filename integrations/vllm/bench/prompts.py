"""Prompts for benchmarks, read from data set files."""

import gzip
import json
import random
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....plugins.config import ConfigError


@dataclass(frozen=True)
class Prompt:
    """One user message; ``dataset`` is the name of the folder of its file."""

    dataset: str
    category: str
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a ``.jsonl``, ``.jsonl.gz`` or ``.json`` file.

    Each line, or each item of a list, has ``turns``, ``prompt``, ``text`` or ``question``, and optionally ``category``.
    In a file in SQuAD format, every paragraph becomes one prompt with its first question.

    Raises:
        ConfigError: The file cannot be read, or has no prompts.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        is_json = path.name.endswith((".json", ".json.gz"))
        lines = json.loads(text) if is_json else [json.loads(line) for line in text.splitlines() if line.strip()]
        if isinstance(lines, dict):
            lines = [paragraph for article in lines["data"] for paragraph in article["paragraphs"]]
        prompts = [_prompt(line, path.absolute().parent.name) for line in lines]
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, zlib.error, RecursionError) as error:
        raise ConfigError(f"--prompts {path}: not a file of prompts ({error})") from None
    if not prompts:
        raise ConfigError(f"--prompts {path}: the file is empty")
    return prompts


def _prompt(line: Any, dataset: str) -> Prompt:
    if not isinstance(line, dict):
        raise ValueError("a line is not an object")
    if "task_id" in line:  # HumanEval: the head of a function
        return Prompt(dataset, "code", f"Complete this Python function:\n```python\n{line['prompt']}\n```")
    if "qas" in line:  # SQuAD: a passage with questions
        ask = "Answer with a sentence, and quote the passage that supports it."
        return Prompt(dataset, "document_qa", f"{line['context']}\n\n{line['qas'][0]['question']}\n{ask}")
    named = (line[name] for name in ("prompt", "text", "question") if name in line)
    text = line["turns"][0] if "turns" in line else next(named, None)
    if not isinstance(text, str):
        raise ValueError("a line has no turns, prompt, text or question")
    return Prompt(dataset, str(line.get("category", "all")), text)


def encode_prompt(tokenizer: Any, prompt: Prompt, longest: int) -> list[int]:
    """Return at most ``longest`` token ids of a prompt in the chat template of a model."""
    message = [{"role": "user", "content": prompt.text}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"][:longest]


def sample_prompts(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """Sample ``count`` prompts, round-robin over the categories, in an order that depends on the seed."""
    rng = random.Random(seed)
    by_category: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        by_category[prompt.category].append(prompt)
    for group in by_category.values():
        rng.shuffle(group)
    sample: list[Prompt] = []
    while len(sample) < count and any(by_category.values()):
        sample += [group.pop() for group in by_category.values() if group][: count - len(sample)]
    rng.shuffle(sample)
    return sample


def remaining_prompts(prompts: list[Prompt], drawn: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """Sample ``count`` prompts that are not in ``drawn``."""
    taken = set(drawn)
    return sample_prompts([p for p in prompts if p not in taken], count, seed)
