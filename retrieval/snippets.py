"""The part of a text that shows why it was found."""

import re

LENGTH = 240  # characters
_WORD = re.compile(r"\w+")


def best(text: str, query: str, length: int = LENGTH) -> str:
    """The stretch of ``text`` with most different words of the query, cut at words; white space becomes one blank."""
    flat = " ".join(text.split())
    if len(flat) <= length:
        return flat
    wanted = {w.lower()[:5] for w in _WORD.findall(query) if len(w) > 2}  # endings count little
    places = [(m.start(), m[0].lower()[:5]) for m in _WORD.finditer(flat) if m[0].lower()[:5] in wanted]
    begin, most = 0, 0
    for i, (start, _) in enumerate(places):
        found = len({word for at, word in places[i:] if at < start + length})
        if found > most:
            begin, most = start, found
    begin = max(0, min(begin - 30, len(flat) - length))
    if begin:
        begin = flat.find(" ", begin) + 1
    end = min(begin + length, len(flat))
    if end < len(flat):
        end = flat.rfind(" ", begin, end) if " " in flat[begin:end] else end
    return ("… " if begin else "") + flat[begin:end].strip() + (" …" if end < len(flat) else "")
