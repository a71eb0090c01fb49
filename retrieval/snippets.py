"""Passage of a text that shows why it matches a query."""

from collections import Counter

from .text_normalization import fold, runs

LENGTH = 240  # characters of a snippet
MARGIN = 30  # characters before the first query term, and the minimum after the last one
PREFIX = 5  # words are compared by their first letters, to ignore inflection
LONG = 20_000  # characters of a text of which only the part around the snippet is processed further
MOST_PLACES = 1000  # maximum number of places of one query term


def best_snippet(text: str, query: str, length: int = LENGTH) -> str:
    """Return the passage of ``text`` with the most distinct query terms, cut at word boundaries.

    White space is normalised to single blanks. The cost grows by about 5 ms per million characters.
    """
    prefixes = query_prefixes(query)
    if len(text) <= LONG:
        return _cut(" ".join(text.split()), prefixes, length, False, False)
    place = _densest(_places(_fold_in_place(text), prefixes), length)
    begin, end = max(0, place - 2 * length), min(len(text), place + 4 * length)
    return _cut(" ".join(text[begin:end].split()), prefixes, length, begin > 0, end < len(text))


def query_prefixes(query: str) -> dict[str, str]:
    """Return the texts by which a query's words are found, with the words: prefixes, or bigrams of unspaced scripts."""
    folded, found = fold(query), dict[str, str]()
    for begin, end, unspaced in runs(folded):
        run = folded[begin:end]
        if not unspaced:
            if len(run) > 2:
                found[run[:PREFIX]] = run
        else:
            for pair in [run[i : i + 2] for i in range(max(len(run) - 1, 1))]:
                found[pair] = pair
    return found


def _cut(flat: str, prefixes: dict[str, str], length: int, before: bool, after: bool) -> str:
    """Return the best passage of a short text; ``before`` and ``after`` tell whether it is a part of a longer one."""
    if len(flat) <= length:
        return ("… " if before else "") + flat + (" …" if after else "")
    begin = _densest(_places(_fold_in_place(flat), prefixes), length)
    begin = max(0, min(begin - MARGIN, len(flat) - length))
    if begin:
        begin = flat.find(" ", begin, begin + 2 * MARGIN) + 1 or begin
    end = min(begin + length, len(flat))
    if end < len(flat):
        end = max(flat.rfind(" ", begin, end), begin) if " " in flat[begin:end] else end
    before, after = before or begin > 0, after or end < len(flat)
    return ("… " if before else "") + flat[begin:end].strip() + (" …" if after else "")


def _densest(places: list[tuple[int, str]], length: int) -> int:
    """Return the place from which on a snippet contains the most distinct query terms."""
    best = most = last = 0
    counts: Counter[str] = Counter()  # query terms from the current place on, within a snippet
    for start, word in places:
        while last < len(places) and places[last][0] < start + length - 2 * MARGIN:
            counts[places[last][1]] += 1
            last += 1
        if len(counts) > most:
            best, most = start, len(counts)
        counts[word] -= 1
        if not counts[word]:
            del counts[word]
    return best


def _places(folded: str, prefixes: dict[str, str]) -> list[tuple[int, str]]:
    """Return (position, prefix) of the query terms in a text, in text order."""
    rare: list[tuple[int, str]] = []
    frequent: list[tuple[int, str]] = []
    for prefix in prefixes:
        found = _find_all(folded, prefix, 0, len(folded))
        (rare if len(found) < MOST_PLACES else frequent).extend((at, prefix) for at in found)
    # Of a frequent term, the first places are known, and those around places of rare terms.
    for prefix in {prefix for _, prefix in frequent} if rare else ():
        for at, _ in rare[:MOST_PLACES]:
            frequent += ((i, prefix) for i in _find_all(folded, prefix, max(0, at - LENGTH), at + LENGTH))
    return sorted({*rare, *frequent})


def _find_all(folded: str, prefix: str, begin: int, end: int) -> list[int]:
    """Return the first `MOST_PLACES` positions at which a word begins with a prefix."""
    found, at = list[int](), folded.find(prefix, begin, end)
    while at >= 0 and len(found) < MOST_PLACES:
        if at == 0 or not folded[at - 1].isalnum() or not prefix.isascii():
            found.append(at)
        at = folded.find(prefix, at + 1, end)
    return found


def _fold_in_place(text: str) -> str:
    """Fold a text such that all characters keep their positions; the few that become several keep the first only."""
    if text.isascii():
        return text.lower()
    folded = []
    for begin in range(0, len(text), 1024):
        block = text[begin : begin + 1024]
        whole = fold(block)
        folded.append(whole if len(whole) == len(block) else "".join((fold(c) or " ")[0] for c in block))
    return "".join(folded)
