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


def run_block(block: str, document: Path, names: dict) -> None:
    exec(compile(block, document, "exec"), names)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_readme_blocks_run_in_order(empty_folder, capsys):
    readme = ROOT / "README.md"
    first, *others = blocks(readme)
    assert len([line for line in first.splitlines() if line]) <= 12, "the first example is twelve lines"
    names = {}
    run_block(first, readme, names)
    assert names["out"].shape == (1, 1024, 8, 64)
    assert 0.05 < float(names["mask"].density()) < 0.95
    assert "runs: xla" in capsys.readouterr().out
    assert len(others) >= 3
    for block in others:
        run_block(block, readme, names)
    assert int(names["sparse_fn"].num_refreshes[...]) == 1
    assert 0.0 < float(abs(names["sparse"] - names["dense"]).max()) < 0.2


OTHERS = [
    pytest.param(document, marks=pytest.mark.slow if document.name == "video_models.md" else ())
    for document in DOCUMENTS
    if document.name != "README.md" and blocks(document)
]


@pytest.mark.parametrize("document", OTHERS, ids=lambda d: str(d.relative_to(ROOT)))
def test_blocks_of_other_documents_run_in_order(document, empty_folder):
    names = {}
    for block in blocks(document):
        run_block(block, document, names)


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
def test_docstring_examples_run(name, empty_folder):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert failed == 0
    assert tried > 0
