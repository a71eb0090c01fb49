"""`pilotfish tune razor`: finds the retrieval heads of a model inside vLLM, without any text.

The model reads a block of random tokens four times, and every head is scored by its attention to the earlier copies
(`kvcache.retrieval_heads`). Queries and keys are captured where they enter vLLM's attention, so any model that vLLM
serves can be profiled: rotary embeddings, norms of queries and keys, and grouped heads are already applied.
"""

import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....kvcache import profiles, retrieval_heads
from ....kvcache.profiles import Profile
from ....plugins.config import ConfigError
from ....plugins.razor_attention import RazorAttention, RazorAttentionOptions
from ....plugins.terminal import make_table, print_plain
from ...bench import record
from ..bench.engine import EngineProcess
from ..bench.kv_work import max_positions
from ..models import registry
from ..serving.command import check_model
from ..serving.progress import console as status
from ..serving.progress import counting_bar
from .tidal import check_profile_path

WORKER = ("-m", "pilotfish.integrations.vllm.bench.heads_worker")


@dataclass(frozen=True)
class RazorTuning:
    """Settings of the search; see `pilotfish tune razor --help`."""

    model: str
    sequences: int
    max_tokens: int
    dtype: str
    out: Path
    plot: Path | None


def find_retrieval_heads(plan: RazorTuning) -> Profile:
    """Score the heads, print the retrieval heads, and write the profile and the heat map."""
    check_model(plan.model)
    check_profile_path(plan.out)
    if plan.plot is not None:
        if plan.plot.suffix != ".png" or not plan.plot.absolute().parent.is_dir():
            raise ConfigError(f"--plot {plan.plot}: not a .png file in a folder that exists")
        record.check_output_path(plan.plot, "--plot")
        if find_spec("matplotlib") is None:
            raise ConfigError("--plot: matplotlib is not installed; pip install matplotlib")
    folder = registry.resolve_model(plan.model)
    room = min(plan.max_tokens, max_positions(folder) or plan.max_tokens) - 1
    config = {
        "model": folder,
        "dtype": plan.dtype,
        "max_model_len": room + 1,
        "max_num_batched_tokens": room + 1,
        "max_num_seqs": 1,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    with tempfile.TemporaryDirectory() as logs, counting_bar() as bar:
        task = bar.add_task("starting the engine", total=plan.sequences)
        with EngineProcess(config, Path(logs) / "engine.log", worker=WORKER) as engine:
            facts, rows, period = engine.ask(do="facts"), [], 0
            for seed in range(plan.sequences):
                tokens, period = retrieval_heads.repeated_random_tokens(facts["vocab_size"], room, seed)
                bar.update(task, description=f"scoring heads, {retrieval_heads.COPIES} x {period} tokens")
                rows.append(
                    engine.ask(
                        on_progress=lambda done, seed=seed: bar.update(task, completed=seed + done),
                        do="scores",
                        tokens=tokens,
                        period=period,
                    )
                )
    echo, induction = (
        retrieval_heads.max_over_query_heads(np.mean([row[name] for row in rows], axis=0), rows[0]["kv_heads"])
        for name in ("echo", "induction")
    )
    profile = Profile(
        policy=RazorAttention.name,
        model=plan.model,
        fingerprint=facts["fingerprint"],
        settings={"default": {"echo": echo.round(5).tolist(), "induction": induction.round(5).tolist()}},
        evidence={
            "sequences": plan.sequences,
            "copies": retrieval_heads.COPIES,
            "block": period,
            "dtype": plan.dtype,
        },
    )
    profiles.write_profile(plan.out, profile)
    print_razor_profile(echo, induction)
    if plan.plot is not None:
        draw_head_map(plan.plot, plan.model, echo, induction)
        status.print(f"heat map written to {plan.plot}", markup=False)
    status.print(f"written to {plan.out}", markup=False)
    return profile


def selected_heads(echo: NDArray[np.floating], induction: NDArray[np.floating]) -> list[retrieval_heads.LayerHead]:
    """Return the retrieval heads at the default ``keep``, which are those that keep all tokens."""
    keep: Any = RazorAttentionOptions().keep
    return retrieval_heads.select_retrieval_heads(echo, induction, keep)


def print_razor_profile(echo: NDArray[np.floating], induction: NDArray[np.floating]) -> None:
    """Print the retrieval heads as a table."""
    headers = ("layer", "KV head", "induction", "echo")
    table = make_table(*headers, numbers=headers, title="Retrieval heads by default")
    for layer, head in selected_heads(echo, induction):
        table.add_row(str(layer), str(head), f"{induction[layer, head]:.3f}", f"{echo[layer, head]:.3f}")
    print_plain(table)


def draw_head_map(path: Path, model: str, echo: NDArray[np.floating], induction: NDArray[np.floating]) -> None:
    """Draw heat maps of layers x heads, in which the retrieval heads are marked."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(3 + 0.5 * echo.shape[1], 2 + 0.2 * len(echo)), layout="constrained")
    for axis, name, values in zip(axes, ("induction", "echo"), (induction, echo), strict=True):
        image = axis.imshow(values, aspect="auto", cmap="magma", vmin=0, vmax=1)
        for layer, head in selected_heads(echo, induction):
            axis.plot(head, layer, marker="o", color="cyan", markersize=4)
        axis.set(title=name, xlabel="KV head", xticks=range(echo.shape[1]), ylabel="layer")
        figure.colorbar(image, ax=axis)
    figure.suptitle(f"{model}: dots are retrieval heads")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
