"""`pilotfish bench rag`: the same questions to a stock vLLM server and to a server with a plugin.

Both servers run at the same time. Each question goes to both, in alternating order, so that a change in the machine's
speed affects both. Both get the same passages. Conversations, whose prompts only grow, come last.
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
from ...plugins.terminal import make_table, print_plain
from ...retrieval.index import Index
from ..bench import record
from ..bench.record import Record
from . import engine, evaluation, prompt, questions
from .answering import Answerer
from .evaluation import Outcome
from .questions import Case, QuestionSet

STOCK = "none"
UNCACHED = "no_prefix_caching"
SURVEYED = 300  # questions of a dataset for which retrieval is evaluated and the threshold is calibrated


@dataclass(frozen=True)
class RagBenchmark:
    """The options of a benchmark run; see `pilotfish bench rag --help`."""

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
    """A dataset whose passages are in an index.

    Attributes:
        name: Name of the dataset.
        index: Index of the passages.
        threshold: Abstention threshold.
        cases: Questions to ask.
        conversations: Questions to ask one after the other, with the earlier turns in the prompt.
        survey: Metrics of retrieval.
    """

    name: str
    index: Index
    threshold: float
    cases: Sequence[Case]
    conversations: Sequence[Sequence[Case]]
    survey: evaluation.Metrics


def arguments(arm: str) -> list[str]:
    """Return the arguments of `pilotfish serve` for a configuration.

    Args:
        arm: Name of a drafter or a KV policy, each option after an ``@``; or ``no_prefix_caching``.

    Raises:
        ConfigError: There is no such plugin.
    """
    if arm == UNCACHED:
        return ["--no-enable-prefix-caching"]
    selection = parse_assignments(arm.replace("@", ","))
    kinds = {kind: plugins().classes(kind) for kind in ("drafter", "kv")}
    for kind, known in kinds.items():
        if selection.name in known:
            return [f"--{kind}", arm.replace("@", ",")]
    raise ConfigError(unknown_key_message(f"arm '{arm}'", selection.name, [*kinds["drafter"], *kinds["kv"], UNCACHED]))


def run_rag_benchmark(plan: RagBenchmark) -> None:
    """Run the benchmark, write the JSON file after each configuration, and print the table."""
    record.check_output_path(plan.out)
    for arm in plan.arms:
        arguments(arm)
    collections = [questions.read_questions(path) for path in plan.data]
    for collection in collections:
        if not collection.documents:
            raise ConfigError(f"--data {collection.name}: contains questions, but no passages for an index")
    console = Console(stderr=True)
    with ExitStack() as stack:
        bar = stack.enter_context(Progress(console=console, disable=not console.is_terminal))
        ready = [prepare_collection(plan, c, stack, bar) for c in collections]
        records = [
            Record("rag", r.name, "retrieval", m, v, "", [], {"k": plan.k}) for r in ready for m, v in r.survey.items()
        ]
        raw: list[dict[str, Any]] = []
        for arm in plan.arms:
            runs = measure_arm(plan, arm, ready, bar)
            records += list(summarize_outcomes(arm, runs, plan))
            raw += [
                {"arm": f"{STOCK}|{arm}" if a == STOCK else a, "dataset": d, **evaluation.raw_values(o)}
                for a, d, o in runs
            ]
            record.write_records(plan.out, records, {"runs": raw}, model=plan.model)
    print_rag_table(records)
    console.print(f"written to {plan.out}", markup=False)


def prepare_collection(
    plan: RagBenchmark, collection: QuestionSet, stack: ExitStack, bar: Progress
) -> PreparedCollection:
    """Index a dataset's passages, without those held out, and calibrate the threshold on questions not asked later."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "index"
    task = bar.add_task(f"{collection.name}: indexing", total=None)
    index = stack.enter_context(Index.create(folder, plan.index))
    index.add(collection.indexed_documents(plan.hold_out, plan.seed))
    sampled, others = questions.split_cases(collection.cases, plan.sample, SURVEYED, plan.seed)
    survey = evaluation.ask_for_passages(index, others, plan.k)
    bar.remove_task(task)
    threshold = survey.get("threshold", 0.0)
    return PreparedCollection(
        collection.name, index, threshold, sampled, list(conversations(plan, collection, index)), survey
    )


