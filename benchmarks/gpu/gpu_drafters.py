"""Host time of drafting per step: Token Recycling and RASD in vLLM's V1 model runner, with random weights.

Environment variables:
ARMS=token_recycling,rasd       arms to run, in this order; default: all
MODEL=llama-3-8b | qwen2.5-7b   shape of the model
BATCHES=1,8,64                  batch sizes

The output of random weights is meaningless, so acceptance rates and speed-ups are too. The time per proposal is valid.
"""

import os

from gpu_arms import Arm, engine_arguments, run_arms
from gpu_common import Step
from gpu_engine import EAGER, V1

from pilotfish.integrations.vllm.engine.selection import PROPOSER_CLASS

SECONDS = float(os.environ.get("SECONDS_FOR_ENGINES", "390"))
DRAFTERS = {
    "token_recycling": {"name": "token_recycling"},
    "rasd": {"name": "rasd"},
    "token_recycling_tree": {"name": "token_recycling", "verification": "tree"},
    "rasd_tree": {"name": "rasd", "verification": "tree"},
}


def arms(name: str) -> list[Arm]:
    """Return the arms: vLLM without a drafter, and each drafter with chains and with trees."""
    batches = [int(b) for b in os.environ.get("BATCHES", "1,8,64").split(",")]
    points = [(batch, 1024) for batch in batches]
    base = (
        engine_arguments(name)
        | EAGER
        | {"max_model_len": 4096, "max_num_seqs": max(batches), "max_num_batched_tokens": 8192}
    )
    common = {"points": points, "environment": V1, "phrase": 48, "steps": 50}
    results = [Arm("stock_v1", base, **common)]
    for label, drafter in DRAFTERS.items():
        drafting = {"method": "custom_class", "model": PROPOSER_CLASS, "num_speculative_tokens": 12}
        config = {"speculative_config": drafting, "additional_config": {"pilotfish": {"drafter": drafter}}}
        results.append(Arm(label, base | config, **common))
    return results


def work(step: Step) -> None:
    """Run the arms that ``ARMS`` selects."""
    name = os.environ.get("MODEL", "llama-3-8b")
    selected = {a.name: a for a in arms(name)}
    if requested := os.environ.get("ARMS"):
        selected = {label: selected[label] for label in requested.split(",")}
    step.notes["model"] = f"{name}, random weights"
    run_arms(step, list(selected.values()), SECONDS, name)


if __name__ == "__main__":
    Step("drafters").run(work)
