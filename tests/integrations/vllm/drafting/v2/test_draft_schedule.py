"""Tests of the number of draft tokens that a scheduler looks up, with a scheduler of our own."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from pilotfish.integrations.vllm.drafting.compatibility import device_speculation
from pilotfish.integrations.vllm.drafting.v2.draft_schedule import DecodeStep, decode_step, install_measured_schedule
from pilotfish.plugins.drafting.batch_draft_length import BatchDraftLength
from pilotfish.plugins.token_recycling import TokenRecycling

DEFAULT = device_speculation(TokenRecycling)["num_speculative_tokens_per_batch_size"]


class Scheduler:
    """The parts of vLLM's scheduler that are used."""

    def __init__(self, schedule: Any) -> None:
        speculative = SimpleNamespace(num_speculative_tokens_per_batch_size=schedule)
        self.vllm_config = SimpleNamespace(speculative_config=speculative)
        self.dynamic_sd_lookup = None if schedule is None else [0] + [12] * 14 + [5] * 18 + [2] * 32
        self.updates: list[Any] = []
        self.max_num_scheduled_tokens = 2048
        self.unfinished = True

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
        self.updates.append((scheduler_output, model_runner_output))
        return "outputs"

    def has_unfinished_requests(self) -> bool:
        return self.unfinished


def step(drafts: dict[str, int], accepted: dict[str, int], prompt: int = 0) -> tuple[Any, Any]:
    """Return a step of requests by their number of draft tokens; ``prompt`` tokens of another one are processed."""
    tokens = {request: 1 + n for request, n in drafts.items()} | ({"new": prompt} if prompt else {})
    scheduled = SimpleNamespace(
        num_scheduled_tokens=tokens,
        scheduled_spec_decode_tokens={r: [-1] * n for r, n in drafts.items() if n},
        total_num_scheduled_tokens=sum(tokens.values()),
    )
    sampled = [[7] * (1 + accepted.get(r, 0)) for r in tokens]
    return scheduled, SimpleNamespace(req_ids=list(tokens), sampled_token_ids=sampled)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (({"a": 3, "b": 3}, {"a": 2}), DecodeStep(2, 3, 2, True)),
        (({"a": 0, "b": 0}, {}), DecodeStep(2, 0, 0, True)),
        (({"a": 3, "b": 0}, {"a": 3}), DecodeStep(1, 3, 3, False)),  # one has switched the drafter off
        (({"a": 3}, {"a": 1}, 40), None),
        (({}, {}), None),
    ],
)
def test_steps_that_process_no_prompt_are_read(arguments: Any, expected: DecodeStep | None) -> None:
    assert decode_step(*step(*arguments)) == expected


def test_the_default_schedule_follows_measured_steps() -> None:
    scheduler, now = Scheduler([tuple(entry) for entry in DEFAULT]), [0.0]
    install_measured_schedule(scheduler, TokenRecycling, "chain", lambda: now[0])
    lengths: Any = scheduler.dynamic_sd_lookup
    assert isinstance(lengths, BatchDraftLength) and lengths[2] == 12
    for k in [12, 12, 5, 5, 2, 2, 1, 1, 0, 0] * 20:  # draft tokens are never accepted, and each takes time
        now[0] += 0.01 * (1 + k)
        assert scheduler.update_from_output(*step({"a": k, "b": k}, {})) == "outputs"
    assert lengths[2] == 0
    assert len(scheduler.updates) == 200
    assert lengths.cost.steps == 100  # of the second step of each length
    scheduler.unfinished, now[0] = False, now[0] + 0.01
    scheduler.update_from_output(*step({"a": 0, "b": 0}, {}))
    scheduler.unfinished, now[0] = True, now[0] + 99
    scheduler.update_from_output(*step({"a": 0, "b": 0}, {}))
    assert lengths.cost.steps == 101  # the engine was idle
    scheduler.update_from_output(*step({"a": 12}, {"a": 12}, prompt=99))
    now[0] += 99
    scheduler.update_from_output(*step({"a": 12}, {"a": 12}))
    assert lengths.cost.steps == 101  # the step before processed a prompt


@pytest.mark.parametrize("schedule", [None, [[1, 4, 12], [5, 5, 0]]])
def test_other_schedules_remain(schedule: Any) -> None:
    scheduler = Scheduler(schedule)
    table = scheduler.dynamic_sd_lookup
    install_measured_schedule(scheduler, TokenRecycling, "chain")
    assert scheduler.dynamic_sd_lookup is table and not vars(scheduler).get("update_from_output")
