"""Requests with different LoRA adapters in a batch get the text of a stock engine."""

from typing import Any

import pytest
from lora import RANK, save_adapter

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]

PROMPTS = [[5, 6, 7, 8, 9] * 3, [100, 200, 300], [50] * 12, [7, 8, 9, 10] * 4]
LORA = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2, "skip_tokenizer_init": True}


@pytest.mark.parametrize("verification", ["chain", "tree"])
@pytest.mark.parametrize(
    "v2",
    [
        pytest.param(False, marks=pytest.mark.shows("token_recycling", "LoRA"), id="v1"),
        pytest.param(True, marks=pytest.mark.shows("token_recycling", "V2 model runner: LoRA"), id="v2"),
    ],
)
def test_text_equals_stock(
    start, start_interpreted, drafting_args, small_vocabulary, tmp_path, v2: bool, verification: str
) -> None:
    adapters = [
        save_adapter(tmp_path / f"{seed}", [f"model.layers.{i}.self_attn.q_proj" for i in range(2)], 128, seed)
        for seed in (1, 2)
    ]
    sampling = {"temperature": 0, "max_tokens": 8 if v2 else 40, "ignore_eos": True, "detokenize": False}
    ask: dict[str, Any] = {"do": "sample", "prompts": PROMPTS, "sampling": [sampling] * len(PROMPTS)}
    # Without an adapter, vLLM's CPU build gives a request beside adapted ones another text, so all have one.
    adapted = {**ask, "adapters": [adapters[0], adapters[1], adapters[1], adapters[0]]}
    stock = start(small_vocabulary, **LORA)
    expected, without = stock.ask(**adapted), stock.ask(**ask)
    stock.close()
    assert all(a != b for a, b in zip(expected["tokens"], without["tokens"], strict=True))
    arguments = drafting_args(6, verification=verification, order=2)
    if v2:
        arguments["speculative_config"] = {"method": "ngram_gpu", "num_speculative_tokens": 6}
        drafted = start_interpreted(small_vocabulary, "1", async_scheduling=True, **LORA, **arguments)
    else:
        drafted = start(small_vocabulary, **LORA, **arguments)
        drafted.ask(do="draft_always")
    assert drafted.ask(**adapted)["tokens"] == expected["tokens"]
    again = drafted.ask(**adapted)  # from learned rows
    assert again["tokens"] == expected["tokens"]
    assert again["request_steps"] < expected["request_steps"]
    drafted.close()
