"""Parts of the KV policy benchmark: measurements of speed, quality and retrieval on a running engine."""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from ....plugins.config import ConfigError
from ...bench import record
from ...bench.record import Record
from . import corpora, needle_in_haystack
from .needle_in_haystack import NeedleQuestion, NeedleResult

STOCK = "none"


LEAST = "least_attention"  # steps whose layers read 64 tokens: no policy can be faster


TURNS = 15


STEPS = 4  # decode steps timed in every turn: few, since the speed of a machine changes with time


TEXTS = 4  # texts decoded together when distributions are compared


ROOM = 96  # positions after a context, for decoded tokens


@dataclass(frozen=True)
class KVBenchmark:
    """Settings of the benchmark; see `pilotfish bench kv --help`."""

    policy: str
    settings: tuple[str, ...]  # "key=value,..." for each arm
    texts: tuple[Path, ...]  # (): the sample that ships with Python
    model: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    quality_contexts: tuple[int, ...]
    quality_tokens: int
    dtype: str
    out: Path
    haystack: Path | None = None
    needle_contexts: tuple[int, ...] = ()
    needles: int = needle_in_haystack.ROUNDS  # needles at each depth
    kv_retrieval: Path | None = None
    questions: int = 40
    seed: int = 0
    requests: int = 20  # of the load that policies which free blocks are measured with; 0 for no load
    eager: bool = False  # False: the model is compiled, which is vLLM's default

    @property
    def longest(self) -> int:
        """Length of the longest context, including the tokens decoded after it for comparison."""
        compared = (c + self.quality_tokens for c in self.quality_contexts)
        return max([*self.contexts, *self.needle_contexts, *compared], default=0)


@dataclass(frozen=True)
class KVArm:
    """One configuration of a policy.

    Attributes:
        label: Name in the records.
        options: Options of the policy; None for stock attention.
        policy: Name of the policy; empty for stock attention.
    """

    label: str
    options: dict[str, Any] | None
    policy: str = ""

    @property
    def setting(self) -> dict[str, Any]:
        """The worker's command that switches the engine to this configuration."""
        return {"do": "policy", "options": self.options, "name": self.policy}


def _named(paths: tuple[Path, ...]) -> dict[str, Path]:
    """Return texts by the name of their folder; a further text of the same folder is named ``folder/stem``."""
    named: dict[str, Path] = {}
    for path in (p.absolute() for p in paths):
        name = path.name if path.is_dir() else path.parent.name
        if named.setdefault(name, path) != path:
            named[f"{name}/{path.stem}"] = path
    return named


def run_parts(
    parts: list[tuple[str, Callable[[], list[Record]]]], out: Path, model: str, bar: Progress, task: TaskID
) -> list[Record]:
    """Run the described parts of a benchmark with a model, and write the JSON after every part."""
    records: list[Record] = []
    for description, part in parts:
        bar.update(task, description=description)
        records += part()
        record.write_records(out, records, model=model)
        bar.advance(task)
    return records


@dataclass(frozen=True)
class KVWork:
    """Parts of a benchmark; excerpts are cut, and texts that are too short refused, before an engine starts."""

    plan: KVBenchmark
    arms: list[KVArm]
    folder: str  # folder of the model
    tokenizer: Any
    texts: dict[str, str]
    haystack: str

    def parts(self) -> Iterator[tuple[str, Callable[[Any], list[Record]]]]:
        """Yield the description of each part, and the function that runs it on an engine."""
        plan, arms = self.plan, self.arms
        first = next(iter(self.texts))
        for context in plan.contexts:
            for batch in plan.batches:
                prompts = self.cut(first, batch, context)
                yield f"context {context}, batch {batch}", partial(measure_kv_step_times, arms=arms, prompts=prompts)
        for name in self.texts:
            for context in plan.quality_contexts:
                cut = self.cut(name, TEXTS, context + plan.quality_tokens)
                yield (
                    f"quality on {name}, {context}",
                    partial(measure_divergence, arms=arms, dataset=name, cut=cut, context=context),
                )
        for context in plan.needle_contexts:
            groups = list(
                needle_in_haystack.needle_questions(self.tokenizer, self.haystack, context, plan.seed, plan.needles)
            )
            search = partial(measure_answers, arms=arms, dataset=self.haystack_name, metric="needle_recall")
            yield f"needles in {context}", partial(search, groups=groups, context=context)
        if plan.kv_retrieval is not None:
            context = plan.longest
            asked = needle_in_haystack.dictionary_questions(self.tokenizer, plan.kv_retrieval, plan.questions, context)
            groups = [asked[i : i + needle_in_haystack.ROUNDS] for i in range(0, len(asked), needle_in_haystack.ROUNDS)]
            yield (
                "keys in dictionaries",
                partial(
                    measure_answers,
                    arms=arms,
                    dataset=self.dictionaries_name,
                    metric="exact_match",
                    groups=groups,
                    context=context,
                ),
            )

    @property
    def haystack_name(self) -> str:
        """Name of the text that hides the needles."""
        return "sample" if self.plan.haystack is None else self.plan.haystack.absolute().name

    @property
    def dictionaries_name(self) -> str:
        """Name of the folder that holds the dictionaries."""
        return "" if self.plan.kv_retrieval is None else self.plan.kv_retrieval.absolute().parent.name

    def cut(self, name: str, count: int, length: int) -> list[list[int]]:
        """Return token ids of excerpts of a text, [count][length]."""
        return corpora.excerpts(self.tokenizer, self.texts[name], count, length, f"text {name}")


