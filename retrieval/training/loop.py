"""The training loop of `pilotfish train`: transformers' Trainer over batches of pairs.

sentence-transformers' trainers subclass the same Trainer, but train models in their own module format, which VDR's
published checkpoints do not have. So the losses, the tasks and the batches without duplicates are code of this package,
and the optimiser, the learning rate schedule, checkpoints and resuming are transformers'.
"""

import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from pilotfish._internal.atomic_write import write_text

from ..errors import RetrievalError
from .pairs import Pair, digest, pair_batches
from .tasks import Task

OPTIONS, CURVE = "options.json", "curve.png"
HELD_OUT = 64  # pairs of the validation loss
OnStep = Callable[[int, float], None]  # step, loss


@dataclass(frozen=True)
class TrainingPlan:
    """Options of a training.

    Attributes:
        steps: Number of optimiser steps.
        batch: Pairs per step.
        rate: Peak learning rate; it rises linearly over the first tenth of the steps and falls linearly to 0.
        seed: Seed of the order of pairs and of dropout.
        every: Steps between checkpoints, and between validations.
    """

    steps: int
    batch: int
    rate: float
    seed: int = 0
    every: int = 50


def train(task: Task, pairs: Sequence[Pair], plan: TrainingPlan, out: Path, resume: bool, on_step: OnStep) -> None:
    """Train, and write the encoder to ``out``; checkpoints and the loss curve go to ``out/training``.

    Raises:
        RetrievalError: There are too few pairs, ``out`` is occupied, or a checkpoint cannot be resumed.
    """
    place = out / "training"
    held_out = list({p.document: p for p in pairs[: 4 * HELD_OUT]}.values())[:HELD_OUT]
    held_documents = {p.document for p in held_out}
    training = [p for p in pairs if p.document not in held_documents]
    if len(held_out) < 2 or len(training) < plan.batch:
        raise RetrievalError(f"{len(pairs)} pairs are too few: {HELD_OUT} are held out, and a batch is {plan.batch}")
    checkpoint = get_last_checkpoint(str(place)) if place.is_dir() else None
    if checkpoint is not None and not resume:
        raise RetrievalError(f"{place} has a checkpoint; continue it with --resume, or remove the folder")
    if out.exists() and checkpoint is None and any(p != place for p in out.iterdir()):
        raise RetrievalError(f"{out} is not empty; choose a new folder for the encoder")
    options = {**asdict(plan), **task.about, "pairs": digest(pairs)}
    if checkpoint is not None:
        _check_options(place, options)
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / OPTIONS, json.dumps(options, indent=1, default=str))
    trainer = PairTrainer(task, training, held_out, plan, place, on_step)
    if checkpoint is None:
        trainer.evaluate()
        trainer.train()
    else:
        try:
            trainer.resume(checkpoint)
        except RetrievalError:
            raise
        except (RuntimeError, ValueError, OSError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise RetrievalError(f"{checkpoint}: cannot be read ({type(error).__name__}); remove {place}") from None
    draw_curve(trainer.state.log_history, place / CURVE)
    _publish(task, out)


class PairTrainer(Trainer):
    """transformers' Trainer for a `Task`: a batch is a list of pairs, and the task computes its loss.

    Args:
        task: Model and loss.
        training: Training pairs.
        held_out: Validation pairs.
        plan: Options of the training.
        folder: Folder of the checkpoints.
        on_step: Called after every step with the number of the step and its loss.
    """

    def __init__(
        self,
        task: Task,
        training: Sequence[Pair],
        held_out: Sequence[Pair],
        plan: TrainingPlan,
        folder: Path,
        on_step: OnStep,
    ) -> None:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=plan.steps,
            learning_rate=plan.rate,
            warmup_steps=max(plan.steps // 10, 1),
            weight_decay=0.01,
            seed=plan.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,  # `_StepCallback` stops a training that diverges
            eval_strategy="steps",
            eval_steps=plan.every,
            save_steps=plan.every,
            save_total_limit=1,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to=[],
        )
        super().__init__(
            task.model,
            arguments,
            eval_dataset=list(held_out),
            callbacks=[_StepCallback(on_step)],  # type: ignore[arg-type]
        )
        self.remove_callback(PrinterCallback)  # prints every log entry to standard output
        self._task = task
        self._batches = _Batches(training, plan.batch, plan.seed)
        self._held_out = held_out
        self._batch = plan.batch

    def resume(self, checkpoint: str) -> None:
        """Train from a checkpoint on; that of the last step is only loaded, since `train` would do one more step."""
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        if state.global_step < self.args.max_steps:
            self.train(resume_from_checkpoint=checkpoint)
        else:
            self.state = state
            self._load_from_checkpoint(checkpoint)

    def get_train_dataloader(self) -> Any:
        """Return the endless batches of pairs; a resumed training skips those of earlier steps."""
        loader: Any = torch.utils.data.DataLoader(self._batches, batch_size=None)
        return loader

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the task's loss of a batch of pairs."""
        del model, args, kwargs
        return self._task.loss(inputs["pairs"])[0]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute loss and accuracy over the held-out pairs, in batches of the training's size."""
        del args, kwargs
        size = min(self._batch, len(self._held_out))
        self._task.model.eval()
        with torch.no_grad():
            begins = range(0, len(self._held_out) - size + 1, size)
            results = [self._task.loss(self._held_out[b : b + size]) for b in begins]
        self._task.model.train()
        metrics = {
            "eval_loss": sum(float(loss) for loss, _ in results) / len(results),
            "eval_accuracy": sum(accuracy for _, accuracy in results) / len(results),
        }
        self.log(metrics)
        return metrics


class _Batches(torch.utils.data.IterableDataset):
    """Batches of pairs without end, as inputs of a Trainer."""

    def __init__(self, pairs: Sequence[Pair], size: int, seed: int) -> None:
        self._pairs, self._size, self._seed = pairs, size, seed

    def __iter__(self) -> Iterator[dict[str, list[Pair]]]:
        for batch in pair_batches(self._pairs, self._size, self._seed):
            yield {"pairs": batch}


class _StepCallback(TrainerCallback):
    """Reports the loss of every step, and stops a training that diverges."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report a step; called by the Trainer.

        Raises:
            RetrievalError: The loss or the norm of the gradients is NaN or infinite.
        """
        del args, control, kwargs
        logs = logs or {}
        for name in ("loss", "grad_norm", "eval_loss"):
            value = float(logs.get(name, 0.0))
            if not math.isfinite(value):
                raise RetrievalError(f"step {state.global_step}: {name} is {value}; lower --rate")
        if "loss" in logs:
            self._on_step(state.global_step, float(logs["loss"]))


def _check_options(place: Path, options: Mapping[str, Any]) -> None:
    """Refuse to resume a training that was begun with other options or pairs.

    Raises:
        RetrievalError: An option differs, or the options cannot be read.
    """
    try:
        begun = json.loads((place / OPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RetrievalError(f"{place / OPTIONS}: cannot be read; remove {place} to start again") from None
    now = json.loads(json.dumps(options, default=str))
    different = next((name for name in now if begun.get(name) != now[name]), None)
    if different is not None:
        raise RetrievalError(f"{place}: was begun with {different} {begun.get(different)}, not {now[different]}")


def draw_curve(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss of batches and the validation loss and accuracy by step.

    Args:
        history: ``log_history`` of a Trainer.
        path: Path of the PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="tight")
    above, below = figure.subplots(2, 1, sharex=True)
    for axis, name, label in ((above, "loss", "training"), (above, "eval_loss", "held out")):
        entries = [e for e in history if name in e]
        axis.plot([e["step"] for e in entries], [e[name] for e in entries], label=label)
    entries = [e for e in history if "eval_accuracy" in e]
    below.plot([e["step"] for e in entries], [e["eval_accuracy"] for e in entries], "o-", ms=3, label="held out")
    above.set_ylabel("loss")
    below.set_ylabel("correct document first")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _publish(task: Task, out: Path) -> None:
    """Write the encoder to a temporary folder, then move its files into place, the weights last."""
    partial = out / ".checkpoint"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    task.model.eval()
    task.save(partial)
    for weights in partial.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors allows the owner only
    for path in sorted(partial.iterdir(), key=lambda p: p.suffix == ".safetensors"):
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    partial.rmdir()
