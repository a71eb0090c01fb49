"""`pilotfish bench retrieval`."""

from pathlib import Path
from typing import Annotated

import typer

from ...plugins.cli import extend_group
from ...plugins.hookspecs import hookimpl
from ...plugins.terminal import MEASURING
from ...retrieval.cli.options import refusals

bench = typer.Typer(help="Measure plugins side by side with what is there without them.")
ARMS = (
    "bm25s,faiss_flat,maxsim,xtr@exact,xtr@nprobe=8,xtr,xtr@nprobe=32,bm25,dense,"
    "vdr,vdr@query_encoding=bag_of_words,vdr@document_encoding=bag_of_words,vdr@document_encoding=bag_of_words@rerank=100,hybrid"
)


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the command."""
    extend_group(cli, "bench", bench, MEASURING)
    cli.command("report", rich_help_panel=MEASURING)(report)


def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Files of measurements, or folders [default: benchmarks/results].")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("report.html"),
) -> None:
    """Write one page from the results of benchmarks: gains, costs, where a plugin loses, and how to repeat it."""
    from ...plugins.manager import plugins
    from . import record
    from . import report as page

    record.check_output_path(out)
    found = page.read_results(results or [Path("benchmarks/results")])
    with refusals():
        page.write_report(
            found, [name for kind in ("drafter", "kv", "pruner", "index") for name in plugins().classes(kind)], out
        )
    typer.echo(f"written to {out}")


@bench.command("retrieval")
def bench_retrieval(
    data: Annotated[list[Path], typer.Option("--data", help="A BEIR folder; may be repeated.")],
    arms: Annotated[str, typer.Option(help="KIND[@name=value...], bm25s, faiss_flat, maxsim, sparse_encoder.")] = ARMS,
    queries: Annotated[int, typer.Option(min=1, help="Queries of each collection, at most.")] = 10_000,
    union: Annotated[bool, typer.Option(help="Also all collections in one index, for times.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a search.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Searches of each query, interleaved; the median counts.")] = 3,
    encoder: Annotated[str | None, typer.Option(help="A multi-vector encoder.")] = None,
    peers: Annotated[
        Path | None,
        typer.Option(exists=True, help="A Python that has what arms fast_plaid and xtr_warp need."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results/retrieval.json"),
) -> None:
    """Compare indexes on judged queries: quality, time of a search, time to build, memory."""
    from . import retrieval

    with refusals():
        retrieval.run_retrieval_benchmark(
            retrieval.RetrievalBenchmark(
                tuple(data), tuple(arms.split(",")), queries, union, threads, repeats, encoder, out, peers
            )
        )
