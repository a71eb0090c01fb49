"""Tests of the loaders with files of other writers: see tests/data/real_files/README.md."""

import re
from pathlib import Path
from typing import Any

import pytest

from pilotfish.retrieval import RetrievalError
from pilotfish.retrieval.record_files import read_records
from pilotfish.retrieval.text_files import read_texts

PDF = {  # number of pages, and a phrase; or the reason for which the file is refused
    "AutoCad_Simple.pdf": (1, "EXAMPLE"),
    "MultiColumn.pdf": (1, "8 107 207 9 108 208"),
    "box.pdf": (1, ""),
    "crazyones.pdf": (1, "They push the human race forward."),
    "form.pdf": (1, "foo"),
    "formxobject.pdf": (1, "What follows is an image embedded as a Form XObject:"),
    "inkscape-abc.pdf": (1, "A B C"),
    "libreoffice-writer-password.pdf": "encrypted, a password is needed",
    "pdfminer-base.pdf": (1, "Secret!"),
    "pdfminer-rc4-40.pdf": "encrypted, a password is needed",
    "reportlab-inline-image.pdf": (1, "Test"),
    "two-different-pages.pdf": (2, "1 2"),
    "wps-writer.pdf": (1, "pdf encryption test password: asdfzxcv"),
}
HTML = {
    "IANA — reserved domains.html": "Certain domains are set aside",
    "apache.html": "Apache Server Status for ub2fkkeeyl3jgwwz.onion",
    "books to scrape.html": "This now-classic collection of poetry and drawings from",
    "exotic_tags.html": "My new car is silver",
    "http_sample.html": "Availing himself of the mild, summer-cool weather",
    "httpbin_sample.html": "at last came out the four acts of the gladness",
    "mozilla.html": "Welcome to Firefox Developer Edition",
    "programming.html": "Programming with PDFMiner",
    "scotland_births.html": "Aberdeen City 11.0 10.4 7.7 5.7 35.0",
    "scotland_changes.html": "Peeblesshire PEE Peeblesshire Borders",
    "sphinx.html": "Webstruct 0.6 documentation",
    "utf8.html": "в по вопросам глобального Интернета и Unicode",
}
RECORDS: dict[str, tuple[int, dict[str, Any]] | str] = {  # number of records, and fields of the first one
    "csv/MultiColumn.csv": (43, {"1": 2, "100": 101, "200": 201}),
    "csv/Stocks.csv": "more fields than the header",  # two lines of comment come first
    "csv/campaign_donors.csv": (56, {"Nombre": "JUAN MARTÍN", "Fecha": "09/10/2013", "Importe": "$ 10.000,00"}),
    "csv/committee.csv": (20, {"COMMITTEE": "Appropriations", "BILLS104": 6}),
    "csv/data_dtype_template_expected.csv": (7, {"Energia Elétrica kWh": "Contrib. Custeio Ilum Pública"}),
    "csv/duckdb.csv": (2, {"price": 1.5, "day": "2024-01-02", "big": "170141183460469231731687303715884105727"}),
    "csv/iowa-electricity.csv": (51, {"source": "Fossil Fuels", "net_generation": 35361}),
    "csv/pandas-utf16.csv": (2, {"text": "the remora clings to sharks", "n": 1}),
    "csv/pandas.csv": (2, {"text": "the remora clings to sharks", "n": 1, "when": "2024-01-02 03:04:05+02:00"}),
    "csv/scotland_population.csv": "more fields than the header",
    "csv/ships.csv": (40, {"ship": 1, "service": 127}),
    "csv/strikes.csv": (62, {"duration": 7, "iprod": 0.01138}),  # blanks around names and numbers
    "csv/sunspots.csv": (309, {"YEAR": 1700, "SUNACTIVITY": 5.0}),
    "csv/tabula.csv": (32, {"mpg": 21.0, "cyl": 6, "disp": 160.0}),
    "csv/tabula.tsv": (32, {"mpg": 21.0, "cyl": 6, "disp": 160.0}),
    "json/anscombe.json": (44, {"Series": "I", "X": 10.0, "Y": 8.04}),
    "json/burtin.json": (16, {"Bacteria": "Aerobacter aerogenes", "Neomycin": 1.6}),
    "json/context7.json": "expected a list of objects",
    "json/crimea.json": (24, {"date": "1854-04-01", "disease": 110}),
    "json/dataset_info.json": "expected a list of objects",
    "json/driving.json": (55, {"side": "left", "year": 1956, "gas": 2.38}),
    "json/duckdb.json": (2, {"info": {"k": 1, "v": "x"}, "big": 170141183460469231731687303715884105727}),
    "json/duckdb.ndjson": (2, {"info": {"k": 1, "v": "x"}, "price": 1.5}),
    "json/ohlc.json": (44, {"date": "2009-06-01", "signal": "short"}),
    "json/pandas-columns.json": "expected a list of objects",
    "json/pandas-lines.jsonl": (2, {"when": "2024-01-02T01:04:05.000Z"}),
    "json/pandas-records.json": (2, {"kind": "fish", "n": 1}),
    "json/polars.jsonl": (3, {"tags": ["x", "y"]}),
    "json/wheat.json": (52, {"year": "1565", "wheat": 41}),
    "parquet/duckdb-types.parquet": (2, {"t": "12:00:00"}),
    "parquet/duckdb-v2.parquet": (2, {"text": "the remora clings to sharks"}),  # delta encodings
    "parquet/duckdb.parquet": (2, {"price": 1.5, "day": "2024-01-02", "info": {"k": 1, "v": "x"}}),
    "parquet/fastparquet.parquet": (2, {"n": 1, "when": "2024-01-02T01:04:05+00:00"}),
    "parquet/int96.parquet": (2, {"when": "2024-01-02T03:04:05"}),
    "parquet/no-rows.parquet": (0, {}),
    "parquet/pandas-pyarrow.parquet": (2, {"kind": "fish", "when": "2024-01-02T03:04:05+02:00"}),
    "parquet/polars.parquet": (3, {"when": "2024-01-02T03:04:05.678901", "tags": ["x", "y"]}),
    "parquet/v0.7.1.all-named-index.parquet": (10, {"carat": 0.22, "cut": "Fair"}),
    "parquet/v0.7.1.column-metadata-handling.parquet": (3, {"a": 1, "c": "2016-12-31T23:00:00+00:00"}),
    "parquet/v0.7.1.parquet": (10, {"cut": "Ideal", "price": 326}),
    "parquet/v0.7.1.some-named-index.parquet": (10, {"cut": "Fair", "x": 3.87}),
}


