"""Passage of a text that shows why it matches a query."""

import re
from collections import Counter

LENGTH = 240  # characters of a snippet
MARGIN = 30  # characters before the first query term, and the minimum after the last one
_WORD = re.compile(r"\w+")


def best_snippet(text: str, query: str, length: int = LENGTH) -> str:
    """Return the passage of ``text`` with the most distinct query terms, cut at word boundaries.

    White space is normalised to single blanks.
    """
    flat = " ".join(text.split())
    if len(flat) <= length:
        return flat
    wanted = {w.lower()[:5] for w in _WORD.findall(query) if len(w) > 2}  # prefixes, to ignore inflection
    positions = [(m.start(), m[0].lower()[:5]) for m in _WORD.finditer(flat) if m[0].lower()[:5] in wanted]
    begin = most = last = 0
    counts: Counter[str] = Counter()  # query terms from the current position on, within a snippet
    for start, word in positions:
        while last < len(positions) and positions[last][0] < start + length - 2 * MARGIN:
            counts[positions[last][1]] += 1
            last += 1
        if len(counts) > most:
            begin, most = start, len(counts)
        counts[word] -= 1
        if not counts[word]:
            del counts[word]
    begin = max(0, min(begin - MARGIN, len(flat) - length))
    if begin:
        begin = flat.find(" ", begin) + 1
    end = min(begin + length, len(flat))
    if end < len(flat):
        end = flat.rfind(" ", begin, end) if " " in flat[begin:end] else end
    return ("… " if begin else "") + flat[begin:end].strip() + (" …" if end < len(flat) else "")
