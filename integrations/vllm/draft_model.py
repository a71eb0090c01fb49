"""A drafter of ours over a draft model that vLLM itself runs: the model drafts, we look at it and say what is verified.

vLLM constructs no custom proposer then, so ours is made as soon as the draft model is loaded, and stands behind the
runner's ``propose_draft_token_ids``, one instance of it. The draft model's own cache needs no care: it reads again all
tokens that a step accepted, whoever drafted them.
"""

from typing import Any

from .drafter import Drafter
from .runner import find_runner


def accompany(proposer: Any) -> None:
    """Put the selected drafter behind ``proposer``, vLLM's, whose model was just loaded."""
    runner = find_runner()
    drafter = Drafter(proposer.vllm_config)
    drafter.load_model(None)
    proposer.pilotfish = drafter  # where reports look for it
    draft = runner.propose_draft_token_ids

    def propose_draft_token_ids(scheduler_output: Any, sampled_token_ids: list[list[int]], *args: Any) -> Any:
        drafted = draft(scheduler_output, sampled_token_ids, *args)
        if drafter.plugin is None:  # a rank whose drafts nobody asks for
            return drafted
        # Without probabilities a draft is verified as one that was certain, which is right for any draft.
        runner._draft_probs = runner._draft_prob_req_ids = None
        batch = runner.input_batch
        return drafter.propose(
            sampled_token_ids, batch.num_tokens_no_spec, batch.token_ids_cpu, drafted=drafted.tolist()
        )

    runner.propose_draft_token_ids = propose_draft_token_ids