def conversations(plan: RagBenchmark, collection: QuestionSet, index: Index) -> Iterator[Sequence[Case]]:
    """Yield conversations: answerable questions about the same document, for documents with enough of them."""
    by_document: dict[tuple[str, ...], list[Case]] = {}
    for case in collection.cases:
        if evaluation.answerable(index, case):
            by_document.setdefault(case.documents, []).append(case)
    long = [cases[: plan.turns] for cases in by_document.values() if len(cases) >= plan.turns]
    yield from long[: plan.conversations]


def measure_arm(
    plan: RagBenchmark, arm: str, ready: Sequence[PreparedCollection], bar: Progress
) -> list[tuple[str, str, Outcome]]:
    """Ask all questions of both servers, and return the configuration, dataset and outcome of each."""
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
                for answerer in answerers.values():  # warm up: the first request of a server is slow
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
    """Yield the metrics of both configurations, and those that compare them."""
    params = {"k": plan.k, "max_tokens": plan.max_tokens}
    for dataset in dict.fromkeys(d for _, d, _ in runs):
        by_arm = {a: [o for b, d, o in runs if (b, d) == (a, dataset)] for a in (STOCK, arm)}
        for a, outcomes in by_arm.items():
            label = f"{STOCK}|{arm}" if a == STOCK else a
            for metric, value in evaluation.compute_rag_metrics(outcomes).items():
                yield Record("rag", dataset, label, metric, value, "", [], params)
        pairs = [
            (plugin.done, stock.done)
            for plugin, stock in zip(by_arm[arm], by_arm[STOCK], strict=True)
            if "first_token" in plugin.done.milliseconds and "first_token" in stock.done.milliseconds
        ]
        if not pairs:
            continue
        same = statistics.fmean(plugin.text == stock.text for plugin, stock in pairs)
        yield Record("rag", dataset, arm, "identical_share", round(same, 4), "", [], params)
        for metric, time in (("answer_speedup", "total"), ("first_token_speedup", "first_token")):
            ratios = [stock.milliseconds[time] / plugin.milliseconds[time] for plugin, stock in pairs]
            mean = round(statistics.geometric_mean(ratios), 4)
            yield Record("rag", dataset, arm, metric, mean, "x", [round(x, 4) for x in ratios], params)
        decoding = [(_decoding(plugin), _decoding(stock)) for plugin, stock in pairs]
        ratios = [stock / plugin for plugin, stock in decoding if plugin > 0 and stock > 0]
        if ratios:
            mean = round(statistics.geometric_mean(ratios), 4)
            yield Record("rag", dataset, arm, "decode_speedup", mean, "x", [round(x, 4) for x in ratios], params)


def _decoding(done: Any) -> float:
    """Return the time per output token (TPOT) in milliseconds: the mean over all tokens after the first."""
    more = done.tokens.get("answer", 0) - 1
    return (done.milliseconds["total"] - done.milliseconds["first_token"]) / more if more > 0 else 0.0


SHOWN = {
    "contains": "contains answer",
    "f1": "F1",
    "citation_precision": "citation precision",
    "answer_ms_median": "ms",
    "answer_speedup": "speed-up",
    "identical_share": "identical",
}


def print_rag_table(records: Sequence[Record]) -> None:
    """Print the main metrics, one table per dataset; a row of stock vLLM precedes the arm that it was paired with."""
    tables: dict[str, Table] = {}
    for (dataset, arm), metrics in record.figures_by_arm(records).items():
        if arm == "retrieval":
            continue
        if dataset not in tables:
            tables[dataset] = make_table("configuration", *SHOWN.values(), numbers=SHOWN.values(), title=dataset)
        is_stock = arm.startswith(f"{STOCK}|")
        values = (f"{metrics[m]:.{0 if m.endswith('_median') else 2}f}" if m in metrics else "" for m in SHOWN)
        tables[dataset].add_row(STOCK if is_stock else arm, *values, end_section=not is_stock)
    print_plain(*tables.values())
