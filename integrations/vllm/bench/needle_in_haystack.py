"""Questions whose answer stands once in a long context: what a KV policy must not lose.

The context is processed as a prompt, with full attention. Question and answer are then decoded under the policy, the
answer forced, so that an answer counts when every token of it was the most probable one: what greedy decoding writes.
The published needle test puts the question into the prompt, where no policy touches it; here it must be understood with
what the policy reads.
"""

import gzip
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....plugins.config import ConfigError
from ...bench.record import Record

CITIES = ("Paris", "London", "Tokyo", "Madrid", "Rome", "Berlin", "Vienna", "Cairo", "Lisbon", "Chicago")
DEPTHS = 10
ROUNDS = 5
SHORTEST = 64  # tokens of a context that hides a needle


@dataclass(frozen=True)
class NeedleQuestion:
    """Token ids of one question.

    Attributes:
        context: Processed as a prompt.
        text: The question, decoded after it.
        answer: What has to follow.
        depth: Where in the context the answer stands, 0 to 1.
        place: The positions of the context, from and to, that hold the answer.
    """

    context: list[int]
    text: list[int]
    answer: list[int]
    depth: float
    place: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class NeedleResult:
    """How a question was answered: all tokens right, and the share that was."""

    exact: bool
    share: float


def needle_questions(
    tokenizer: Any, haystack: str, length: int, seed: int, rounds: int = ROUNDS
) -> Iterator[list[NeedleQuestion]]:
    """The needle test: a magic number in a text of other things; a group for each of `DEPTHS` depths.

    Args:
        tokenizer: Of the model.
        haystack: A text of at least ``length`` tokens.
        length: Tokens of the context.
        seed: Decides numbers, and which part of the text is taken.
        rounds: Needles of a group, at most as many as there are `CITIES`.

    Raises:
        ConfigError: the haystack is too short.
    """
    if length < SHORTEST:
        raise ConfigError(f"a needle needs a context of {SHORTEST} tokens at least, got {length}")
    rng = random.Random(f"{seed} {length}")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    hay = encode(haystack)
    if len(hay) <= length:
        raise ConfigError(f"the haystack has {len(hay)} tokens, more than {length} are needed")
    # Every depth has the same straw, so that prefix caching processes it once up to the needle.
    straws = [(city, rng.randrange(len(hay) - length)) for city in rng.sample(CITIES, rounds)]
    for step in range(DEPTHS):
        depth = step / (DEPTHS - 1)
        group = []
        for city, offset in straws:
            number = str(rng.randrange(10**6, 10**7))
            needle = encode(f"\nThe special magic {city} number is: {number}.\n")
            straw = hay[offset : offset + length - len(needle)]
            at = round(depth * len(straw))
            asked = encode(f"\n\nWhat is the special magic {city} number? The special magic {city} number is: ")
            context = [*straw[:at], *needle, *straw[at:]]
            group.append(NeedleQuestion(context, asked, encode(number), depth, (at, at + len(needle))))
        yield group


def dictionary_questions(tokenizer: Any, path: Path, count: int, longest: int) -> list[NeedleQuestion]:
    """Questions of the key-value retrieval task of *Lost in the Middle* (arXiv 2307.03172), one dictionary each.

    Args:
        tokenizer: Of the model.
        path: ``.jsonl`` or ``.jsonl.gz``, lines with ``ordered_kv_records``, ``key`` and ``value``.
        count: Lines to take, at even distances.
        longest: Tokens that context, question and answer may have; dictionaries are shortened to fit, from both ends.

    Raises:
        ConfigError: the file cannot be read, or is none of these.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    try:
        content = path.read_bytes()
        lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8").splitlines()
        rows = [json.loads(lines[i * len(lines) // count]) for i in range(count)]
        tasks = [([(str(k), str(v)) for k, v in row["ordered_kv_records"]], row["key"], row["value"]) for row in rows]
        if any(not isinstance(value, str) or key not in dict(pairs) for pairs, key, value in tasks):
            raise ValueError("a key is not in its dictionary, or its value is no text")
    except OSError as error:
        raise ConfigError(f"--kv-retrieval {path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, EOFError) as error:
        raise ConfigError(f"--kv-retrieval {path}: not a file of dictionaries ({error})") from None
    questions = []
    for pairs, key, value in tasks:
        asked, wanted = encode(f'\n\nKey: "{key}"\nCorresponding value: "'), encode(value)
        begin, end = 0, len(pairs)
        at = next(i for i, (k, _) in enumerate(pairs) if k == key)
        while True:
            body = ",\n ".join(f'"{k}": "{v}"' for k, v in pairs[begin:end])
            task = "Extract the value corresponding to the specified key in the JSON object below."
            context = encode(f"{task}\n\nJSON data:\n{{{body}}}")
            if len(context) + len(asked) + len(wanted) <= longest or end - begin < 2:
                break
            begin, end = begin + (begin < at), end - (end > at + 1)
        depth = (at - begin) / max(end - begin - 1, 1)
        questions.append(NeedleQuestion(context, asked, wanted, depth))
    return questions


def answer_questions(engine: Any, questions: Sequence[NeedleQuestion]) -> list[NeedleResult]:
    """Have the engine decode questions together, under the policy that is set."""
    texts = [q.text + q.answer for q in questions]
    right = engine.ask(do="forced", prompts=[q.context for q in questions], texts=texts, keep=None)["right"]
    tails = [row[len(q.text) :] for row, q in zip(right, questions, strict=True)]
    return [NeedleResult(all(tail), statistics.fmean(tail)) for tail in tails]


def needle_records(
    dataset: str, metric: str, arm: str, results: list[tuple[NeedleQuestion, NeedleResult]], length: int
) -> list[Record]:
    """Share of questions answered, over all and for each tenth of the context; and share of the answers' tokens."""
    params: dict[str, Any] = {"context": length, "questions": len(results)}
    common = ("kv", dataset, arm)
    exact = [float(a.exact) for _, a in results]
    share = [a.share for _, a in results]
    found = [
        Record(*common, metric, round(statistics.fmean(exact), 4), "", exact, params),
        Record(*common, "token_recall", round(statistics.fmean(share), 4), "", [round(x, 4) for x in share], params),
    ]
    for tenth in range(DEPTHS):
        here = [float(a.exact) for q, a in results if round(q.depth * (DEPTHS - 1)) == tenth]
        if here:
            at = {**params, "depth": round(tenth / (DEPTHS - 1), 3), "questions": len(here)}
            found.append(Record(*common, f"{metric}_at_depth", round(statistics.fmean(here), 4), "", here, at))
    return found
