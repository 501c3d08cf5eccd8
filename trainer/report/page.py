"""The HTML file of a report: template, style, script, plotly and the packed data in one file without links.

The page's Content-Security-Policy admits two scripts by their hashes, ours and plotly's, and no address at all: text of
a policy cannot run and nothing can be fetched. Text reaches the page in compressed chunks and as text nodes only.
"""

import base64
import gzip
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, select_autoescape

from rekatrain.data.errors import InputError
from rekatrain.trainer.report.rollouts import pack

SCRIPTS = ("base.js", "charts.js", "filters.js", "rollouts.js", "tables.js", "page.js")


def write_page(out: Path, title: str, content: Mapping[str, Any], chunks: Sequence[str]) -> None:
    """Write the file.

    content: what page.js draws, JSON values
    chunks:  packed texts (rollouts.py)
    """
    script = "\n".join(_asset(name) for name in SCRIPTS)
    plotly = _plotly()
    page = Environment(autoescape=select_autoescape(default=True)).from_string(_asset("page.html.jinja"))
    stream = page.stream(
        title=title,
        style=_asset("page.css"),
        script=script,
        script_hashes=[_hash(script), _hash(plotly)],
        packed=_packed(plotly, content, chunks),
    )
    with out.open("wb") as file:
        stream.dump(file, encoding="utf-8")


def _packed(plotly: str, content: Mapping[str, Any], chunks: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the id and the base64 of each block of data."""
    yield "plotly", base64.b64encode(gzip.compress(plotly.encode(), mtime=0)).decode("ascii")
    yield "content", pack(content)
    for index, chunk in enumerate(chunks):
        yield f"chunk-{index}", chunk


def _hash(script: str) -> str:
    """Return the hash by which a Content-Security-Policy admits an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (files(__package__) / "page" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """Return plotly.js, which comes with the Python package; raise InputError without the package."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("the report's charts need plotly: pip install 'rekatrain[report]'") from None
    script: str = get_plotlyjs()
    return script
