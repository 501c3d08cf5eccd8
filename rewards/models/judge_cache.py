"""Verdicts that have been paid for: in memory, or in an SQLite file that outlives the run and serves all processes."""

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from rekatrain.data.errors import InputError


class JudgeCache:
    """Request -> the judge's reply. Keys are hashes of the whole request, which holds no key of an endpoint."""

    def __init__(self, path: str | None) -> None:
        """`path` None keeps replies in memory, until the run ends."""
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Processes of a launch write at the same time; each waits for the other.
            self._rows = sqlite3.connect(path or ":memory:", timeout=30, isolation_level=None)
            self._rows.execute("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"the judge's cache {path!r} cannot be used: {error}") from error

    def get(self, url: str, body: dict[str, Any]) -> str | None:  # Any: a JSON value
        """The reply to a request that has been answered before."""
        row = self._rows.execute("SELECT reply FROM replies WHERE request = ?", (_key(url, body),)).fetchone()
        return row[0] if row else None

    def put(self, url: str, body: dict[str, Any], reply: str) -> None:  # Any: a JSON value
        """Keep a reply."""
        self._rows.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (_key(url, body), reply))


def _key(url: str, body: dict[str, Any]) -> str:  # Any: a JSON value
    return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()
