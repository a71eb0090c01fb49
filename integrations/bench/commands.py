"""`pilotfish bench retrieval` and `pilotfish report`."""

from pathlib import Path
from typing import Annotated

import typer

from ...plugins.cli import extend_group
from ...plugins.hookspecs import hookimpl
from ...plugins.terminal import MEASURING
from ...retrieval.cli.options import refusals

bench = typer.Typer(help="Compare plugins with baselines.")
ARMS = (
    "bm25s,faiss_flat,maxsim,xtr@exact,xtr@nprobe=8,xtr,xtr@nprobe=32,bm25,dense,"
    "vdr,vdr@query_encoding=bag_of_words,vdr@document_encoding=bag_of_words,vdr@document_encoding=bag_of_words@rerank=100,hybrid"
)


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the commands."""
    extend_group(cli, "bench", bench, MEASURING)
    cli.command("report", rich_help_panel=MEASURING)(report)


def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Result files, or folders of them [default: benchmarks/results].")
    ] = None,
    out: Annotated[Path, typer.Option(help="Path of the HTML page.")] = Path("report.html"),
) -> None:
    """Write an HTML page from benchmark results. It shows gains, costs, losses, and how to reproduce them."""
    from ...plugins.manager import plugins
    from . import record
    from . import report as page

    record.check_output_path(out)
    records = page.read_results(results or [Path("benchmarks/results")])
    with refusals():
        page.write_report(
            records, [name for kind in ("drafter", "kv", "pruner", "index") for name in plugins().classes(kind)], out
        )
    typer.echo(f"written to {out}")


@bench.command("retrieval")
def bench_retrieval(
    data: Annotated[list[Path], typer.Option("--data", help="BEIR folder; can be repeated.")],
    arms: Annotated[
        str,
        typer.Option(help="Indexes, comma-separated: KIND[@name=value...], bm25s, faiss_flat, maxsim, sparse_encoder."),
    ] = ARMS,
    queries: Annotated[int, typer.Option(min=1, help="Maximum number of queries per collection.")] = 10_000,
    union: Annotated[bool, typer.Option(help="Also search all collections in one index.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads per search.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved searches per query; the median is reported.")] = 3,
    encoder: Annotated[str | None, typer.Option(help="Multi-vector encoder.")] = None,
    peers: Annotated[
        Path | None,
        typer.Option(exists=True, help="Python interpreter with the packages of the arms fast_plaid and xtr_warp."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Path of the JSON results.")] = Path("benchmarks/results/retrieval.json"),
) -> None:
    """Compare indexes on collections with qrels. Measures quality, search time, build time and memory."""
    from . import retrieval

    with refusals():
        retrieval.run_retrieval_benchmark(
            retrieval.RetrievalBenchmark(
                tuple(data), tuple(arms.split(",")), queries, union, threads, repeats, encoder, out, peers
            )
        )
