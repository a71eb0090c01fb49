"""Evaluation of answers: retrieval, correctness, citations, abstention and latency."""

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
    """A question and its answer.

    Attributes:
        case: Question.
        answerable: Whether the index contains the documents that the question needs.
        found: Result of the search.
        done: Complete answer.
    """

    case: Case
    answerable: bool
    found: PassagesFound
    done: AnswerDone


def answerable(index: Index, case: Case) -> bool:
    """Return whether an index contains the documents that a question needs."""
    needed = all if case.together else any
    return bool(case.answers) and (not case.documents or needed(d in index for d in case.documents))


async def ask(answerer: Answerer, case: Case, history: Sequence[prompt.Message] = ()) -> Outcome:
    """Ask one question, and wait for the complete answer.

    Raises:
        ServerError: The server fails.
        RetrievalError: The index cannot be read.
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


def ask_questions(answerer: Answerer, cases: Sequence[Case], on_progress: Callable[[], None]) -> list[Outcome]:
    """Ask questions one after the other.

    Args:
        answerer: Answerer to ask.
        cases: Questions.
        on_progress: Callback that is called after each question.
    """

    async def work() -> list[Outcome]:
        outcomes = []
        for case in cases:
            outcomes.append(await ask(answerer, case))
            on_progress()
        await answerer.close()
        return outcomes

    return asyncio.run(work())


def ask_for_passages(
    index: Index, cases: Sequence[Case], k: int, on_progress: Callable[[], None] = lambda: None
) -> Metrics:
    """Evaluate the retrieval of passages, and calibrate the threshold of abstention.

    Args:
        index: Index to search.
        cases: Questions.
        k: Number of passages.
        on_progress: Callback that is called after each question.

    Returns:
        The metrics that are defined for these questions:

        - ``recall@K``: share of the needed documents among the first ``k``, over answerable questions; if any one of
          the documents is enough, whether one of them is.
        - ``answer_in_passages``: share of answerable questions for which a passage contains a known answer.
        - ``threshold`` and ``threshold_balance``: see `abstention.calibrate_threshold`.
        - ``with_answer`` and ``without_answer``: numbers of answerable and unanswerable questions.
        - ``search_ms``: median duration of a search.
    """
    recalls, contained, milliseconds = [], [], []
    sides: dict[bool, list[float]] = {True: [], False: []}
    for case in cases:
        found = retrieve_passages(index, case.question, k)
        can = answerable(index, case)
        sides[can].append(found.similarity or 0.0)
        milliseconds.append(found.milliseconds)
        if can:
            contained.append(float(any(scoring.contains(p.text, case.answers) for p in found.passages)))
            ids = {p.id for p in found.passages}
            hit = [d in ids for d in case.documents]
            if hit:
                recalls.append(statistics.fmean(hit) if case.together else float(any(hit)))
        on_progress()
    least, balance = abstention.calibrate_threshold(sides[True], sides[False]) or (None, None)
    figures = {
        f"recall@{k}": _mean(recalls),
        "answer_in_passages": _mean(contained),
        "threshold": least,
        "threshold_balance": balance,
        "with_answer": len(sides[True]),
        "without_answer": len(sides[False]),
        "search_ms": _median(milliseconds),
    }
    return _known(figures)


def compute_rag_metrics(outcomes: Sequence[Outcome]) -> Metrics:
    """Compute metrics over questions; metrics that are not defined for these questions are omitted.

    - ``exact_match`` and ``f1`` as in SQuAD, and ``contains``: share of the answers that contain a known answer word by
      word. All three are over answerable questions; an abstention counts as a wrong answer.
    - ``cites``: share of the answers with a citation.
    - ``citation_precision``: share of the cited passages that contain a known answer or belong to a needed document.
    - ``attribution_precision``: the same for attributed passages.
    - ``true_abstentions``: true abstentions, over unanswerable questions.
    - ``false_abstentions``: false abstentions, over answerable questions.
    - ``first_token_ms`` and ``answer_ms_median``: medians of TTFT and of the total duration; ``answer_ms_p95``.
    - ``cached_share``: share of the prompt tokens that the server found in its prefix cache.
    """
    metrics: dict[str, float | None] = {}
    good = [o for o in outcomes if o.answerable]
    others = [o for o in outcomes if not o.answerable]
    metrics["exact_match"] = _mean([float(scoring.exact_match(o.done.text, o.case.answers)) for o in good])
    metrics["f1"] = _mean([scoring.f1(o.done.text, o.case.answers) for o in good])
    metrics["contains"] = _mean([float(scoring.contains(o.done.text, o.case.answers)) for o in good])
    said = [o for o in outcomes if o.done.known]
    metrics["cites"] = _mean([float(bool(o.done.cited)) for o in said])
    metrics["citation_precision"] = _mean([x for o in said for x in _right(o, o.done.cited)])
    metrics["attribution_precision"] = _mean([x for o in said for x in _right(o, o.done.attributed)])
    metrics["true_abstentions"] = _mean([float(not o.done.known) for o in others])
    metrics["false_abstentions"] = _mean([float(not o.done.known) for o in good])
    asked = [o.done for o in outcomes if "first_token" in o.done.milliseconds]  # those for which the model was asked
    metrics["first_token_ms"] = _median([d.milliseconds["first_token"] for d in asked])
    metrics["answer_ms_median"] = _median([d.milliseconds["total"] for d in asked])
    metrics["answer_ms_p95"] = _p95([d.milliseconds["total"] for d in asked])
    prompts = [d.tokens for d in asked if "cached" in d.tokens]
    if total := sum(t["prompt"] for t in prompts):
        metrics["cached_share"] = sum(t["cached"] for t in prompts) / total
    return _known(metrics)


def raw_values(outcome: Outcome) -> dict[str, Any]:
    """Return the values of one question that are written to the results."""
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
    """Return for each of the passages 1.0 if it contains a known answer or belongs to a needed document, else 0.0."""
    by_number = {p.number: p for p in outcome.found.passages}
    passages = [by_number[n] for n in numbers]
    return [float(p.id in outcome.case.documents or scoring.contains(p.text, outcome.case.answers)) for p in passages]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _p95(values: Sequence[float]) -> float | None:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else None
