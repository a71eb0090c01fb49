"""Checks of how commands refuse bad input."""

import subprocess


def refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Assert that a command printed one line on stderr with all ``parts``, and ended with exit code 2."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr
