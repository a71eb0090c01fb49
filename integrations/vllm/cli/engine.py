"""Commands for vLLM: `serve`, `doctor`, `models`, `bench drafters`, `bench kernels`, `bench kv` and `tune`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from ....plugins.cli import at_most_one, extend_group
from ....plugins.hookspecs import hookimpl
from ....plugins.terminal import MEASURING, SERVING, TUNING

DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")  # as in vLLM
DATA = ("wikitext2", "gutenberg", "pg_essays", "kv_retrieval")
KV_SETTINGS = {  # measured in addition to a policy's defaults
    "tidal_decode": ("budget=256", "budget=1024", "profile=fast", "correction_interval=32"),
    "razor_attention": ("prefill=streaming", "compensation=false"),
    "quest": ("budget=256", "budget=1024", "tidal_decode"),
    "streaming_llm": ("budget=2048",),
}

bench = typer.Typer(help="Compare plugins with stock vLLM.", no_args_is_help=True)
tune = typer.Typer(help="Find the settings of a plugin for a model.", no_args_is_help=True)


def _dtype(value: str) -> str:
    if value not in DTYPES:
        raise typer.BadParameter(f"expected one of {', '.join(DTYPES)}, got '{value}'")
    return value


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the commands."""
    passes_on = {"allow_extra_args": True, "ignore_unknown_options": True}
    cli.command("serve", context_settings=passes_on, rich_help_panel=SERVING)(serve)
    cli.command("doctor", context_settings=passes_on, rich_help_panel=SERVING)(doctor)
    cli.command("models", rich_help_panel=TUNING)(models)
    extend_group(cli, "bench", bench, MEASURING)
    cli.add_typer(tune, name="tune", rich_help_panel=TUNING)


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder, Hugging Face Hub name, or name of an embedded model.")],
    drafter: Annotated[list[str] | None, typer.Option(help="Drafter to use: NAME[,key=value...].")] = None,
    kv: Annotated[list[str] | None, typer.Option(help="KV policy to use: NAME[,key=value...].")] = None,
    pruner: Annotated[list[str] | None, typer.Option(help="Visual pruner to use: NAME[,key=value...].")] = None,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(min=1, max=127, help="Maximum draft tokens per step [default: set by the drafter].")
    ] = None,
    allow_untested_vllm: Annotated[bool, typer.Option(help="Allow an untested vLLM version.")] = False,
    print_only: Annotated[bool, typer.Option("--print", help="Print the command instead of running it.")] = False,
) -> None:
    """Serve MODEL with plugins by `vllm serve`. Other arguments are passed to vLLM."""
    from ..serving import command, start_check

    plan = command.compose_serve_command(
        model,
        {kind: at_most_one(f"--{kind}", v) for kind, v in (("drafter", drafter), ("kv", kv), ("pruner", pruner))},
        list(context.args),
        num_speculative_tokens=num_speculative_tokens,
        allow_untested_vllm=allow_untested_vllm,
    )
    if print_only:
        start_check.check_before_print(plan)
        typer.echo(plan.quoted())
        return
    command.run_vllm_serve(plan)


def doctor(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Model folder or name of an embedded model that plugins have to support.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for bug reports.")] = False,
) -> None:
    """Check versions, vLLM APIs and plugins on this machine. Exit with code 1 if there is a problem.

    With MODEL, also check for each plugin whether an engine with this model would start; other arguments are those of
    vLLM.
    """
    from ..serving import command
    from ..serving.doctor import examine, print_report

    if model is not None:
        command.check_local_model(model)
    report = examine(model, list(context.args))
    if as_json:
        typer.echo(report.to_json())
    else:
        print_report(report)
    raise typer.Exit(1 if report.findings else 0)


def models(
    name: Annotated[str | None, typer.Argument(help="Name of an embedded model [default: the first].")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Also verify the checksum of the cached weights.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="List the embedded models.")] = False,
) -> None:
    """Fetch an embedded model and print its folder."""
    from ....plugins.config import ConfigError, unknown_key_message
    from ..models import registry as store
    from ..serving.progress import fetch_with_bar

    if list_only:
        if name is not None or verify:
            raise ConfigError("models --list: takes nothing else")
        for model in store.EMBEDDED.values():
            state = "fetched" if model.fetched else "not fetched"
            typer.echo(f"{model.name}\t{state}\t{model.folder}")
        return
    name = name or next(iter(store.EMBEDDED))
    if name not in store.EMBEDDED:
        raise ConfigError(unknown_key_message(f"model '{name}'", name, store.EMBEDDED))
    folder = fetch_with_bar(store.EMBEDDED[name])
    if verify and not store.EMBEDDED[name].verify():
        raise ConfigError(f"{folder}: the weights are damaged (checksum); delete the folder and fetch again")
    typer.echo(folder)


@bench.command("drafters")
def bench_drafters(
    prompts: Annotated[list[Path], typer.Option(help="File of prompts: .jsonl, .jsonl.gz or .json; can be repeated.")],
    model: Annotated[str, typer.Option(help="Model to serve.")] = "smollm2-135m-instruct",
    arms: Annotated[
        str, typer.Option(help="Drafters to compare with no speculation: NAME[@option=value...], comma-separated.")
    ] = "ngram,suffix,token_recycling",
    sample: Annotated[int, typer.Option(min=1, help="Prompts sampled from the first file, over all categories.")] = 48,
    sample_others: Annotated[int, typer.Option(min=1, help="Prompts sampled from each further file.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="Maximum number of tokens to generate per prompt.")] = 128,
    batch: Annotated[int, typer.Option(min=0, help="Also measure at this batch size; 0 to skip.")] = 8,
    dtype: Annotated[
        str, typer.Option(callback=_dtype, help="Data type; float32 makes outputs comparable token by token.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Random seed of the sample.")] = 0,
    warm: Annotated[bool, typer.Option(help="Also measure with a cache that is warm from other prompts.")] = True,
    twice: Annotated[bool, typer.Option(help="Run all prompts a second time, from a cold cache only.")] = False,
    compiled: Annotated[bool, typer.Option(help="Compile the model, as vLLM does by default.")] = False,
    out: Annotated[Path, typer.Option(help="Path of the JSON results.")] = Path("benchmarks/results/drafters.json"),
) -> None:
    """Compare drafters with no speculation, in interleaved runs."""
    from ....plugins.config import ConfigError
    from ..bench import drafters

    if not arms.strip(", "):
        raise ConfigError("--arms: no arm named")
    drafters.run_drafter_benchmark(
        drafters.DrafterBenchmark(
            prompts=tuple(prompts),
            model=model,
            arms=tuple(a.strip() for a in arms.split(",") if a.strip()),
            sample=sample,
            sample_others=sample_others,
            max_tokens=max_tokens,
            batch=batch,
            dtype=dtype,
            seed=seed,
            out=out,
            warm=warm,
            twice=twice,
            compiled=compiled,
        )
    )


@bench.command("kernels")
def bench_kernels(
    arms: Annotated[
        str, typer.Option(help="Drafters with kernels: NAME[@option=value...], comma-separated.")
    ] = "token_recycling,rasd",
    device: Annotated[str, typer.Option(help="cuda; or cpu, where the kernels are interpreted.")] = "cuda",
    batches: Annotated[str, typer.Option(help="Numbers of requests in a step.")] = "1,8,64,256",
    context: Annotated[int, typer.Option(min=256, help="Length of the texts, in tokens.")] = 4096,
    vocab_size: Annotated[int, typer.Option(min=256, help="Size of the vocabulary.")] = 128_256,
    num_speculative_tokens: Annotated[int, typer.Option(min=1, max=63, help="Draft tokens of a request.")] = 12,
    trees: Annotated[bool, typer.Option("--trees", help="Draft trees instead of chains.")] = False,
    out: Annotated[Path, typer.Option(help="Path of the JSON results.")] = Path("benchmarks/results/kernels.json"),
) -> None:
    """Measure the GPU kernels of drafters, without a model."""
    from ....plugins.config import ConfigError
    from ..bench import kernels

    if device not in ("cuda", "cpu"):
        raise ConfigError(f"--device: expected cuda or cpu, got '{device}'")
    names = tuple(a.strip() for a in arms.split(",") if a.strip())
    if not names:
        raise ConfigError("--arms: no arm named")
    sizes = _numbers(batches, "--batches")
    kernels.run_kernel_benchmark(
        kernels.KernelBenchmark(names, device, sizes, context, vocab_size, num_speculative_tokens, trees, out)
    )


@bench.command("kv")
def bench_kv(
    policy: Annotated[str, typer.Option(help="KV policy to measure.")] = "tidal_decode",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="One arm, repeatable: key=value[,...], '' for the defaults, or NAME[,key=value...] of another policy."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with wikitext2, gutenberg, pg_essays and kv_retrieval; use all of them.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Long text, or folder of .txt files; can be repeated [default: Python's reference pages]."),
    ] = None,
    haystack: Annotated[
        Path | None, typer.Option(help="Text in which needles are hidden [default: the first text].")
    ] = None,
    kv_retrieval: Annotated[Path | None, typer.Option(help="File of dictionaries for key-value retrieval.")] = None,
    model: Annotated[str, typer.Option(help="Model to serve.")] = "smollm2-135m-instruct",
    contexts: Annotated[
        str, typer.Option(help="Context lengths at which steps are timed, in tokens; '' to skip.")
    ] = "400,1000,2000,4000,8000",
    batches: Annotated[str, typer.Option(help="Numbers of requests decoded together.")] = "1,4",
    quality_contexts: Annotated[
        str, typer.Option(help="Context lengths at which distributions are compared; '' to skip.")
    ] = "4000,7900",
    quality_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after each of these contexts.")] = 64,
    needle_contexts: Annotated[
        str, typer.Option(help="Context lengths of the needle test; '' to skip.")
    ] = "1000,2000,4000,7900",
    needles: Annotated[int, typer.Option(min=1, max=10, help="Needles at each of ten depths.")] = 5,
    questions: Annotated[int, typer.Option(min=1, help="Number of dictionaries to query.")] = 40,
    requests: Annotated[
        int, typer.Option(min=0, help="Requests sent at once to policies that free blocks; 0 to skip this load.")
    ] = 20,
    dtype: Annotated[str, typer.Option(callback=_dtype, help="Data type of the model, as in vLLM.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Random seed of the needles.")] = 0,
    eager: Annotated[bool, typer.Option(help="Do not compile the model: faster start, slower steps.")] = False,
    out: Annotated[Path, typer.Option(help="Path of the JSON results.")] = Path("benchmarks/results/kv.json"),
) -> None:
    """Compare settings of a KV policy with stock attention. Measures step times, divergence and needle recall."""
    from ....plugins.config import ConfigError
    from ..bench import kv, kv_work

    if data is not None:
        if missing := [name for name in DATA if not (data / name).exists()]:
            raise ConfigError(f"--data {data}: {missing[0]} is missing")
        text = [*(text or ()), data / "wikitext2", data / "gutenberg"]
        haystack = haystack or data / "pg_essays"
        kv_retrieval = kv_retrieval or data / "kv_retrieval" / "kv-retrieval-75_keys.jsonl.gz"
    kv.run_kv_benchmark(
        kv_work.KVBenchmark(
            policy=policy,
            settings=tuple(("", *KV_SETTINGS.get(policy, ())) if setting is None else setting),
            texts=tuple(text or ()),
            model=model,
            contexts=_numbers(contexts, "--contexts", none=True),
            batches=_numbers(batches, "--batches"),
            quality_contexts=_numbers(quality_contexts, "--quality-contexts", none=True),
            quality_tokens=quality_tokens,
            haystack=haystack,
            needle_contexts=_numbers(needle_contexts, "--needle-contexts", none=True),
            needles=needles,
            kv_retrieval=kv_retrieval,
            questions=questions,
            requests=requests,
            dtype=dtype,
            seed=seed,
            eager=eager,
            out=out,
        )
    )


def _finite(value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise typer.BadParameter(f"expected a number from 0, got {value}")
    return value


def _numbers(text: str, flag: str, none: bool = False) -> tuple[int, ...]:
    from ....plugins.config import ConfigError

    if none and not text:
        return ()
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag}: expected whole numbers separated by commas, got '{text}'") from None
    if min(numbers) < 1:
        raise ConfigError(f"{flag}: expected numbers from 1, got '{text}'")
    return numbers


@tune.command("tidal")
def tune_tidal(
    model: Annotated[str, typer.Argument(help="Model folder, Hugging Face Hub name, or name of an embedded model.")],
    text: Annotated[Path | None, typer.Option(help="Long text to read [default: Python's reference pages].")] = None,
    budget: Annotated[int, typer.Option(help="Tokens that sparse layers read.")] = 512,
    context: Annotated[
        int | None, typer.Option(min=64, help="Tokens of each context [default: the model's maximum, at most 8000].")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after each of four contexts.")] = 48,
    max_layers: Annotated[int, typer.Option(min=1, help="Maximum number of full-attention layers.")] = 6,
    default_kl: Annotated[
        float, typer.Option(callback=_finite, help="Maximum divergence of the setting `default`, in nats.")
    ] = 0.1,
    fast_kl: Annotated[
        float, typer.Option(callback=_finite, help="Maximum divergence of the setting `fast`, in nats.")
    ] = 0.15,
    needle_loss: Annotated[
        float, typer.Option(callback=_finite, help="Maximum loss of needle recall against full attention.")
    ] = 0.02,
    dtype: Annotated[str, typer.Option(callback=_dtype, help="Data type of the model, as in vLLM.")] = "bfloat16",
    out: Annotated[Path, typer.Option(help="Path of the profile.")] = Path("tidal_decode.json"),
) -> None:
    """Find the layers of MODEL that select tokens for TidalDecode. Writes a profile."""
    from ..tuning import tidal

    tidal.find_selection_layers(
        tidal.TidalTuning(
            model, text, budget, context or 0, tokens, max_layers, default_kl, fast_kl, needle_loss, dtype, out
        )
    )


@tune.command("razor")
def tune_razor(
    model: Annotated[str, typer.Argument(help="Model folder, Hugging Face Hub name, or name of an embedded model.")],
    sequences: Annotated[int, typer.Option(min=1, help="Number of random sequences to read.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=256, help="Maximum number of tokens of a sequence.")] = 10_001,
    dtype: Annotated[str, typer.Option(callback=_dtype, help="Data type of the model, as in vLLM.")] = "bfloat16",
    out: Annotated[Path, typer.Option(help="Path of the profile.")] = Path("razor_attention.json"),
    plot: Annotated[Path | None, typer.Option(help="PNG file to write a heat map of the heads to.")] = None,
) -> None:
    """Find the retrieval heads of MODEL for RazorAttention. Writes a profile."""
    from ..tuning import razor

    razor.find_retrieval_heads(razor.RazorTuning(model, sequences, max_tokens, dtype, out, plot))
