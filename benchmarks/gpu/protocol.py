"""How the run and its workers talk: one JSON object per line, arrays as files.

A request names what to `do` ("hello", "prepare", "plan", "time", "device_time", "release", "quit"); the answer holds
`ok`, and `error` where that is false.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.inputs import CaseFiles

Message = dict[str, Any]


def encode(message: Message) -> str:
    """One line of text, with its end."""
    return json.dumps(message, allow_nan=False) + "\n"


def decode(line: str) -> Message:
    """The message of a line.

    Raises:
        ValueError: The line is no JSON object.
    """
    try:
        message = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object in a line, got {line[:200]!r}") from error
    if not isinstance(message, dict):
        raise ValueError(f"expected a JSON object in a line, got {line[:200]!r}")
    return message


def prepare_message(contestant: str, case: GpuCase, files: CaseFiles) -> Message:
    """The request to make a contestant ready for a case and to return a first result."""
    fields = dataclasses.asdict(case) | {"bars": {}}
    return {
        "do": "prepare",
        "contestant": contestant,
        "case": fields,
        "files": {
            "folder": str(files.folder),
            "arrays": files.arrays,
            "density": files.density,
            "queries": list(files.queries),
        },
    }


def read_prepare(message: Message) -> tuple[str, GpuCase, CaseFiles]:
    """Contestant, case and files of a `prepare_message`."""
    fields = message["case"] | {"contestants": tuple(message["case"]["contestants"])}
    fields["grid"] = None if fields["grid"] is None else tuple(fields["grid"])
    files = message["files"]
    return (
        message["contestant"],
        GpuCase(**fields),
        CaseFiles(Path(files["folder"]), files["arrays"], files["density"], tuple(files["queries"])),
    )
