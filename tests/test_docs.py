"""What the documents point at exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def table_rows():
    lines = (ROOT / "docs/papers.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row[0][:40])
def test_every_function_and_test_of_the_papers_table_exists(row):
    _, _, function, test = row
    module, _, name = function.strip("`").rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))
    file, name = test.strip("`").split("::")
    assert f"def {name}(" in (ROOT / file).read_text()


def test_links_of_the_documents_lead_somewhere():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)", document.read_text()):
            assert link.startswith("https://") or (document.parent / link).exists(), f"{document.name}: {link}"


def test_scripts_named_in_the_readme_exist():
    for script in set(re.findall(r"`(\w+\.py)`", (ROOT / "README.md").read_text())) - {"mine.py"}:
        assert (ROOT / script).is_file(), script
