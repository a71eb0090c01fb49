"""A question, an index, a language model behind an OpenAI-compatible server: an answer with citations, as it comes."""

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

SILENCE = 60  # seconds for which a server that names no counters is not asked for them again
NOTHING = "I do not know: nothing in the documents comes near the question."
_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|$)", re.DOTALL)  # of servers that leave it in the answer
_REFUSAL = re.compile(  # and not: ..., but; ..., see [1]; ... But
    r"\W*(?:answer: )?(?:(?:i am |i'm )?(?:sorry|afraid),? (?:but |that )?)?i do not know\b"
    r"(?![^.!?]*\b(?:but|however|see)\b)(?![^.!?]*[.!?]+\s*(?:but|however)\b)"
)


@dataclass(frozen=True)
class RetrievedPassage:
    """A hit as an answer cites it."""

    number: int
    id: str
    text: str
    snippet: str
    score: float
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class PassagesFound:
    """Passages were found.

    Attributes:
        passages: What the model will see; none where nothing comes near enough.
        similarity: Of the best one to the question, what the threshold is compared with; None where nothing was found.
        milliseconds: Of the search.
    """

    passages: Sequence[RetrievedPassage]
    similarity: float | None
    milliseconds: float


@dataclass(frozen=True)
class AnswerText:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class AnswerDone:
    """The answer is whole.

    Attributes:
        text: All of it.
        known: Whether it is one: not that nothing was found, or that the model does not know.
        citations: Where it names passages.
        attributed: Where it names none, those that have its words.
        milliseconds: ``retrieval``, ``first_token`` (both from the question on) and ``total``.
        tokens: ``prompt`` and ``answer``, and ``cached`` of the prompt, as the server counts.
        saved: What plugins counted meanwhile; of other requests too, where such ran.
        ended: Why the model stopped, as the server says: ``stop``, ``length`` where the answer is cut at
            ``max_tokens``, or what else it knows; None where it does not say.
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
        """Numbers of passages that it names, in its order."""
        return list(dict.fromkeys(n for c in self.citations for n in c.numbers))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "cited": self.cited}


Event = PassagesFound | AnswerText | AnswerDone


class Answerer:
    """Answers questions from the documents of an index.

    Args:
        index: Where passages are found.
        url: Of the server's API, as ``http://127.0.0.1:8000/v1``.
        model: As the server names it; None for the first that it has.
        key: For the server; most on one's own machine ask for none.
        k: Passages of a prompt.
        threshold: Similarity of the best passage below which nothing is asked of the model; None for what
            `rag eval --save` kept beside the index, or 0.
        max_tokens: Of an answer, at most.
        options: Further fields of requests, as ``temperature`` or vLLM's ``vllm_xargs``.

    Raises:
        ServerError: ``url`` is none.
        RetrievalError: the threshold beside the index cannot be read.
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
        """Connections belong to the event loop that opened them: another, as of a second `asyncio.run`, has its own."""
        loop = asyncio.get_running_loop()
        if self._connected is None or self._connected[0] is not loop:
            self._connected = loop, Clients(self.url, self._key)
        return self._connected[1]

    async def close(self) -> None:
        """Let go of connections; the next question opens new ones."""
        if self._connected is not None and self._connected[0] is asyncio.get_running_loop():
            await self._connected[1].close()
        self._connected = None

    async def counters(self) -> engine_metrics.EngineCounters | None:
        """Of the server; see `savings`."""
        found = await engine_metrics.read_counters(self._clients().plain, self.url)
        self._silent_until = time.monotonic() + SILENCE if found is None else 0.0
        return found

    def retrieve(self, question: str, where: str | None = None) -> PassagesFound:
        """Passages for a question.

        Raises:
            RetrievalError: the filter is wrong, or the index cannot be read.
        """
        found = retrieve_passages(self.index, question, self.k, where)
        near = found.similarity is not None and found.similarity >= self.threshold
        return found if near else replace(found, passages=())

    async def answer(
        self, question: str, history: Sequence[prompt.Message] = (), where: str | None = None
    ) -> AsyncIterator[Event]:
        """What happens, as it happens: `Found`, `Text` by `Text`, `Done`.

        Raises:
            ServerError: the server fails; nothing more comes then.
            RetrievalError: see `retrieve`.
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
                            text = sent.encode("utf-8", "replace").decode()  # halves of pairs, which nobody could write
                            first = first or _since(begun)
                            parts.append(text)
                            yield AnswerText(text)
        if not parts and not tokens:
            raise ServerError(f"{self.url}: the answer held nothing that OpenAI's protocol knows")
        if ended is None and not tokens:
            raise ServerError(f"{self.url}: the server broke off in the middle of the answer")
        took = {"retrieval": found.milliseconds, "first_token": first or _since(begun), "total": _since(begun)}
        after = await self.counters() if before is not None else None
        saved = after.since(before) if before is not None and after is not None else {}
        text = "".join(parts).strip()
        thought = _THOUGHT.match(text)
        said = text[thought.end() :] if thought else text
        cited = [c for c in citations.find_citations(text, found.passages) if c.begin >= len(text) - len(said)]
        known = not is_abstention(said)
        guessed = citations.attribute_sentences(said, found.passages) if known and not cited else []
        yield AnswerDone(text, known, cited, guessed, took, tokens, saved, ended)


def retrieve_passages(index: Index, question: str, k: int, where: str | None = None) -> PassagesFound:
    """The ``k`` passages that an index finds, however far they are; see `Answerer.retrieve`."""
    started = time.perf_counter()
    hits = index.search(question, k, where)
    nearest = highlights.similarity(index, question, hits[0].text) if hits else None
    score = nearest if nearest is not None else hits[0].score if hits else None
    passages = [RetrievedPassage(i, h.id, h.text, h.snippet, h.score, h.metadata) for i, h in enumerate(hits, 1)]
    return PassagesFound(passages, score, _since(started))


def is_abstention(text: str) -> bool:
    """Whether a model says that it does not know, and no more of the question than that."""
    plain = text.lower().replace("’", "'").replace("don't", "do not")
    return not plain.strip() or _REFUSAL.match(plain) is not None


def _since(started: float) -> float:
    return round(1e3 * (time.perf_counter() - started), 1)
