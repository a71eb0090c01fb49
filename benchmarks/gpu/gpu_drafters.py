"""What drafting costs on the host for each step: Token Recycling and RASD in vLLM's V1 runner, random weights.

ARMS=token_recycling,rasd   which arms; all if not given
MODEL=llama-3-8b | qwen2.5-7b

The model decodes nonsense, so acceptance and speed-up mean nothing here; the milliseconds of a proposal do.
"""

import os

from gpu_arms import Arm, model, run_arms
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
    """Stock, and the drafters."""
    batches = [int(b) for b in os.environ.get("BATCHES", "1,8,64").split(",")]
    points = [(batch, 1024) for batch in batches]
    base = model(name) | EAGER | {"max_model_len": 4096, "max_num_seqs": max(batches), "max_num_batched_tokens": 8192}
    common = {"points": points, "environment": V1, "phrase": 48, "steps": 50}
    found = [Arm("stock_v1", base, **common)]
    for label, drafter in DRAFTERS.items():
        drafting = {"method": "custom_class", "model": PROPOSER_CLASS, "num_speculative_tokens": 12}
        config = {"speculative_config": drafting, "additional_config": {"pilotfish": {"drafter": drafter}}}
        found.append(Arm(label, base | config, **common))
    return found


def work(step: Step) -> None:
    """Run them."""
    name = os.environ.get("MODEL", "llama-3-8b")
    chosen = {a.name: a for a in arms(name)}
    if asked := os.environ.get("ARMS"):
        chosen = {label: chosen[label] for label in asked.split(",")}
    step.notes["model"] = f"{name}, random weights"
    run_arms(step, list(chosen.values()), SECONDS, name)


if __name__ == "__main__":
    Step("drafters").run(work)
