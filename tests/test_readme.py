"""What documents show runs: every Python block, every link, every example in a docstring."""

import doctest
import importlib
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def blocks(document: Path) -> list[str]:
    """The Python blocks of a document, at the lines where they stand."""
    text = document.read_text()
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda d: str(d.relative_to(ROOT)))
def test_python_blocks_run_in_order(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(document):
        exec(compile(block, document, "exec"), names)


def test_the_readme_example_is_short_and_attends(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = blocks(ROOT / "README.md")[0].strip()
    assert len([line for line in first.splitlines() if line]) <= 12
    names = {}
    exec(first, names)
    assert names["out"].shape == (1, 1024, 8, 64)
    assert 0.05 < float(names["mask"].density()) < 0.95
    assert "runs: xla" in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document):
    targets = [target for target in LINK.findall(document.read_text()) if "://" not in target]
    assert not [target for target in targets if not (document.parent / target).exists()]


def modules_with_examples() -> list[str]:
    """Names of modules, found by reading files: collecting tests must not import Flax."""
    found = []
    for folder, _, files in os.walk(ROOT / "fgattn_jax", followlinks=True):
        for path in (Path(folder) / name for name in files if name.endswith(".py")):
            if ">>> " in path.read_text():
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.append(name.removesuffix(".__init__"))
    return sorted(found)


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert failed == 0
    assert tried > 0
