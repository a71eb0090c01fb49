"""Steps of training that can be interrupted anywhere, and a curve of how they went."""

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import RetrievalError
from . import pairs as data
from .pairs import Pair
from .tasks import Task

STATE, LOG, CURVE = "state.pt", "log.jsonl", "curve.png"
HELD_OUT = 64  # pairs that are only measured
Told = Callable[[int, float], None]  # step, loss


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        steps: Of the optimiser.
        batch: Pairs of a step.
        rate: Greatest learning rate; it rises over the first tenth and falls to nothing.
        seed: Of the order of pairs.
        every: Steps between two states that training can go on from.
    """

    steps: int
    batch: int
    rate: float
    seed: int = 0
    every: int = 50


def run(task: Task, pairs: Sequence[Pair], plan: Plan, out: Path, resume: bool, told: Told) -> None:
    """Train, and write a checkpoint to ``out``; what training itself needs lies in ``out/training``.

    Raises:
        RetrievalError: pairs are too few, or there is a state already, or another one.
    """
    place = out / "training"
    held = [*{p.document: p for p in pairs[: 4 * HELD_OUT]}.values()][:HELD_OUT]
    apart = {p.document for p in held}
    taught = [p for p in pairs if p.document not in apart]
    if len(held) < 2 or len(taught) < plan.batch:
        raise RetrievalError(f"{len(pairs)} pairs are too few: {HELD_OUT} are held out, and a batch is {plan.batch}")
    if not resume and (place / STATE).exists():
        raise RetrievalError(f"{place} holds a state already; go on from it with --resume, or remove the folder")
    if out.exists() and not (place / STATE).exists() and any(p != place for p in out.iterdir()):
        raise RetrievalError(f"{out} is not empty; a checkpoint needs a folder of its own")
    optimiser = torch.optim.AdamW(task.model.parameters(), lr=plan.rate, weight_decay=0.01)
    about = {**asdict(plan), **task.about, "pairs": data.digest(pairs)}
    first = _restored(task, optimiser, about, place) if resume else 0
    place.mkdir(parents=True, exist_ok=True)
    _cut_log(place / LOG, first)
    task.model.train()
    batches = itertools.islice(data.pair_batches(taught, plan.batch, plan.seed), first, None)
    if first == 0:
        _note(place, 0, {"held_out": _measured(task, held, plan.batch)})
    for step, batch in zip(range(first, plan.steps), batches, strict=False):
        torch.manual_seed(plan.seed * 1_000_003 + step)  # dropout, the same when it is done again
        for group in optimiser.param_groups:
            group["lr"] = plan.rate * _share(step, plan.steps)
        started = time.perf_counter()
        loss, right = task.loss(batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimiser.step()
        line: dict[str, Any] = {"loss": loss.item(), "right": right, "seconds": time.perf_counter() - started}
        told(step + 1, loss.item())
        last = step + 1 == plan.steps
        if last or (step + 1) % plan.every == 0:
            line["held_out"] = _measured(task, held, plan.batch)
        _note(place, step + 1, line)
        if last or (step + 1) % plan.every == 0:
            _keep(task, optimiser, about, step + 1, place)
            curve(place)
    _publish(task, out)


def _share(step: int, steps: int) -> float:
    """Of the greatest learning rate."""
    rise = max(steps // 10, 1)
    return min((step + 1) / rise, (steps - step) / max(steps - rise, 1))


def _measured(task: Task, held: Sequence[Pair], batch: int) -> dict[str, float]:
    """Loss and share of right answers on pairs that are not learned from."""
    size = min(batch, len(held))
    task.model.eval()
    losses, rights = [], []
    with torch.no_grad():
        for begin in range(0, len(held) - size + 1, size):
            loss, right = task.loss(held[begin : begin + size])
            losses.append(loss.item())
            rights.append(right)
    task.model.train()
    return {"loss": sum(losses) / max(len(losses), 1), "right": sum(rights) / max(len(rights), 1)}


# --------------------------------------------------------------------------------------------------------------- files


def _keep(task: Task, optimiser: torch.optim.Optimizer, about: dict[str, Any], step: int, place: Path) -> None:
    state = {"step": step, "about": about, "model": task.model.state_dict(), "optimiser": optimiser.state_dict()}
    partial = place / f".{STATE}"
    torch.save(state, partial)
    partial.replace(place / STATE)


def _restored(task: Task, optimiser: torch.optim.Optimizer, about: dict[str, Any], place: Path) -> int:
    """The step that a state stands at.

    Raises:
        RetrievalError: it was begun with other options or pairs, or cannot be read.
    """
    if not (place / STATE).exists():
        return 0
    try:
        state = torch.load(place / STATE, map_location="cpu", weights_only=True)
        other = next((name for name in about if state["about"].get(name) != about[name]), None)
        if other is not None:
            raise RetrievalError(f"{place}: was begun with {other} {state['about'].get(other)}, not {about[other]}")
        task.model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        return int(state["step"])
    except RetrievalError:
        raise
    except Exception:  # torch raises many kinds for a file that is none of its own
        raise RetrievalError(f"{place / STATE}: cannot be read; remove the folder to begin anew") from None


def _note(place: Path, step: int, line: dict[str, Any]) -> None:
    with (place / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **line}) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """What was noted of each step."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last one may be half
            found.append(json.loads(line))
    return found


def _cut_log(path: Path, step: int) -> None:
    """Forget what was noted behind the state that training goes on from."""
    kept = [line for line in read_log(path) if line["step"] <= step] if step else []
    path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def curve(place: Path) -> None:
    """Draw loss and right answers by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(place / LOG)
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5))
    for axis, name in ((above, "loss"), (below, "right")):
        steps = [x for x in lines if name in x]
        axis.plot([x["step"] for x in steps], [x[name] for x in steps], lw=0.8, alpha=0.6, label="batches")
        held = [x for x in lines if "held_out" in x]
        axis.plot([x["step"] for x in held], [x["held_out"][name] for x in held], "o-", ms=3, label="held out")
        axis.set_ylabel("loss" if name == "loss" else "right document first")
        axis.legend(frameon=False)
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(place / CURVE, dpi=110)
    pyplot.close(figure)


def _publish(task: Task, out: Path) -> None:
    """Write the checkpoint beside, then move its files into place, the weights last."""
    beside = out / ".checkpoint"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    task.model.eval()
    task.save(beside)
    for weights in beside.rglob("*.safetensors"):
        weights.chmod(0o644)  # which safetensors keeps to the owner
    for path in sorted(beside.iterdir(), key=lambda p: p.suffix == ".safetensors"):
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    beside.rmdir()
