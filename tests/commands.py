"""Commands in this process: their exit status, what they print, and the one line that an error is."""

from __future__ import annotations

import json
from typing import Any

from controllability.cli.main import main

TEXTS = ("--context", "Mia lives in Oslo .", "--query", "Where does Mia live ?", "--skip-sensitivity")
PATCH = ("patch", "embedded", *TEXTS)


def status_of(*arguments: Any) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as left:
        return int(left.code or 0)


def outcome(capsys: Any, *arguments: Any) -> tuple[int, Any, str, str]:
    """(exit status, the JSON that it printed or None, stdout, stderr)."""
    status = status_of(*arguments)
    out, err = capsys.readouterr()
    return status, json.loads(out) if out.startswith("{") else None, out, err


def one_line(err: bytes | str, *words: str) -> None:
    text = err.decode() if isinstance(err, bytes) else err
    assert text.startswith("controllability: "), text
    assert text.count("\n") == 1, text
    assert "internal error" not in text
    assert "Traceback" not in text
    for word in words:
        assert word in text, text
