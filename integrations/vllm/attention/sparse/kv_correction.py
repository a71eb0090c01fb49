"""KV correction (TidalDecode, section 3.4): every T decoded tokens, compute their keys and values anew.

Sparse layers make hidden states that differ a little from full attention's, and with them the keys and values that are
cached; the difference grows with the text. A correction sends the last T tokens through the model once more, together
with the newest one. Rows of several tokens are attended in full by the sparse backends, and overwrite what they find.

The scheduler needs no new kind of step: it already computes whatever lies between a request's computed tokens and its
text, as after a preemption, so a correction is a smaller count of computed tokens.
"""

from typing import Any

from .....kvcache.selection import ReadPlan
from .....plugins.contracts import KVPolicy


class KVCorrector:
    """Sets back the requests of one scheduler that are due.

    Args:
        interval: Decoded tokens between corrections.
        budget: Context within which nothing is sparse, and nothing needs correction.
    """

    def __init__(self, interval: int, budget: int) -> None:
        self.interval, self.budget = interval, budget
        self.corrected = 0  # tokens computed anew
        self._exact: dict[str, int] = {}  # request -> length of the text whose keys and values are exact

    def after_step(self, requests: Any, scheduled: dict[str, int]) -> None:
        """Look at the requests of a finished step.

        Args:
            requests: The scheduler's running requests by id.
            scheduled: Tokens that the step computed for each.
        """
        for name in [n for n in self._exact if n not in requests]:
            del self._exact[name]
        for name, computed in scheduled.items():
            request = requests.get(name)
            if request is None:
                continue
            if computed > 1 or request.num_computed_tokens <= self.budget:
                self._exact[name] = request.num_computed_tokens
            sparse = request.num_computed_tokens - self._exact.setdefault(name, request.num_computed_tokens)
            if sparse >= self.interval:
                self.corrected += sparse
                request.num_computed_tokens -= sparse


def install_kv_correction(scheduler: Any, policy: KVPolicy | None) -> None:
    """Let a new scheduler correct, when the engine's KV policy asks for it."""
    plan = None if policy is None else policy.read_plan()
    if plan is not None:
        reset_computed_tokens(scheduler, plan)


def reset_computed_tokens(scheduler: Any, plan: ReadPlan) -> None:
    """Wrap a scheduler's `update_from_output`, when a plan asks for correction."""
    if plan.correction_interval < 1:
        return
    corrector = scheduler.pilotfish_corrector = KVCorrector(plan.correction_interval, plan.rule.budget)
    original = scheduler.update_from_output

    def update_from_output(scheduler_output: Any, model_runner_output: Any) -> Any:
        result = original(scheduler_output, model_runner_output)
        running = {request.request_id: request for request in scheduler.running}
        corrector.after_step(running, scheduler_output.num_scheduled_tokens)
        return result

    scheduler.update_from_output = update_from_output
