"""The part of a text that shows why it was found."""

import re
from collections import Counter

LENGTH = 240  # characters
MARGIN = 30  # of them before the first word, and at least so many behind the last
_WORD = re.compile(r"\w+")


def best_snippet(text: str, query: str, length: int = LENGTH) -> str:
    """The stretch of ``text`` with most different words of the query, cut at words; white space becomes one blank."""
    flat = " ".join(text.split())
    if len(flat) <= length:
        return flat
    wanted = {w.lower()[:5] for w in _WORD.findall(query) if len(w) > 2}  # endings count little
    places = [(m.start(), m[0].lower()[:5]) for m in _WORD.finditer(flat) if m[0].lower()[:5] in wanted]
    begin = most = last = 0
    inside: Counter[str] = Counter()  # of the words between the i-th place and those a length behind it
    for start, word in places:
        while last < len(places) and places[last][0] < start + length - 2 * MARGIN:
            inside[places[last][1]] += 1
            last += 1
        if len(inside) > most:
            begin, most = start, len(inside)
        inside[word] -= 1
        if not inside[word]:
            del inside[word]
    begin = max(0, min(begin - MARGIN, len(flat) - length))
    if begin:
        begin = flat.find(" ", begin) + 1
    end = min(begin + length, len(flat))
    if end < len(flat):
        end = flat.rfind(" ", begin, end) if " " in flat[begin:end] else end
    return ("… " if begin else "") + flat[begin:end].strip() + (" …" if end < len(flat) else "")
