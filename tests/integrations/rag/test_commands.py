"""The commands of `pilotfish rag`, each run in its own process: answers, refused input, and the served page."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from language_server import DOCUMENTS, LanguageServer
from refusals import refused

from pilotfish.integrations.rag import abstention
from pilotfish.retrieval import Index

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Create an index that loads quickly, and return its folder."""
    with Index.create(tmp_path / "index", "bm25") as index:
        index.add([{"id": i, "text": t, "metadata": m} for i, t, m in DOCUMENTS])
    return str(tmp_path / "index")


@pytest.mark.slow
def test_ask_prints_answer_and_citations(cli: Cli, folder: str, language: LanguageServer) -> None:
    result = cli("rag", "ask", folder, "what do pilot fish travel with?", "--server", language.url)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Pilot fish travel with sharks [1].\n\n[1] sharks: ")
    assert re.search(
        r"search \d+ ms, first token \d+ ms, total \d+ ms, 40 \+ 9 tokens, 3 drafter accepted tokens", result.stderr
    )
    payload = json.loads(cli("rag", "ask", folder, "sharks?", "--server", language.url, "--json").stdout)
    assert (payload["text"], payload["cited"], payload["passages"][0]["id"]) == (
        "Pilot fish travel with sharks [1].",
        [1],
        "sharks",
    )
    output = cli("rag", "ask", folder, "what is bread, naming nothing?", "--server", language.url).stdout
    assert "(by its words; the answer cites no passage)" in output
    filtered = cli("rag", "ask", folder, "sharks?", "--server", language.url, "--where", "year > 3000")
    assert (filtered.returncode, filtered.stdout.strip()) == (
        0,
        "I do not know: no document is similar enough to the question.",
    )


def test_ask_uses_saved_threshold(preloaded_cli: Cli, folder: str, language: LanguageServer) -> None:
    abstention.write_threshold(Path(folder), 1000.0, {})
    assert (
        "no document is similar enough"
        in preloaded_cli("rag", "ask", folder, "sharks?", "--server", language.url).stdout
    )
    result = preloaded_cli("rag", "ask", folder, "sharks?", "--server", language.url, "--threshold", "0")
    assert result.stdout.startswith("Pilot fish")
    (Path(folder) / abstention.NAME).write_text("{")
    refused(
        preloaded_cli("rag", "ask", folder, "sharks?", "--server", language.url), abstention.NAME, "rag eval --save"
    )


def test_chat_keeps_history_and_survives_errors(folder: str, language: LanguageServer) -> None:
    before = len(language.requests)
    command = [sys.executable, "-m", "pilotfish", "rag", "chat", folder, "--server", language.url]
    lines = "what do pilot fish travel with?\n\nbroken sharks\nand the moon?\n"
    result = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("[1]") >= 2
    assert "pilotfish: " in result.stderr and "the engine has died" in result.stderr
    first, _, second = language.requests[before:]
    assert second["messages"][: len(first["messages"])] == first["messages"], (
        "prompts only grow, so that the prefix cache is used"
    )
    assert second["messages"][-2] == {"role": "assistant", "content": "Pilot fish travel with sharks [1]."}


def test_control_characters_are_removed_from_output(cli: Cli, tmp_path: Path, language: LanguageServer) -> None:
    with Index.create(tmp_path / "index", "bm25") as index:
        index.add([{"id": "a\x1b[2J\u202eb", "text": "Evil \x1b]0;title\x07sharks\x9b31m swim."}])
    result = cli("rag", "ask", str(tmp_path / "index"), "sharks?", "--server", language.url)
    assert result.stdout.startswith("Evil ]0;titlesharks31m swim [1].\n\n[1] a[2Jb: Evil")
    searched = cli("index", "search", str(tmp_path / "index"), "sharks")
    assert "swim" in searched.stdout
    assert not set("\x1b\x07\x9b\u202e") & set(result.stdout + searched.stdout)


@pytest.mark.slow
def test_rag_refuses_bad_input(
    preloaded_cli: Cli, inside: Cli, folder: str, language: LanguageServer, tmp_path: Path
) -> None:
    server = ("--server", language.url)
    refused(
        preloaded_cli("rag", "ask", folder, "x", "--server", "http://127.0.0.1:9/v1"),
        "no server answers",
        "--start MODEL",
    )
    refused(preloaded_cli("rag", "ask", folder, "x", *server, "--model", "other"), "has no model other", "by-rule")
    refused(inside("rag", "ask", str(tmp_path / "absent"), "x", *server), "absent")
    refused(inside("rag", "ask", folder, "x", *server, "--where", "year <"), "expected a value")
    refused(inside("rag", "ask", folder, "x", *server, "--drafter", "rasd"), "--drafter", "--start MODEL")
    refused(inside("rag", "ask", folder, "x", *server, "--", "--dtype", "float32"), "--dtype", "--start MODEL")
    refused(inside("rag", "ask", folder, "x", "--start", "smollm2-135m-instruct", "--drafter", "rasdd"), "rasd")
    refused(inside("rag", "ask", folder, "x", "--start", str(tmp_path / "model")), "model")
    refused(inside("rag", "serve", folder, *server, "--host", "0.0.0.0"), "--token")
    for token in ("", "two words", "日本", "tab\t"):
        refused(inside("rag", "serve", folder, *server, "--token", token), "--token", "ASCII")
    refused(inside("rag", "ask", folder, " ", *server), "is empty")
    refused(inside("rag", "ask", folder, "x", *server, "--treshold", "0.3"), "--treshold", "--threshold")
    refused(inside("rag", "ask", folder, "x", "y", *server), "y: not an option", "--start MODEL")
    refused(inside("rag", "serve", str(tmp_path / "made"), "--server", "http://127.0.0.1:9/v1"), "no server answers")
    assert not (tmp_path / "made").exists(), "an index created for a failed command is removed"
    (tmp_path / "there").mkdir()
    refused(inside("rag", "serve", str(tmp_path / "there"), *server, "--model", "other"), "has no model other")
    assert (tmp_path / "there").is_dir() and not list((tmp_path / "there").iterdir())
    refused(inside("rag", "ask", folder, "x", *server, "--threshold", "nan"), "--threshold")
    failed = preloaded_cli("rag", "ask", folder, "broken sharks", *server)
    assert (failed.returncode, failed.stdout.strip()) == (2, "Pilot fish")
    assert "the engine has died" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.slow
