"""`pilotfish rag eval`, which measures answer quality, and `pilotfish bench rag`, which compares plugins."""

import asyncio
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ...plugins.config import ConfigError
from ...retrieval.cli.options import AsJson, refusals, with_bar
from ...retrieval.errors import RetrievalError
from .cli_options import RagOptions, new_index_folder, rag_command

bench = typer.Typer(help="Compare plugins with stock vLLM.")
ARMS = "token_recycling,rasd,tidal_decode@budget=8192,no_prefix_caching"


@rag_command("eval")
def evaluate(
    setup: RagOptions,
    arguments: list[str],
    questions: Annotated[
        Path,
        typer.Argument(
            help="Questions with answers: a file, or a folder of files, in the format of SQuAD, HotpotQA or DPR, "
            "or JSON lines with question, answers and ids of documents.",
        ),
    ],
    sample: Annotated[int, typer.Option(min=0, help="Number of questions for the model, at most half of all.")] = 50,
    survey: Annotated[int, typer.Option(min=1, help="Maximum number of questions for the retrieval metrics.")] = 500,
    hold_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the file's passages held out of a new index.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of random samples.")] = 0,
    save: Annotated[bool, typer.Option(help="Save the calibrated threshold for ask, chat and serve.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure answer quality. Covers retrieval, correctness, citations, abstention and latency.

    If there is no index, one is created from the passages that come with the questions.
    """
    from . import abstention, connection, evaluation
    from . import questions as files

    with refusals():
        collection = files.read_questions(questions)
        sampled, rest = files.split_cases(collection.cases, sample, survey, seed)
        if sampled and setup.start is None:  # fail before the index is built
            asyncio.run(connection.named(setup.server, setup.model, setup.key))
        with _opened(setup.folder, collection, hold_out, seed) as index:
            metrics = with_bar(
                lambda bar: evaluation.ask_for_passages(index, rest, setup.k, _counted(bar, "searching", len(rest)))
            )
        if save:
            kinds = {"with": metrics["with_answer"], "without": metrics["without_answer"]}
            if few := next((kind for kind, count in kinds.items() if count < abstention.MIN_QUESTIONS), None):
                raise ConfigError(
                    f"--save: {kinds[few]:.0f} of the surveyed questions are {few} an answer in the index, "
                    f"{abstention.MIN_QUESTIONS} of each are needed for a threshold; use --sample 0 to survey all"
                )
            abstention.write_threshold(
                setup.folder, metrics["threshold"], {"balance": metrics["threshold_balance"], "questions": len(rest)}
            )
    if sampled:
        options = setup if setup.threshold is not None else replace(setup, threshold=metrics.get("threshold"))
        with options.ready(arguments) as answerer:
            outcomes = with_bar(
                lambda bar: evaluation.ask_questions(answerer, sampled, _counted(bar, "asking", len(sampled)))
            )
        metrics |= evaluation.compute_rag_metrics(outcomes)
    if as_json:
        typer.echo(json.dumps(metrics))
    else:
        for name, value in metrics.items():
            typer.echo(f"{name.replace('_', ' '):24} {value:10.3f}")


@bench.command("rag")
def bench_rag(
    data: Annotated[
        list[Path],
        typer.Option("--data", help="Questions with their passages, in a format of `rag eval`; can be repeated."),
    ],
    arms: Annotated[
        str, typer.Option(help="Drafters and KV policies, NAME[@key=value...], or no_prefix_caching.")
    ] = ARMS,
    model: Annotated[
        str, typer.Option(help="Model folder, Hugging Face Hub name, or name of an embedded model.")
    ] = "smollm2-135m-instruct",
    index: Annotated[str, typer.Option(help="Type of the index.")] = "xtr",
    sample: Annotated[int, typer.Option(min=1, help="Number of questions of each dataset.")] = 20,
    conversations: Annotated[
        int, typer.Option(min=0, help="Number of conversations of each dataset with several questions per document.")
    ] = 3,
    turns: Annotated[int, typer.Option(min=2, help="Number of questions in a conversation.")] = 3,
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="Number of passages in a prompt.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens in an answer.")] = 128,
    hold_out: Annotated[float, typer.Option(min=0, max=0.9, help="Share of passages held out of the index.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of random samples.")] = 0,
    server: Annotated[
        str, typer.Option(help="Further arguments of both servers.")
    ] = "--dtype float32 --max-model-len 8192",
    out: Annotated[Path, typer.Option(help="Output file, JSON.")] = Path("benchmarks/results/rag.json"),
) -> None:
    """Compare answers of stock vLLM and of vLLM with plugins. Measures quality, latency and identity of the text."""
    from . import bench as measuring

    with refusals():
        measuring.run_rag_benchmark(
            measuring.RagBenchmark(
                tuple(data),
                tuple(arms.split(",")),
                model,
                index,
                sample,
                conversations,
                turns,
                k,
                max_tokens,
                hold_out,
                seed,
                tuple(shlex.split(server)),
                out,
            )
        )


def _opened(folder: Path, collection: Any, hold_out: float, seed: int) -> Any:
    """Open the index, or create it from the passages of a question set.

    Raises:
        RetrievalError: There is neither an index nor passages, or the index contains no needed document.
    """
    from ...retrieval.index import Index
    from ...retrieval.store.manifest import CURRENT
    from . import evaluation

    if (folder / CURRENT).exists() or not collection.documents:
        index = Index.open(folder)
    else:
        with new_index_folder(folder, whole=True) as index:
            with_bar(lambda bar: index.add(collection.indexed_documents(hold_out, seed), bar))
    if not any(evaluation.answerable(index, case) for case in collection.cases):
        index.close()
        raise RetrievalError(f"{folder}: contains no document that answers one of the questions of {collection.name}")
    return index


def _counted(bar: Callable[[str, int, int | None], None], stage: str, total: int) -> Callable[[], None]:
    """Return a function that advances a progress bar by one question at each call."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        bar(stage, done, total)

    return advance
