"""`pilotfish bench rag`: the same questions to a stock server and to one with a plugin, question by question.

Two servers live at a time, stock vLLM and the arm; each question goes to both, in alternating order, so that a machine
whose speed drifts slows both. Both see the same passages. Conversations, whose prompts only grow, come last.
"""

import asyncio
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...plugins.config import ConfigError, parse_assignments, unknown_key_message
from ...plugins.manager import plugins
from ...retrieval.index import Index
from ..bench import record
from ..bench.record import Record
from . import engine, evaluation, prompt, questions
from .answering import Answerer
from .evaluation import Outcome
from .questions import Case, QuestionSet

STOCK = "none"
UNCACHED = "no_prefix_caching"
SURVEYED = 300  # questions of a dataset whose retrieval is looked at, and by which thresholds are found


@dataclass(frozen=True)
class RagBenchmark:
    """What to measure; see `pilotfish bench rag --help`."""

    data: tuple[Path, ...]
    arms: tuple[str, ...]
    model: str
    index: str
    sample: int
    conversations: int
    turns: int
    k: int
    max_tokens: int
    hold_out: float
    seed: int
    server: tuple[str, ...]
    out: Path


@dataclass(frozen=True)
class PreparedCollection:
    """A dataset whose passages are in an index."""

    name: str
    index: Index
    threshold: float
    cases: Sequence[Case]
    conversations: Sequence[Sequence[Case]]
    survey: evaluation.Metrics


def arguments(arm: str) -> list[str]:
    """What `pilotfish serve` is told for an arm: a drafter or a KV policy, its options behind an @ each.

    Raises:
        ConfigError: there is no such arm.
    """
    if arm == UNCACHED:
        return ["--no-enable-prefix-caching"]
    chosen = parse_assignments(arm.replace("@", ","))
    kinds = {kind: plugins().classes(kind) for kind in ("drafter", "kv")}
    for kind, known in kinds.items():
        if chosen.name in known:
            return [f"--{kind}", arm.replace("@", ",")]
    raise ConfigError(unknown_key_message(f"arm '{arm}'", chosen.name, [*kinds["drafter"], *kinds["kv"], UNCACHED]))


def run_rag_benchmark(plan: RagBenchmark) -> None:
    """Measure, write the JSON anew after every arm, print the table."""
    record.check_output_path(plan.out)
    for arm in plan.arms:
        arguments(arm)
    collections = [questions.read_questions(path) for path in plan.data]
    for collection in collections:
        if not collection.documents:
            raise ConfigError(f"--data {collection.name}: has questions, but no passages for an index")
    console = Console(stderr=True)
    with ExitStack() as stack:
        bar = stack.enter_context(Progress(console=console, disable=not console.is_terminal))
        ready = [prepare_collection(plan, c, stack, bar) for c in collections]
        records = [
            Record("rag", r.name, "retrieval", m, v, "", [], {"k": plan.k}) for r in ready for m, v in r.survey.items()
        ]
        kept: list[dict[str, Any]] = []
        for arm in plan.arms:
            runs = measure_arm(plan, arm, ready, bar)
            records += list(summarize_outcomes(arm, runs, plan))
            kept += [
                {"arm": f"{STOCK}|{arm}" if a == STOCK else a, "dataset": d, **evaluation.raw_values(o)}
                for a, d, o in runs
            ]
            record.write_records(plan.out, records, {"runs": kept})
    print_rag_table(records)
    console.print(f"written to {plan.out}", markup=False)


