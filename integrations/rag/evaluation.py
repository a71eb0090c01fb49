"""How good answers are: what was found, what was said, what it stands on, what was honestly refused, and the time."""

import asyncio
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...retrieval.index import Index
from . import abstention, prompt, scoring
from .answering import AnswerDone, Answerer, PassagesFound, retrieve_passages
from .questions import Case

Metrics = dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """A question and what came of it."""

    case: Case
    answerable: bool
    found: PassagesFound
    done: AnswerDone


def answerable(index: Index, case: Case) -> bool:
    """Whether an index holds what a question needs."""
    needed = all if case.together else any
    return bool(case.answers) and (not case.documents or needed(d in index for d in case.documents))


async def ask(answerer: Answerer, case: Case, history: Sequence[prompt.Message] = ()) -> Outcome:
    """Ask one question, and wait for all of the answer.

    Raises:
        ServerError, RetrievalError: see `Answerer.answer`.
    """
    found, done = None, None
    async for event in answerer.answer(case.question, history):
        match event:
            case PassagesFound():
                found = event
            case AnswerDone():
                done = event
    assert found is not None and done is not None
    return Outcome(case, answerable(answerer.index, case), found, done)


def ask_questions(answerer: Answerer, cases: Sequence[Case], told: Callable[[], None]) -> list[Outcome]:
    """Ask one question after the other."""

    async def work() -> list[Outcome]:
        outcomes = []
        for case in cases:
            outcomes.append(await ask(answerer, case))
            told()
        await answerer.close()
        return outcomes

    return asyncio.run(work())


def ask_for_passages(index: Index, cases: Sequence[Case], k: int, told: Callable[[], None] = lambda: None) -> Metrics:
    """What the index alone does with questions, and the threshold that tells best between those it answers and others.

    Returns:
        What can be told of these questions:

        - ``recall@K``: of questions that can be answered, the share of the documents needed that are among the first
          ``k``; where any one will do, whether one is.
        - ``answer_in_passages``: of the same, whether one of the passages holds a known answer.
        - ``threshold`` and ``threshold_balance``; see `threshold.calibrate`.
        - ``with_answer`` and ``without_answer``: how many questions that was found by.
        - ``search_ms``: the median.
    """
    recalls, held, milliseconds = [], [], []
    sides: dict[bool, list[float]] = {True: [], False: []}
    for case in cases:
        found = retrieve_passages(index, case.question, k)
        can = answerable(index, case)
        sides[can].append(found.similarity or 0.0)
        milliseconds.append(found.milliseconds)
        if can:
            held.append(float(any(scoring.contains(p.text, case.answers) for p in found.passages)))
            ids = {p.id for p in found.passages}
            hit = [d in ids for d in case.documents]
            if hit:
                recalls.append(statistics.fmean(hit) if case.together else float(any(hit)))
        told()
    least, balance = abstention.calibrate_threshold(sides[True], sides[False]) or (None, None)
    figures = {
        f"recall@{k}": _mean(recalls),
        "answer_in_passages": _mean(held),
        "threshold": least,
        "threshold_balance": balance,
        "with_answer": len(sides[True]),
        "without_answer": len(sides[False]),
        "search_ms": _median(milliseconds),
    }
    return _known(figures)


def compute_rag_metrics(outcomes: Sequence[Outcome]) -> Metrics:
    """Shares and times over questions; what cannot be told of these is left out.

    - ``exact_match``, ``f1`` as SQuAD has them, ``contains``: answers that hold a known one word by word. Of questions
      that can be answered; a refusal is a wrong answer.
    - ``cites``: answers that name a passage; ``citation_precision``: of the passages that they name, those that hold a
      known answer or are of its documents; ``attribution_precision``: the same of passages that were attributed.
    - ``honest_refusals``: of questions without an answer; ``wrong_refusals``: of those with one.
    - ``first_token_ms``, ``answer_ms_median`` (both medians), ``answer_ms_p95``.
    - ``cached_share``: of prompt tokens, those that the server had in its prefix cache.
    """
    told: dict[str, float | None] = {}
    good = [o for o in outcomes if o.answerable]
    others = [o for o in outcomes if not o.answerable]
    told["exact_match"] = _mean([float(scoring.exact_match(o.done.text, o.case.answers)) for o in good])
    told["f1"] = _mean([scoring.f1(o.done.text, o.case.answers) for o in good])
    told["contains"] = _mean([float(scoring.contains(o.done.text, o.case.answers)) for o in good])
    said = [o for o in outcomes if o.done.known]
    told["cites"] = _mean([float(bool(o.done.cited)) for o in said])
    told["citation_precision"] = _mean([x for o in said for x in _right(o, o.done.cited)])
    told["attribution_precision"] = _mean([x for o in said for x in _right(o, o.done.attributed)])
    told["honest_refusals"] = _mean([float(not o.done.known) for o in others])
    told["wrong_refusals"] = _mean([float(not o.done.known) for o in good])
    asked = [o.done for o in outcomes if "first_token" in o.done.milliseconds]  # of the model
    told["first_token_ms"] = _median([d.milliseconds["first_token"] for d in asked])
    told["answer_ms_median"] = _median([d.milliseconds["total"] for d in asked])
    told["answer_ms_p95"] = _p95([d.milliseconds["total"] for d in asked])
    prompts = [d.tokens for d in asked if "cached" in d.tokens]
    if total := sum(t["prompt"] for t in prompts):
        told["cached_share"] = sum(t["cached"] for t in prompts) / total
    return _known(told)


def raw_values(outcome: Outcome) -> dict[str, Any]:
    """What is kept of one question."""
    done = outcome.done
    return {
        "question": outcome.case.question,
        "answerable": outcome.answerable,
        "passages": [p.id for p in outcome.found.passages],
        "similarity": outcome.found.similarity,
        "answer": done.text,
        "cited": done.cited,
        "attributed": list(done.attributed),
        "milliseconds": dict(done.milliseconds),
        "tokens": dict(done.tokens),
        "saved": dict(done.saved),
    }


def _known(figures: Mapping[str, float | None]) -> Metrics:
    return {name: round(value, 4) for name, value in figures.items() if value is not None}


def _right(outcome: Outcome, numbers: Sequence[int]) -> list[float]:
    """Of passages that an answer names, whether they hold what is asked."""
    by_number = {p.number: p for p in outcome.found.passages}
    chosen = [by_number[n] for n in numbers]
    return [float(p.id in outcome.case.documents or scoring.contains(p.text, outcome.case.answers)) for p in chosen]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _p95(values: Sequence[float]) -> float | None:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else None
