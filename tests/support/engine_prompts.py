"""Prompts of the engine tests of KV policies, and the command that completes them."""

import random
from typing import Any

GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


def texts_of(lengths: list[int]) -> list[list[int]]:
    """Return prompts of the given lengths with repeated text, so that earlier tokens matter."""
    rng = random.Random(0)
    return [([rng.randrange(1000, 40000) for _ in range(150)] * 20)[:n] for n in lengths]


PROMPTS = texts_of([700, 90, 460, 199, 330])


def ask(prompts: list[list[int]], **sampling: Any) -> dict[str, Any]:
    """Return the worker's command that completes ``prompts``."""
    return {"do": "sample", "prompts": prompts, "sampling": [{**GREEDY, **sampling}] * len(prompts)}
