"""Questions whose answer occurs once in a long context, to test what a KV policy loses.

The context is prefilled with full attention. Question and answer are then decoded under the policy with teacher
forcing: an answer is right if every token of it was the most probable one, so that greedy decoding would have written
it. The published needle test puts the question into the prompt, which no policy affects; here the question is processed
with the tokens that the policy reads.
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
SHORTEST = 64  # fewest tokens of a context that hides a needle


@dataclass(frozen=True)
class NeedleQuestion:
    """Token ids of one question.

    Attributes:
        context: Token ids of the context, which is the prompt.
        text: Token ids of the question, which is decoded after the context.
        answer: Token ids of the right answer.
        depth: Relative position of the answer in the context, 0 to 1.
        place: Positions (begin, end) of the answer in the context.
    """

    context: list[int]
    text: list[int]
    answer: list[int]
    depth: float
    place: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class NeedleResult:
    """Result of one question: whether all tokens of the answer were right, and the share of right tokens."""

    exact: bool
    share: float


def needle_questions(
    tokenizer: Any, haystack: str, length: int, seed: int, rounds: int = ROUNDS
) -> Iterator[list[NeedleQuestion]]:
    """Yield the needle test, a magic number in an unrelated text: one group of questions for each of `DEPTHS` depths.

    Args:
        tokenizer: Tokenizer of the model.
        haystack: Text of more than ``length`` tokens.
        length: Number of tokens of the context.
        seed: Seed of the magic numbers and of the excerpts of the text.
        rounds: Number of needles in a group, at most the number of `CITIES`.

    Raises:
        ConfigError: The context or the haystack is too short.
    """
    if length < SHORTEST:
        raise ConfigError(f"a needle needs a context of {SHORTEST} tokens at least, got {length}")
    rng = random.Random(f"{seed} {length}")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    hay = encode(haystack)
    if len(hay) <= length:
        raise ConfigError(f"the haystack has {len(hay)} tokens, more than {length} are needed")
    # All depths use the same excerpts, so that prefix caching processes each only once up to the needle.
    straws = [(city, rng.randrange(len(hay) - length)) for city in rng.sample(CITIES, rounds)]
    for step in range(DEPTHS):
        depth = step / (DEPTHS - 1)
        group = []
        for city, offset in straws:
            number = str(rng.randrange(10**6, 10**7))
            needle = encode(f"\nThe special magic {city} number is: {number}.\n")
            straw = hay[offset : offset + length - len(needle)]
            at = round(depth * len(straw))
            question = encode(f"\n\nWhat is the special magic {city} number? The special magic {city} number is: ")
            context = [*straw[:at], *needle, *straw[at:]]
            group.append(NeedleQuestion(context, question, encode(number), depth, (at, at + len(needle))))
        yield group


def dictionary_questions(tokenizer: Any, path: Path, count: int, longest: int) -> list[NeedleQuestion]:
    """Return questions of the key-value retrieval task of *Lost in the Middle* (arXiv 2307.03172), one per dictionary.

    Args:
        tokenizer: Tokenizer of the model.
        path: ``.jsonl`` or ``.jsonl.gz`` file whose lines have ``ordered_kv_records``, ``key`` and ``value``.
        count: Number of lines to use, at even distances.
        longest: Maximum number of tokens of context, question and answer; dictionaries are shortened from both ends
            to fit.

    Raises:
        ConfigError: The file cannot be read, or has another format.
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
        question, expected = encode(f'\n\nKey: "{key}"\nCorresponding value: "'), encode(value)
        begin, end = 0, len(pairs)
        at = next(i for i, (k, _) in enumerate(pairs) if k == key)
        while True:
            body = ",\n ".join(f'"{k}": "{v}"' for k, v in pairs[begin:end])
            task = "Extract the value corresponding to the specified key in the JSON object below."
            context = encode(f"{task}\n\nJSON data:\n{{{body}}}")
            if len(context) + len(question) + len(expected) <= longest or end - begin < 2:
                break
            begin, end = begin + (begin < at), end - (end > at + 1)
        depth = (at - begin) / max(end - begin - 1, 1)
        questions.append(NeedleQuestion(context, question, expected, depth))
    return questions


def answer_questions(engine: Any, questions: Sequence[NeedleQuestion]) -> list[NeedleResult]:
    """Decode questions together under the current policy, and return the result of each."""
    texts = [q.text + q.answer for q in questions]
    right = engine.ask(do="forced", prompts=[q.context for q in questions], texts=texts, keep=None)["right"]
    tails = [row[len(q.text) :] for row, q in zip(right, questions, strict=True)]
    return [NeedleResult(all(tail), statistics.fmean(tail)) for tail in tails]


def needle_records(
    dataset: str, metric: str, arm: str, results: list[tuple[NeedleQuestion, NeedleResult]], length: int
) -> list[Record]:
    """Return records of the share of right answers, in all and by tenth of the context, and of right answer tokens."""
    params: dict[str, Any] = {"context": length, "questions": len(results)}
    common = ("kv", dataset, arm)
    exact = [float(a.exact) for _, a in results]
    share = [a.share for _, a in results]
    records = [
        Record(*common, metric, round(statistics.fmean(exact), 4), "", exact, params),
        Record(*common, "token_recall", round(statistics.fmean(share), 4), "", [round(x, 4) for x in share], params),
    ]
    for tenth in range(DEPTHS):
        hits = [float(a.exact) for q, a in results if round(q.depth * (DEPTHS - 1)) == tenth]
        if hits:
            at = {**params, "depth": round(tenth / (DEPTHS - 1), 3), "questions": len(hits)}
            records.append(Record(*common, f"{metric}_at_depth", round(statistics.fmean(hits), 4), "", hits, at))
    return records