@pytest.fixture
def files(root: Path) -> Path:
    return root / "tests" / "data" / "real_files"


def test_every_file_has_an_expectation(files: Path) -> None:
    found = {p.relative_to(files).as_posix() for p in files.glob("*/*") if p.suffix != ".txt"}
    assert found == {f"pdf/{n}" for n in PDF} | {f"html/{n}" for n in HTML} | set(RECORDS)


@pytest.mark.parametrize("name", PDF)
def test_pdf(files: Path, name: str) -> None:
    expected = PDF[name]
    if isinstance(expected, str):
        with pytest.raises(RetrievalError, match=expected):
            list(read_texts(files / "pdf" / name, name))
        return
    texts = [text for text, _ in read_texts(files / "pdf" / name, name)]
    pages, phrase = expected
    assert len(texts) == pages
    words = " ".join(" ".join(texts).split())
    assert phrase in words and bool(phrase) == bool(words)


@pytest.mark.parametrize("name", HTML)
def test_html(files: Path, name: str) -> None:
    ((text, _),) = read_texts(files / "html" / name, name)
    assert HTML[name] in " ".join(text.split())
    assert "</" not in text and "{" not in text.splitlines()[0]


@pytest.mark.parametrize("name", ["IANA — reserved domains", "books to scrape", "sphinx"])
def test_html_has_the_words_that_html_text_extracts(files: Path, name: str) -> None:
    """Test against another library: no word of the page is lost, and no other is added."""
    ((text, _),) = read_texts(files / "html" / f"{name}.html", f"{name}.html")
    expected = (files / "html" / f"{name}.txt").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\w+", text)) == sorted(re.findall(r"\w+", expected))


@pytest.mark.parametrize("name", RECORDS)
def test_records(files: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    expected = RECORDS[name]
    if isinstance(expected, str):
        with pytest.raises(RetrievalError, match=expected):
            list(read_records(files / name, name))
        return
    records = [record for _, record in read_records(files / name, name)]
    count, fields = expected
    assert len(records) == count
    for field, value in fields.items():
        assert records[0][field] == value and type(records[0][field]) is type(value)
