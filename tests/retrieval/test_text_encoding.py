"""Tests of the encodings of text files and HTML pages."""

import codecs
import gzip
from pathlib import Path

import pytest

from pilotfish.retrieval import RetrievalError
from pilotfish.retrieval.loaders import DocumentSource
from pilotfish.retrieval.text_encoding import detect_encoding

GERMAN = "Der Lotsenfisch begleitet größere Fische, zum Beispiel Haie und Rochen. Früher hieß er Pilotfisch. " * 3
CZECH = "Žralok a příliš žluťoučký kůň úpěl ďábelské ódy"
RUSSIAN = "Рыба-лоцман сопровождает акул и питается остатками их пищи, а также паразитами на их коже. " * 3
JAPANESE = (
    "ブリモドキはサメなどの大きな魚と一緒に泳ぎ、食べ残しや寄生虫を食べる魚である。日本では古くから知られている。"
    "全長は六十センチメートルほどで、体は細長く、青と黒の縞模様がある。昔の船乗りは、この魚が船を陸まで案内すると信じていた。"
)
CHINESE = (
    "低头思故乡，举头望明月。引水鱼常常跟随鲨鱼游泳，吃它们剩下的食物和寄生虫。古代的水手相信，这种鱼会把船带到陆地。"
)


def read(path: Path) -> str:
    """Return the text of a file as it is indexed."""
    (document,) = DocumentSource([path], lambda text: [text])
    return document.text


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (GERMAN, GERMAN.encode()),
        (GERMAN, codecs.BOM_UTF8 + GERMAN.encode()),
        (GERMAN, GERMAN.encode("utf-16")),
        (GERMAN, codecs.BOM_UTF16_BE + GERMAN.encode("utf-16-be")),
        (GERMAN, GERMAN.encode("utf-32")),
        (GERMAN, GERMAN.encode("cp1252")),
        ("café naïve, a text about sharks and pêche", "café naïve, a text about sharks and pêche".encode("cp1252")),
        (CZECH, CZECH.encode("cp1250")),
        (RUSSIAN, RUSSIAN.encode("cp1251")),
        (JAPANESE, JAPANESE.encode("shift_jis")),
        (JAPANESE, JAPANESE.encode("euc_jp")),
        (CHINESE, CHINESE.encode("gb18030")),
        ("日本", "日本".encode()),
    ],
)
@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_text_files(tmp_path: Path, text: str, content: bytes, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    assert read(path) == text


@pytest.mark.parametrize(
    ("declared", "codec", "text"),
    [
        ("utf-8", "utf-8", "größer"),
        ("iso-8859-1", "cp1252", "größer “quoted” 5 €"),
        ("ISO-8859-1", "latin-1", "größer"),
        ("windows-1251", "cp1251", "рыба"),
        ("koi8-r", "koi8-r", "рыба"),
        ("shift_jis", "cp932", "①魚"),
        ("gb2312", "gb18030", "故乡"),
        ("big5", "big5", "故鄉"),
        ("x-unknown", "utf-8", "größer"),
        ("utf-16", "utf-8", "größer"),
    ],
)
@pytest.mark.parametrize(
    "form", ['<meta charset="{}">', '<meta http-equiv="Content-Type" content="text/html; charset={}">']
)
def test_html_pages_with_a_declared_encoding(tmp_path: Path, declared: str, codec: str, text: str, form: str) -> None:
    path = tmp_path / "a.html"
    path.write_bytes(f"<html><head>{form.format(declared)}</head><body>{text}</body></html>".encode(codec))
    assert read(path) == text


def test_byte_order_mark_wins_over_the_declaration(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_bytes(codecs.BOM_UTF8 + '<meta charset="iso-8859-1">größer'.encode())
    assert read(path) == "größer"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\xd8", b"\x81\x8d\x00\xff\xfe\x9d\x00\x81" * 4])
def test_refuses_bytes_that_are_no_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(RetrievalError, match=r"^a\.txt: not text"):
        detect_encoding(path, path.name)
