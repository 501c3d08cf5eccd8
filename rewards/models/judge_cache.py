"""A cache of the judge's replies: in memory, or in an SQLite file that outlives the run and serves all processes."""

import hashlib
import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

from rekatrain.data.errors import InputError

logger = logging.getLogger(__name__)

CREATE_TABLE = "CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT NOT NULL)"


class JudgeCache:
    """Maps a request to the judge's reply. Its keys are hashes of whole requests, which hold no API key."""

    def __init__(self, path: str | None) -> None:
        """Open the file at `path`, or keep replies in memory if it is None."""
        self._path, self._has_warned = path, False
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Processes of a launch write at the same time; each waits for the other.
            self._connection = sqlite3.connect(path or ":memory:", timeout=30, isolation_level=None)
            self._connection.execute(CREATE_TABLE)
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"the judge's cache {path!r} cannot be used: {error}") from error

    def get(self, url: str, body: dict[str, Any]) -> Any:  # a JSON value in, whatever the file holds out
        """Return the cached reply to a request; None if there is none, or if the file cannot be read now."""
        try:
            rows = self._connection.execute("SELECT reply FROM replies WHERE request = ?", (_key(url, body),))
            entry = rows.fetchone()
        except sqlite3.Error as error:
            self._warn(error)
            return None
        return entry[0] if entry else None

    def put(self, url: str, body: dict[str, Any], reply: str) -> None:  # Any: a JSON value
        """Keep a reply, if the file can be written now: without it, the request is sent again another time."""
        try:
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (_key(url, body), reply))
        except sqlite3.Error as error:
            self._warn(error)

    def _warn(self, error: sqlite3.Error) -> None:
        if not self._has_warned:
            logger.warning("the judge's cache %s cannot be used for some replies: %s", self._path, error)
            self._has_warned = True


def _key(url: str, body: dict[str, Any]) -> str:  # Any: a JSON value
    return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()