def test_eval_prints_metrics_and_saves_threshold(
    preloaded_cli: Cli, folder: str, language: LanguageServer, tmp_path: Path
) -> None:
    cases = [
        {"question": "what do pilot fish travel with?", "answers": ["sharks"], "documents": ["sharks"]},
        {"question": "what is bread baked from?", "answers": ["flour and water"], "documents": ["bread"]},
        {"question": "unknown who?", "answers": []},
        {"question": "unknown zebra?", "answers": []},
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(c) + "\n" for c in cases * 4))
    command = ("rag", "eval", folder, str(questions))
    result = preloaded_cli(*command, "--server", language.url, "--json")
    assert result.returncode == 0, result.stderr
    payload = json.loads(result.stdout)
    assert (payload["recall@4"], payload["contains"], payload["citation_precision"]) == (1.0, 1.0, 1.0)
    assert (payload["true_abstentions"], payload["false_abstentions"]) == (1.0, 0.0)
    assert payload["with_answer"] + payload["without_answer"] == 8, "the other half is used for retrieval only"
    refused(
        preloaded_cli(*command, "--sample", "0", "--survey", "6", "--save"),
        "--save",
        "5 of each are needed",
        "--sample 0",
    )
    assert not (Path(folder) / abstention.NAME).exists()
    saved = preloaded_cli(*command, "--sample", "0", "--save", "--json")
    assert saved.returncode == 0, saved.stderr
    assert abstention.read_threshold(Path(folder)) == json.loads(saved.stdout)["threshold"] > 0
    squad = {"data": [{"title": "a", "paragraphs": [{"context": "Cats purr.", "qas": [
        {"question": "Who purrs?", "answers": [{"text": "Cats"}]}]}]}]}  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    refused(
        preloaded_cli("rag", "eval", folder, str(tmp_path / "squad.json"), "--sample", "0"), "no document that answers"
    )
    refused(preloaded_cli("rag", "eval", folder, str(tmp_path / "absent.json")), "absent.json")
    unreachable = ("--server", "http://127.0.0.1:9/v1")
    refused(
        preloaded_cli("rag", "eval", str(tmp_path / "new"), str(tmp_path / "squad.json"), *unreachable),
        "no server answers",
    )
    assert not (tmp_path / "new").exists(), "no index is created when no server answers"
    created = preloaded_cli(
        "rag", "eval", str(tmp_path / "new"), str(tmp_path / "squad.json"), "--sample", "0", "--hold-out", "0"
    )
    assert created.returncode == 0, created.stderr
    assert "recall@4" in created.stdout
    assert len(Index.open(tmp_path / "new")) == 1


def test_serve_until_interrupted(folder: str, language: LanguageServer) -> None:
    command = [sys.executable, "-m", "pilotfish", "rag", "serve", folder, "--server", language.url, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert server.stderr is not None
    try:
        url = next(match[1] for line in server.stderr if (match := re.search(r"listens at (http\S+)", line)))
        assert "<title>Pilotfish</title>" in httpx.get(url).text
        assert httpx.get(url + "/status").json()["plugins"] == ["rasd"]
        lines = httpx.post(url + "/ask", json={"question": "sharks?"}).text.splitlines()
        assert json.loads(lines[-1])["done"]["cited"] == [1]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130), "the exit status is that of Ctrl-C"
        server.stderr.close()


def test_bench_rag_refuses_bad_input(preloaded_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "q", "answers": ["a"]}\n')
    data = ("--data", str(tmp_path / "own.jsonl"))
    refused(preloaded_cli("bench", "rag", *data, "--arms", "rasdd"), "rasdd", "rasd")
    refused(preloaded_cli("bench", "rag", *data, "--out", str(tmp_path / "x.json")), "own", "no passages")
    refused(preloaded_cli("bench", "rag", "--data", str(tmp_path / "absent")), "absent")
    refused(preloaded_cli("bench", "rag", *data, "--out", str(tmp_path)), "a folder")
