"""Streamed answers with citations, from an index and a language model on an OpenAI-compatible server."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...retrieval import highlights
from ...retrieval.index import Index
from . import abstention as thresholds
from . import citations, engine_metrics, prompt
from .citations import Citation
from .connection import Clients, ServerError, named, parse_address, translate_errors

SILENCE = 60  # seconds before a server without counters is asked for them again
NOTHING = "I do not know: no document is similar enough to the question."
_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|$)", re.DOTALL)  # some servers leave reasoning in the answer
_REFUSAL = re.compile(  # does not match if "but", "however" or "see" follows
    r"\W*(?:answer: )?(?:(?:i am |i'm )?(?:sorry|afraid),? (?:but |that )?)?i do not know\b"
    r"(?![^.!?]*\b(?:but|however|see)\b)(?![^.!?]*[.!?]+\s*(?:but|however)\b)"
)


@dataclass(frozen=True)
class RetrievedPassage:
    """A passage that an answer can cite.

    Attributes:
        number: Number of the passage in the prompt, from 1.
        id: Id of the document.
        text: Text of the passage.
        snippet: Excerpt that matches the question.
        score: Score of the search.
        metadata: Metadata of the document.
    """

    number: int
    id: str
    text: str
    snippet: str
    score: float
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class PassagesFound:
    """The event that the search has finished.

    Attributes:
        passages: Passages in the prompt; none if the best one is below the threshold.
        similarity: Similarity of the best passage to the question, which is compared with the threshold; None if the
            search found no passage.
        milliseconds: Duration of the search.
    """

    passages: Sequence[RetrievedPassage]
    similarity: float | None
    milliseconds: float


@dataclass(frozen=True)
class AnswerText:
    """The event that more text of the answer has arrived."""

    text: str


@dataclass(frozen=True)
class AnswerDone:
    """The event that the answer is complete.

    Attributes:
        text: Text of the answer.
        known: False if the answer is an abstention: no passage was similar enough, or the model does not know.
        citations: Citations in the text.
        attributed: Numbers of the passages that share the words of the answer, if it has no citations.
        milliseconds: ``retrieval``, the duration of the search; ``first_token`` (TTFT) and ``total``, since the
            question.
        tokens: Token counts of the server: ``prompt``, ``answer``, and ``cached`` prompt tokens.
        saved: Increase of the plugins' counters during the answer, including that by concurrent requests.
        ended: The server's finish reason: ``stop``, ``length`` if the answer was cut off at ``max_tokens``, or another
            one; None if the server gives none.
    """

    text: str
    known: bool
    citations: Sequence[Citation]
    attributed: Sequence[int]
    milliseconds: Mapping[str, float]
    tokens: Mapping[str, int] = field(default_factory=dict)
    saved: Mapping[str, int] = field(default_factory=dict)
    ended: str | None = None

    @property
    def cited(self) -> list[int]:
        """Numbers of the cited passages, in the order of the text."""
        return list(dict.fromkeys(n for c in self.citations for n in c.numbers))

    def as_dict(self) -> dict[str, Any]:
        """Return the event as a dictionary for JSON."""
        return {**asdict(self), "cited": self.cited}


Event = PassagesFound | AnswerText | AnswerDone


class Answerer:
    """Answers questions from the documents of an index.

    Args:
        index: Index of the documents.
        url: URL of the server's API, such as ``http://127.0.0.1:8000/v1``.
        model: Name of the model at the server; None for the server's first model.
        key: API key of the server; most local servers need none.
        k: Number of passages in a prompt.
        threshold: Smallest similarity of the best passage; below it, the model is not asked. None for the threshold
            that `rag eval --save` wrote next to the index, or 0.
        max_tokens: Maximum number of tokens in an answer.
        options: Further fields of requests, such as ``temperature`` or vLLM's ``vllm_xargs``.

    Raises:
        ServerError: ``url`` is not a valid URL.
        RetrievalError: The file with the threshold cannot be read.
    """

    def __init__(
        self,
        index: Index,
        url: str,
        model: str | None = None,
        key: str = "none",
        k: int = 4,
        threshold: float | None = None,
        max_tokens: int = 256,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.index, self.url, self.model, self.k = index, parse_address(url), model, k
        self.threshold = thresholds.read_threshold(index.folder) if threshold is None else threshold
        self.max_tokens, self.options = max_tokens, {"temperature": 0.0, **(options or {})}
        self._key = key
        self._connected: tuple[asyncio.AbstractEventLoop, Clients] | None = None
        self._silent_until = 0.0

    def _clients(self) -> Clients:
        """Return the connections of the current event loop; a second `asyncio.run`, for example, needs new ones."""
        loop = asyncio.get_running_loop()
        if self._connected is None or self._connected[0] is not loop:
            self._connected = loop, Clients(self.url, self._key)
        return self._connected[1]

    async def close(self) -> None:
        """Close the connections; the next question opens new ones."""
        if self._connected is not None and self._connected[0] is asyncio.get_running_loop():
            await self._connected[1].close()
        self._connected = None

    async def counters(self) -> engine_metrics.EngineCounters | None:
        """Return the counters of the server; see `engine_metrics.read_counters`."""
        counters = await engine_metrics.read_counters(self._clients().plain, self.url)
        self._silent_until = time.monotonic() + SILENCE if counters is None else 0.0
        return counters

    def retrieve(self, question: str, where: str | None = None) -> PassagesFound:
        """Search passages for a question; return none if the best one is below the threshold.

        Raises:
            RetrievalError: The filter is invalid, or the index cannot be read.
        """
        found = retrieve_passages(self.index, question, self.k, where)
        near = found.similarity is not None and found.similarity >= self.threshold
        return found if near else replace(found, passages=())

    async def answer(
        self, question: str, history: Sequence[prompt.Message] = (), where: str | None = None
    ) -> AsyncIterator[Event]:
        """Answer a question, as a stream of events: one `PassagesFound`, then `AnswerText`, and at last `AnswerDone`.

        Args:
            question: Text of the question.
            history: Earlier turns of the conversation, see `prompt.follow_up_question`.
            where: Filter over metadata.

        Raises:
            ServerError: The server fails; no further event follows.
            RetrievalError: The filter is invalid, or the index cannot be read.
        """
        begun = time.perf_counter()
        counts = time.monotonic() >= self._silent_until
        search = asyncio.to_thread(self.retrieve, question, where)
        found, before = await asyncio.gather(search, self.counters()) if counts else (await search, None)
        yield found
        if not found.passages:
            yield AnswerText(NOTHING)
            took = {"retrieval": found.milliseconds, "total": _since(begun)}
            yield AnswerDone(NOTHING, False, (), (), took)
            return
        self.model = self.model or await named(self.url, None, self._key)
        parts: list[str] = []
        tokens: dict[str, int] = {}
        ended: str | None = None
        first = 0.0
        with translate_errors(self.url):
            asked = self._clients().openai.chat.completions.create(
                model=self.model,
                messages=prompt.chat_messages(found.passages, question, history),  # type: ignore[arg-type]
                max_tokens=self.max_tokens,
                stream=True,
                stream_options={"include_usage": True},
                temperature=self.options.get("temperature"),
                extra_body={k: v for k, v in self.options.items() if k != "temperature"},
            )
            async with await asked as stream:
                async for chunk in stream:
                    if chunk.usage is not None:
                        details = chunk.usage.prompt_tokens_details
                        tokens = {"prompt": chunk.usage.prompt_tokens, "answer": chunk.usage.completion_tokens}
                        tokens |= {"cached": details.cached_tokens or 0} if details is not None else {}
                    if chunk.choices:
                        ended = chunk.choices[0].finish_reason or ended
                        if sent := chunk.choices[0].delta.content:
                            text = sent.encode(
                                "utf-8", "replace"
                            ).decode()  # replaces lone surrogates, which cannot be encoded
                            first = first or _since(begun)
                            parts.append(text)
                            yield AnswerText(text)
        if not parts and not tokens:
            raise ServerError(f"{self.url}: the answer contains no field of OpenAI's protocol")
        if ended is None and not tokens:
            raise ServerError(f"{self.url}: the server broke off in the middle of the answer")
        took = {"retrieval": found.milliseconds, "first_token": first or _since(begun), "total": _since(begun)}
        after = await self.counters() if before is not None else None
        saved = after.since(before) if before is not None and after is not None else {}
        text = "".join(parts).strip()
        thought = _THOUGHT.match(text)
        reply = text[thought.end() :] if thought else text
        cited = [c for c in citations.find_citations(text, found.passages) if c.begin >= len(text) - len(reply)]
        known = not is_abstention(reply)
        attributed = citations.attribute_sentences(reply, found.passages) if known and not cited else []
        yield AnswerDone(text, known, cited, attributed, took, tokens, saved, ended)


def retrieve_passages(index: Index, question: str, k: int, where: str | None = None) -> PassagesFound:
    """Search the best ``k`` passages, without a threshold; see `Answerer.retrieve`."""
    started = time.perf_counter()
    hits = index.search(question, k, where)
    nearest = highlights.similarity(index, question, hits[0].text) if hits else None
    score = nearest if nearest is not None else hits[0].score if hits else None
    passages = [RetrievedPassage(i, h.id, h.text, h.snippet, h.score, h.metadata) for i, h in enumerate(hits, 1)]
    return PassagesFound(passages, score, _since(started))


def is_abstention(text: str) -> bool:
    """Return whether an answer is an abstention: it only states that the model does not know."""
    plain = text.lower().replace("’", "'").replace("don't", "do not")
    return not plain.strip() or _REFUSAL.match(plain) is not None


def _since(started: float) -> float:
    return round(1e3 * (time.perf_counter() - started), 1)