def prepare_collection(
    plan: RagBenchmark, collection: QuestionSet, stack: ExitStack, bar: Progress
) -> PreparedCollection:
    """Put a dataset's passages into an index, but those held out; find its threshold by questions not asked later."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "index"
    task = bar.add_task(f"{collection.name}: indexing", total=None)
    index = stack.enter_context(Index.create(folder, plan.index))
    index.add(collection.indexed_documents(plan.hold_out, plan.seed))
    drawn, others = questions.split_cases(collection.cases, plan.sample, SURVEYED, plan.seed)
    found = evaluation.ask_for_passages(index, others, plan.k)
    bar.remove_task(task)
    least = found.get("threshold", 0.0)
    return PreparedCollection(collection.name, index, least, drawn, list(conversations(plan, collection, index)), found)


def conversations(plan: RagBenchmark, collection: QuestionSet, index: Index) -> Iterator[Sequence[Case]]:
    """Questions that are asked one after the other, on one document where there are enough."""
    by_document: dict[tuple[str, ...], list[Case]] = {}
    for case in collection.cases:
        if evaluation.answerable(index, case):
            by_document.setdefault(case.documents, []).append(case)
    long = [cases[: plan.turns] for cases in by_document.values() if len(cases) >= plan.turns]
    yield from long[: plan.conversations]


def measure_arm(
    plan: RagBenchmark, arm: str, ready: Sequence[PreparedCollection], bar: Progress
) -> list[tuple[str, str, Outcome]]:
    """Outcomes by arm and dataset."""
    total = 2 * sum(len(r.cases) + sum(map(len, r.conversations)) for r in ready)
    task = bar.add_task(f"{arm}: starting servers", total=total)
    runs: list[tuple[str, str, Outcome]] = []
    with ExitStack() as stack:
        urls = {
            a: stack.enter_context(engine.started_server(plan.model, [*more, *plan.server]))
            for a, more in ((STOCK, []), (arm, arguments(arm)))
        }
        bar.update(task, description=arm)

        async def work() -> None:
            turn = 0
            for r in ready:
                answerers = {
                    a: Answerer(r.index, url, None, k=plan.k, threshold=r.threshold, max_tokens=plan.max_tokens)
                    for a, url in urls.items()
                }
                for answerer in answerers.values():  # the first request of a server is slow
                    await evaluation.ask(answerer, Case("What is this about?"))
                for talk in [[case] for case in r.cases] + [list(c) for c in r.conversations]:
                    dataset = r.name if len(talk) == 1 else f"{r.name}, conversation"
                    histories: dict[str, list[prompt.Message]] = {a: [] for a in urls}
                    for case in talk:
                        turn += 1
                        for a in list(urls)[:: 1 if turn % 2 else -1]:
                            outcome = await evaluation.ask(answerers[a], case, histories[a])
                            runs.append((a, dataset, outcome))
                            histories[a] = prompt.follow_up_question(
                                histories[a], outcome.found.passages, case.question, outcome.done.text
                            )
                            bar.advance(task)
                for answerer in answerers.values():
                    await answerer.close()

        asyncio.run(work())
    bar.remove_task(task)
    return runs


def summarize_outcomes(arm: str, runs: Sequence[tuple[str, str, Outcome]], plan: RagBenchmark) -> Iterator[Record]:
    """Figures of both arms, and of one against the other."""
    params = {"k": plan.k, "max_tokens": plan.max_tokens}
    for dataset in dict.fromkeys(d for _, d, _ in runs):
        by_arm = {a: [o for b, d, o in runs if (b, d) == (a, dataset)] for a in (STOCK, arm)}
        for a, outcomes in by_arm.items():
            label = f"{STOCK}|{arm}" if a == STOCK else a
            for metric, value in evaluation.compute_rag_metrics(outcomes).items():
                yield Record("rag", dataset, label, metric, value, "", [], params)
        pairs = [
            (mine.done, stock.done)
            for mine, stock in zip(by_arm[arm], by_arm[STOCK], strict=True)
            if "first_token" in mine.done.milliseconds and "first_token" in stock.done.milliseconds
        ]
        if not pairs:
            continue
        same = statistics.fmean(mine.text == stock.text for mine, stock in pairs)
        yield Record("rag", dataset, arm, "identical_share", round(same, 4), "", [], params)
        for metric, time in (("answer_speedup", "total"), ("first_token_speedup", "first_token")):
            ratios = [stock.milliseconds[time] / mine.milliseconds[time] for mine, stock in pairs]
            mean = round(statistics.geometric_mean(ratios), 4)
            yield Record("rag", dataset, arm, metric, mean, "x", [round(x, 4) for x in ratios], params)
        decoding = [(_decoding(mine), _decoding(stock)) for mine, stock in pairs]
        ratios = [stock / mine for mine, stock in decoding if mine > 0 and stock > 0]
        if ratios:
            mean = round(statistics.geometric_mean(ratios), 4)
            yield Record("rag", dataset, arm, "decode_speedup", mean, "x", [round(x, 4) for x in ratios], params)


def _decoding(done: Any) -> float:
    """Milliseconds of a token behind the first."""
    more = done.tokens.get("answer", 0) - 1
    return (done.milliseconds["total"] - done.milliseconds["first_token"]) / more if more > 0 else 0.0


SHOWN = {
    "contains": "answer held",
    "f1": "F1",
    "citation_precision": "citations right",
    "honest_refusals": "honest refusals",
    "answer_ms_median": "ms",
    "answer_speedup": "speed-up",
    "identical_share": "identical",
}


def print_rag_table(records: Sequence[Record]) -> None:
    """The main figures as a table."""
    table = Table("dataset", "arm", *SHOWN.values())
    for (dataset, arm), found in record.figures_by_arm(records).items():
        if arm != "retrieval":
            table.add_row(dataset, arm, *(f"{found[m]:.2f}" if m in found else "" for m in SHOWN))
    Console().print(table)
