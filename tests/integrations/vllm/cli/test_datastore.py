"""The command `pilotfish datastore`, and the functions that read and tokenise its corpus."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pilotfish.integrations.vllm.bench import corpora
from pilotfish.integrations.vllm.cli import datastore as commands
from pilotfish.integrations.vllm.models.base import fetch_model
from pilotfish.integrations.vllm.models.embedded import SMOLLM2
from pilotfish.plugins.config import ConfigError
from pilotfish.plugins.drafting.datastore import Datastore, vocabulary_fingerprint

TOKENIZER = ("--tokenizer", "smollm2-135m-instruct")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Write a corpus with two text files, one binary file and one hidden file."""
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 30)
    (folder / "inner" / "b.py").write_text("for i in range(10):\n    print(i)\n")
    (folder / "c.bin").write_bytes(b"\xff\xfe\x00\x80")
    (folder / ".hidden" / "d.txt").write_text("not this one")
    return folder


@pytest.mark.slow
def test_build_and_info(cli: Callable, corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    answer = cli("datastore", "build", str(corpus), *TOKENIZER, "--out", str(store))
    assert answer.returncode == 0, answer.stderr
    assert "skipped 1 files that are not UTF-8 text" in answer.stderr
    opened = Datastore(store, verify=True)
    assert opened.info.texts == 2
    tokenizer = corpora.tokenizer_of(str(fetch_model(SMOLLM2)))
    assert opened.info.fingerprint == vocabulary_fingerprint(tokenizer.get_vocab())
    tail = tokenizer("quick brown", add_special_tokens=False)["input_ids"][1:]
    tail = tokenizer("The quick brown", add_special_tokens=False)["input_ids"]
    match = opened.find_longest_suffix(np.array(tail, np.int32))
    assert (match.length, match.occurrences) == (len(tail), 30)
    assert tokenizer.decode(opened.continuations(match, 2, 1)[0]) == " fox jumps"
    answer = cli("datastore", "info", str(store), "--verify")
    assert answer.returncode == 0, answer.stderr
    assert "checksums  right" in answer.stdout


def test_encoding_in_pieces_equals_encoding_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = corpora.tokenizer_of(str(fetch_model(SMOLLM2)))
    text = "".join(f"line {i}\n" for i in range(300))
    whole = commands.encode_texts(tokenizer, text)
    monkeypatch.setattr(commands, "PIECE", 100)
    assert commands.encode_texts(tokenizer, text) == whole
    assert tokenizer.decode(commands.encode_texts(tokenizer, "x" * 1000)) == "x" * 1000


def test_find_filters_files_by_suffix(corpus: Path) -> None:
    assert [p.name for p in commands.find([corpus], ())] == ["a.txt", "c.bin", "b.py"]
    assert [p.name for p in commands.find([corpus], (".py",))] == ["b.py"]
    with pytest.raises(ConfigError, match="no files with this suffix"):
        commands.find([corpus], (".md",))


def test_datastore_refuses_bad_input(inside: Callable, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for arguments, message in (
        (("build", str(tmp_path / "none"), *TOKENIZER), "no such file or folder"),
        (("build", str(corpus), "--tokenizer", "./no"), "no such folder"),
        (("build", str(corpus), *TOKENIZER, "--out", str(tmp_path / "mine")), "exists, and is no datastore"),
        (("build", str(corpus / "c.bin"), *TOKENIZER, "--out", str(tmp_path / "s")), "contain no tokens"),
        (("info", str(corpus)), "not a datastore"),
        (("build", str(corpus), *TOKENIZER, "--out", str(corpus / "c.bin" / "x")), "c.bin is not a folder"),
    ):
        answer = inside("datastore", *arguments)
        assert answer.returncode == 2, answer
        assert message in answer.stderr
        assert "Traceback" not in answer.stderr
    assert not (tmp_path / "s").exists()
