"""KV correction (TidalDecode, section 3.4): every T decoded tokens, recompute their keys and values.

Hidden states of sparse layers differ slightly from those of full attention, and so do the cached keys and values; the
difference grows with the text. A correction sends the last T tokens through the model again, together with the newest
one. The sparse backends use full attention for requests with several query tokens, and overwrite their keys and values.

The scheduler needs no new type of step: it already computes all tokens between a request's number of computed tokens
and the end of its text, as after a preemption. A correction therefore only lowers the number of computed tokens.
"""

from typing import Any

from .....kvcache.selection import ReadPlan
from .....plugins.contracts import KVPolicy


class KVCorrector:
    """Correction of the requests of one scheduler.

    Args:
        interval: Number of decoded tokens between corrections.
        budget: Context length up to which attention is full and needs no correction.

    Attributes:
        corrected: Number of recomputed tokens.
    """

    def __init__(self, interval: int, budget: int) -> None:
        self.interval, self.budget = interval, budget
        self.corrected = 0
        self._exact: dict[str, int] = {}  # request -> length of the text whose keys and values are exact

    def after_step(self, requests: Any, scheduled: dict[str, int]) -> None:
        """Lower the number of computed tokens of requests that are due for correction.

        Args:
            requests: Running requests of the scheduler by id, after the step.
            scheduled: Number of tokens that the step computed for each request, by id.
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
    """Install KV correction in a new scheduler, if the engine's KV policy asks for it."""
    plan = None if policy is None else policy.read_plan()
    if plan is not None:
        reset_computed_tokens(scheduler, plan)


def reset_computed_tokens(scheduler: Any, plan: ReadPlan) -> None:
    """Wrap `update_from_output` of a scheduler, if the read plan asks for correction."""
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
