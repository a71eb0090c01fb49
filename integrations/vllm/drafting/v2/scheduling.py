"""Requests that switch the drafter off, for the V2 model runner: the scheduler gives them no draft tokens.

With asynchronous scheduling vLLM schedules the same number of draft tokens for all requests, before they are known.
"""

from typing import Any

from ..request_options import accepts_drafts


def install_request_switch(scheduler: Any) -> None:
    """Wrap the two methods of a scheduler that set the draft tokens of its requests."""
    after_schedule, update_drafts = scheduler._update_after_schedule, scheduler.update_draft_token_ids

    def remove_drafts(requests: Any) -> None:
        for request_id in requests:
            request = scheduler.requests.get(request_id)
            if request is not None and request.spec_token_ids and not accepts_drafts(request.sampling_params):
                request.spec_token_ids = []

    def update_after_schedule(scheduler_output: Any) -> None:
        after_schedule(scheduler_output)
        remove_drafts(scheduler_output.num_scheduled_tokens)

    def update_draft_token_ids(draft_token_ids: Any) -> None:
        update_drafts(draft_token_ids)
        remove_drafts(draft_token_ids.req_ids)

    scheduler._update_after_schedule = update_after_schedule
    scheduler.update_draft_token_ids = update_draft_token_ids
