"""`pilotfish rag eval`: how good answers are; `pilotfish bench rag`: and what plugins do to them."""

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

bench = typer.Typer(help="Measure plugins side by side with what is there without them.")
ARMS = "token_recycling,rasd,tidal_decode@budget=8192,no_prefix_caching"


@rag_command("eval")
def evaluate(
    setup: RagOptions,
    arguments: list[str],
    questions: Annotated[
        Path,
        typer.Argument(
            help="Questions with answers: a file, or those of a folder, in the form of SQuAD, HotpotQA or DPR, "
            "or lines of question, answers and ids of documents.",
        ),
    ],
    sample: Annotated[
        int, typer.Option(min=0, help="Questions that are asked of the model, at most half of all.")
    ] = 50,
    survey: Annotated[int, typer.Option(min=1, help="Questions that are searched for, at most.")] = 500,
    hold_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the file's passages that a new index goes without.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="For what is drawn.")] = 0,
    save: Annotated[bool, typer.Option(help="Keep the threshold that is found, for ask, chat and serve.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell how good answers are: what is found, right, cited, honestly refused, and how long it takes.

    Where there is no index, one is made of the passages that come with the questions.
    """
    from . import abstention, connection, evaluation
    from . import questions as files

    with refusals():
        collection = files.read_questions(questions)
        drawn, rest = files.split_cases(collection.cases, sample, survey, seed)
        if drawn and setup.start is None:  # before the index takes its time
            asyncio.run(connection.named(setup.server, setup.model, setup.key))
        with _opened(setup.folder, collection, hold_out, seed) as index:
            told = with_bar(
                lambda bar: evaluation.ask_for_passages(index, rest, setup.k, _counted(bar, "searching", len(rest)))
            )
        if save:
            kinds = {"with": told["with_answer"], "without": told["without_answer"]}
            if few := next((kind for kind, count in kinds.items() if count < abstention.MIN_QUESTIONS), None):
                raise ConfigError(
                    f"--save: {kinds[few]:.0f} of the questions that were searched for are {few} an answer in the "
                    f"index, a threshold wants {abstention.MIN_QUESTIONS} of each kind; --sample 0 searches for all"
                )
            abstention.write_threshold(
                setup.folder, told["threshold"], {"balance": told["threshold_balance"], "questions": len(rest)}
            )
    if drawn:
        chosen = setup if setup.threshold is not None else replace(setup, threshold=told.get("threshold"))
        with chosen.ready(arguments) as answerer:
            outcomes = with_bar(
                lambda bar: evaluation.ask_questions(answerer, drawn, _counted(bar, "asking", len(drawn)))
            )
        told |= evaluation.compute_rag_metrics(outcomes)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        for name, value in told.items():
            typer.echo(f"{name.replace('_', ' '):24} {value:10.3f}")


@bench.command("rag")
def bench_rag(
    data: Annotated[
        list[Path], typer.Option("--data", help="Questions with their passages, as for `rag eval`; may be repeated.")
    ],
    arms: Annotated[str, typer.Option(help="Drafters and KV policies, NAME[@key=value...]; no_prefix_caching.")] = ARMS,
    model: Annotated[
        str, typer.Option(help="A model folder, a hub name, or the name of an embedded model.")
    ] = "smollm2-135m-instruct",
    index: Annotated[str, typer.Option(help="Kind of the index.")] = "xtr",
    sample: Annotated[int, typer.Option(min=1, help="Questions of each dataset.")] = 20,
    conversations: Annotated[
        int, typer.Option(min=0, help="Of each dataset that has several questions on a document.")
    ] = 3,
    turns: Annotated[int, typer.Option(min=2, help="Questions of a conversation.")] = 3,
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="Passages of a prompt.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 128,
    hold_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of passages that the index goes without.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="For what is drawn.")] = 0,
    server: Annotated[
        str, typer.Option(help="Further arguments of both servers.")
    ] = "--dtype float32 --max-model-len 8192",
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results/rag.json"),
) -> None:
    """Ask the same questions of a stock server and of one with a plugin: quality, time, identity of answers."""
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
    """The index, made of a collection's passages where there is none.

    Raises:
        RetrievalError: there are no passages either, or it has none of the documents that questions name.
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
        raise RetrievalError(f"{folder}: holds no document that answers one of the questions of {collection.name}")
    return index


def _counted(bar: Callable[[str, int, int | None], None], stage: str, total: int) -> Callable[[], None]:
    """What counts questions on a bar, one at each call."""
    done = 0

    def told() -> None:
        nonlocal done
        done += 1
        bar(stage, done, total)

    return told