def measure_kv_step_times(engine: Any, arms: list[KVArm], prompts: list[list[int]]) -> list[Record]:
    """Time decode steps of all prompts together; the order of the configurations changes from turn to turn.

    The ``bound_share`` of a configuration is the time that it saves, as a fraction of what is saved by a step with next
    to no attention (medians; its runs compare the time saved in each turn with the latter median).
    """
    batch, context = len(prompts), len(prompts[0])
    engine.ask(do="policy", options=None)
    engine.ask(do="steps", prompts=prompts, count=1)  # prefill
    commands = [(arm.label, arm.setting) for arm in arms] + [(LEAST, {"do": "least_attention"})]
    seconds: dict[str, list[float]] = {label: [] for label, _ in commands}
    for turn in range(TURNS):
        for label, command in commands[turn % len(commands) :] + commands[: turn % len(commands)]:
            engine.ask(**command)
            answer = engine.ask(do="steps", prompts=prompts, count=STEPS)
            seconds[label].append(statistics.median(answer["seconds"]))
    params = {"batch": batch, "context": context}
    records = []
    for label, of_arm in seconds.items():
        common = ("kv", f"context_{context}", label)
        milliseconds = [round(1e3 * s, 3) for s in of_arm]
        records.append(Record(*common, "step_ms", statistics.median(milliseconds), "ms", milliseconds, params))
        if label == STOCK:
            continue
        ratios = [round(a / b, 4) for a, b in zip(seconds[STOCK], of_arm, strict=True)]
        records.append(Record(*common, "step_speedup", statistics.median(ratios), "x", ratios, params))
        stock, own, least = (statistics.median(seconds[x]) for x in (STOCK, label, LEAST))
        if label != LEAST and stock > least:
            shares = [round((a - b) / (stock - least), 4) for a, b in zip(seconds[STOCK], of_arm, strict=True)]
            share = round((stock - own) / (stock - least), 4)
            records.append(Record(*common, "bound_share", share, "", shares, params))
    return records


def measure_divergence(
    engine: Any, arms: list[KVArm], dataset: str, cut: list[list[int]], context: int
) -> list[Record]:
    """Measure divergence from full attention, token by token; each configuration reads the KV entries it wrote."""
    prompts, texts = [ids[:context] for ids in cut], [ids[context:] for ids in cut]
    params = {"context": context, "tokens": sum(map(len, texts))}
    records: list[Record] = []
    reference = None
    for arm in arms:
        engine.ask(**arm.setting)
        answer = engine.ask(do="forced", prompts=prompts, texts=texts, keep=arm.options is None)
        records += divergence_records(("kv", dataset, arm.label), answer, params, reference)
        if arm.options is None:
            reference = statistics.fmean(statistics.fmean(x) for x in answer["nll"])
    return records


def divergence_records(
    common: tuple[str, str, str], answer: dict[str, Any], params: dict[str, Any], reference: float | None = None
) -> list[Record]:
    """Return the records of a ``forced`` answer; with the NLL of a ``reference``, the difference instead of the NLL."""
    nll = [statistics.fmean(x) for x in answer["nll"]]
    mean = statistics.fmean(nll)
    records = [Record(*common, "perplexity", round(math.exp(mean), 4), "", [], params)]
    if reference is None:
        records.insert(0, Record(*common, "nll", round(mean, 5), "nats", [round(x, 5) for x in nll], params))
    else:
        records.insert(0, Record(*common, "nll_delta", round(mean - reference, 5), "nats", [], params))
    if answer.get("kl"):
        kl = [statistics.fmean(x) for x in answer["kl"]]
        same = statistics.fmean(x for row in answer["same"] for x in row)
        records += [
            Record(*common, "kl", round(statistics.fmean(kl), 5), "nats", [round(x, 5) for x in kl], params),
            Record(*common, "same_top", round(same, 4), "", [], params),
        ]
    return records


def measure_answers(
    engine: Any, arms: list[KVArm], dataset: str, metric: str, groups: list[list[NeedleQuestion]], context: int
) -> list[Record]:
    """Answer questions under every configuration, group by group, so that a group's contexts are prefilled once."""
    results: dict[str, list[tuple[NeedleQuestion, NeedleResult]]] = {arm.label: [] for arm in arms}
    for group in groups:
        for arm in arms:
            engine.ask(**arm.setting)
            results[arm.label] += zip(group, needle_in_haystack.answer_questions(engine, group), strict=True)
    return [
        r
        for arm in arms
        for r in needle_in_haystack.needle_records(dataset, metric, arm.label, results[arm.label], context)
    ]


def max_positions(folder: str) -> int | None:
    """Return the number of positions of a model, or None if its configuration has no such number.

    Raises:
        ConfigError: The configuration cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {folder}: its configuration cannot be used ({corpora.first_line(error)})") from None
    return getattr(config.get_text_config(), "max_position_embeddings", None)
