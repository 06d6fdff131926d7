"""Tables as aligned text and as Markdown; data rows as JSON lists of flat objects."""

import datetime
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""One measurement: names to numbers, texts, booleans or None."""


def format_text(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table of aligned columns for a terminal; texts to the left, all else to the right.

    Raises:
        ValueError: A line has another number of cells than the header.
    """
    cells = _cells(header, lines)
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    texts = [all(isinstance(line[column], str) for line in lines) for column in range(len(header))]
    rendered = [
        "  ".join(
            text.ljust(width) if left else text.rjust(width)
            for text, width, left in zip(line, widths, texts, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([rendered[0], "  ".join("-" * width for width in widths), *rendered[1:]])


def format_markdown(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """The table in Markdown.

    Raises:
        ValueError: A line has another number of cells than the header.
    """
    cells = _cells(header, lines)
    texts = [all(isinstance(line[column], str) for line in lines) for column in range(len(header))]
    rule = ["---" if left else "---:" for left in texts]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


def _cells(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> list[list[str]]:
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"expected {len(header)} cells per line as in the header, got {len(line)}: {list(line)}")
    return [list(header), *([_text(cell) for cell in line] for line in lines)]


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def read_rows(path: Path) -> list[Row]:
    """Read data rows; an absent file holds none.

    Raises:
        ValueError: The file is no JSON list of objects.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected data rows (a JSON list of objects) in {str(path)!r}, got: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"expected data rows in {str(path)!r}, a JSON list of objects; got another JSON value")
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write data rows, one per line, so that changes show line by line; the file is replaced in one move."""
    write_text(path, format_rows(rows) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one move: it holds the old text or the new one, whenever somebody reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as a JSON list with one row per line."""
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    return f"[\n{lines}\n]" if rows else "[]"


def provenance(command: str) -> Mapping[str, str]:
    """Where rows come from: `device`, `jax`, `python`, `commit`, `date` (UTC) and the given `command`.

    Asks JAX for its first device. The commit is "unknown" outside a git checkout and ends in "+" if tracked files
    were changed.
    """
    import jax

    device = jax.devices()[0]
    name = f"{platform.machine()} CPU" if device.platform == "cpu" else device.device_kind
    return {
        "device": name,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
    }


def commit() -> str:
    """Short commit of the checkout that this file belongs to, with "+" if tracked files changed; else "unknown"."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
