"""What the documents say is true of the files: links, names of functions, tests and options, and every command line.

    python tests/test_docs.py            # lists all command lines, and what is wrong with each

A command line is `python SCRIPT.py ...` in a code block or between backticks, in README.md, docs/*.md and the scripts'
docstrings, and all that `make` would run. Its script must exist and its options must be those of the script's Config;
nothing is run. Where a value is left open (`...`) only the names of the options are checked. What is marked with the
commit OLD shows how a number was made there, and is left alone: a line, a block whose first line names it, and a span
between backticks that follows it.
"""

import ast
import contextlib
import dataclasses
import dis
import functools
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [path for pattern in ("*.py", "tools/*.py", "tests/*.py") for path in sorted(ROOT.glob(pattern))]
SCRIPTS.remove(Path(__file__).resolve())
OLD = "2b243d5"
YOURS = {"mine.py", "hinge.py"}  # files that the reader writes


# ---------------------------------------------------------------------------------------------------- names and links


def listed(heading: str) -> set[str]:
    """The names in the first column of the list that a comment of gpt.py has under this heading."""
    _, text = (ROOT / "gpt.py").read_text().split(f"# {heading}", 1)
    rows = re.findall(r"^#   (\w.*?)   ", text.split("\n#\n", 1)[1].split("\n\n", 1)[0], re.M)
    return {name for row in rows for name in re.findall(r"\w+", re.sub(r"\(.*", "", row))}


def part_one() -> tuple[str, set[str]]:
    """The text of Part I of gpt.py, and the names that Parts II and III define."""
    text = (ROOT / "gpt.py").read_text()
    first = text[: text.index("# Part II. ")]
    return first, defined(text) - defined(first)


def defined(text: str) -> set[str]:
    return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def global_names(code) -> set[str]:
    """The globals that a code object reads, and those that the functions inside it read."""
    inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
    names = {x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*map(global_names, inner))


def test_the_lists_of_what_is_called_of_parts_two_and_three_are_whole():
    first, later = part_one()
    assert listed("What Part I calls and Part III defines") == global_names(compile(first, "gpt.py", "exec")) & later
    trees = [ast.walk(ast.parse((ROOT / f"{name}.py").read_text())) for name in ("sft", "reward", "ppo", "dpo")]
    attributes = [node for tree in trees for node in tree if isinstance(node, ast.Attribute)]
    called = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "gpt"}
    assert listed("What sft.py, reward.py, ppo.py and dpo.py call of Parts II and III") == called & later


def load(script: Path):
    if str(script.parent) not in sys.path:
        sys.path.append(str(script.parent))
    return importlib.import_module(script.stem)


def table_rows():
    lines = (ROOT / "docs/papers.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row[0][:40])
def test_every_function_and_test_of_the_papers_table_exists(row):
    _, _, function, test = row
    module, name = function.strip("`").split(".")
    script = next((path for path in SCRIPTS if path.stem == module), ROOT / f"{module}.py")
    assert callable(getattr(load(script), name))
    file, name = test.strip("`").split("::")
    assert f"def {name}(" in (ROOT / file).read_text()


def test_every_cell_of_the_table_of_models_is_a_case_of_its_columns_test():
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    lines = [line for line in (ROOT / "docs/formats.md").read_text().splitlines() if line.startswith("| ")]
    tests = {name: re.search(r"`(\S+)::(\w+)`", rest) for name, rest in map(cells, lines[11:16])}
    (_, *columns), *rows = map(cells, lines[:10])
    for column, test in tests.items():
        text = (ROOT / test[1]).read_text() + (ROOT / "tests/golden_chat.py").read_text() * ("chat" in test[1])
        assert f"def {test[2]}(" in text
        for row in rows:
            for case in re.findall(r"`(\w+)`", row[1 + columns.index(column)]):
                assert f'"{case}"' in text, f"{row[0]}, {column}: {case}"


def anchors(document: Path) -> set[str]:
    """What GitHub makes of a document's headings: lower case, without punctuation, blanks as hyphens."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_documents_lead_somewhere():
    for document in DOCUMENTS:
        for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", document.read_text()):
            if not link.startswith("https://"):
                target = document.parent / link if link else document
                assert target.exists(), f"{document.name}: {link}"
                assert not anchor or anchor in anchors(target), f"{document.name}: {link}#{anchor}"


def test_scripts_named_in_the_documents_exist():
    for document in DOCUMENTS:
        for script in set(re.findall(r"`((?:\w+/)?\w+\.py)`", document.read_text())) - YOURS:
            assert (ROOT / script).is_file(), f"{document.name}: {script}"


def spans(text: str):
    """What stands between backticks in a document's prose, but for what is marked as old."""
    for before, span in re.findall(r"([^`]*)`([^`]+)`", split(text)[1]):
        if OLD not in " ".join(before.split())[-30:]:
            yield " ".join(span.split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_functions_named_in_the_documents_exist(document):
    stems = {path.stem: path for path in SCRIPTS if path.parent != ROOT / "tests"}
    for span in spans(document.read_text()):
        found = re.match(r"(\w+)\.([A-Za-z_]\w*)(\(.*\))?$", span)
        if found and found[1] in stems and found[2] not in ("py", "jsonl"):
            assert hasattr(load(stems[found[1]]), found[2]), f"{document.name}: {span}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_options_named_in_the_documents_exist(document):
    """Also those that stand alone, without a script."""
    for span in spans(document.read_text()):
        for option in re.findall(r"--[a-z][\w-]*", span) if span[:2] == "--" else ():
            assert option in all_options() | ELSEWHERE, f"{document.name}: {option} in {span}"


ELSEWHERE = {"--ntasks-per-node"}  # options of other programs


@functools.cache
def all_options() -> set[str]:
    """Those of the scripts that have a Config, and of tests/load.py."""
    configs = [config for path in SCRIPTS if (config := config_of(str(path.relative_to(ROOT))))]
    fields = [field.name for config in configs for field in dataclasses.fields(config)]
    fields += ["no_" + name for name in fields]
    return {f"--{name}".replace("_", "-") for name in fields} | {"--help"}


def test_the_readme_has_two_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


# ---------------------------------------------------------------------------------------------------- command lines


def commands(shell: str):
    """(script, arguments) of each `python SCRIPT.py ...` in lines of a shell; of a loop, with its first value."""
    for line in shell.replace("\\\n", " ").splitlines():
        if not re.search(r"python\S* +\S+\.py", line) or OLD in line:
            continue
        for name, value in re.findall(r"for (\w+) in ([^\s;]+)", line):
            line = line.replace(f"${name}", value)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)  # comments are left out
        lexer.whitespace_split = True
        tokens = list(lexer)
        for i, token in enumerate(tokens):
            if "python " in token:  # a command for another shell, quoted
                yield from commands(token)
            elif re.search(r"(^|/)python3?$", token) and tokens[i + 1 :][:1] and tokens[i + 1].endswith(".py"):
                yield (
                    tokens[i + 1],
                    list(itertools.takewhile(lambda t: not t or not set(t) <= set("();<>|&"), tokens[i + 2 :])),
                )


def split(text: str) -> tuple[list[str], str]:
    """The code blocks of markdown or of a docstring, fenced or indented by four blanks, and the prose around them.
    A list after `command:`, as Kubernetes has it, becomes a line."""
    text = re.sub(r"command: \[(.*?)\]", lambda found: " ".join(found[1].replace(",", " ").split()), text, flags=re.S)
    blocks = []
    for pattern in (r"(?ms)^```\w*\n(.*?)^```", r"(?m)((?:^    .*\n)+)"):
        blocks += re.findall(pattern, text)
        text = re.sub(pattern, "", text)
    return blocks, text


def of_document(text: str):
    """(script, arguments, whole) of a document's commands; between backticks `sft.py --init` need not be whole."""
    blocks, prose = split(text)
    for block in blocks:
        if OLD not in block.splitlines()[0]:
            yield from ((*command, True) for command in commands(block))
    for before, span in re.findall(r"([^`]*)`([^`]+)`", prose):
        before, span = " ".join(before.split()), " ".join(span.split())
        if OLD in before[-30:]:
            continue
        yield from ((*command, True) for command in commands(span))
        if re.match(r"(\w+/)?\w+\.py --", span):
            script, *arguments = shlex.split(span)
            yield script, arguments, False


def of_make():
    """All that the Makefile's targets would run, as make writes it out."""
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    shown = subprocess.run(
        ["make", "--dry-run", *targets], cwd=ROOT, env=alone, capture_output=True, text=True, check=True
    )
    return [(*command, True) for command in commands(shown.stdout)]


@functools.cache
def config_of(script: str):
    """A script's Config; None where it has none."""
    path = ROOT / script
    return load(path).Config if re.search("^class Config", path.read_text(), re.M) else None


def complaint(script: str, arguments: list[str], whole: bool) -> str:
    """What is wrong with a command line: nothing, or why it would not start."""
    if script in YOURS:
        return ""
    if not (ROOT / script).is_file():
        return f"no script {script}"
    if "none" in arguments:
        return "what is absent is spelt None"
    config = config_of(script)
    if config is None:
        return ""
    if "..." in arguments or not whole:
        names = {f"--{field.name}".replace("_", "-") for field in dataclasses.fields(config)} | {"--help"}
        options = [re.sub("^--no-", "--", argument.split("=")[0]) for argument in arguments if argument[:2] == "--"]
        return ", ".join(f"no option {option}" for option in options if option not in names)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            tyro.cli(config, prog=script, args=arguments)
        except SystemExit as stop:
            return said.getvalue() if stop.code else ""
    return ""


def complaints(found) -> list[str]:
    found = [(*command, complaint(*command)) for command in found]
    for script, arguments, whole, wrong in found:
        mark = "WRONG" if wrong else "names" if "..." in arguments or not whole else "whole"
        print(f"{mark}  {shlex.join([script, *arguments])}")
    return [f"{shlex.join([script, *arguments])}\n{wrong}" for script, arguments, _, wrong in found if wrong]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_command_lines_of_the_documents_can_be_parsed(path):
    wrong = complaints(of_document(path.read_text()))
    assert not wrong, "\n\n".join(wrong)


def test_command_lines_of_the_docstrings_can_be_parsed():
    wrong = complaints(command for path in SCRIPTS for command in of_document(docstring(path)))
    assert not wrong, "\n\n".join(wrong)


def docstring(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text()), clean=False) or "") + "\n"


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_command_lines_of_the_makefile_can_be_parsed():
    found = of_make()
    assert len(found) > 20
    wrong = complaints(found)
    assert not wrong, "\n\n".join(wrong)


def test_a_wrong_command_line_is_found():
    found = list(of_document(EXAMPLE))
    assert [bool(complaint(*command)) for command in found] == [True, True, False, False, True, True, False]
    assert found[2][:2] == ("sft.py", ["--lr", "1"])


EXAMPLE = f"""
```
python sft.py --lr 1e-3 --no-such 1    # an option that there is not
python gone.py
for b in 1 2; do python sft.py --lr $b & done
python reward.py --suffix "" --lr 1e-5; echo
python sft.py --gone 1    # at {OLD}
```

    python sft.py --init none

`sft.py --steeps` is none, `sft.py --steps` is, and at {OLD} `sft.py --gone` was.
"""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    found = [(path.name, list(of_document(path.read_text()))) for path in DOCUMENTS]
    found += [(path.name, list(of_document(docstring(path)))) for path in SCRIPTS] + [("Makefile", of_make())]
    wrong = []
    for name, lines in found:
        if lines:
            print(f"\n{name}")
            wrong += complaints(lines)
    print("", f"{len(wrong)} command lines are wrong", *wrong, sep="\n")
    sys.exit(bool(wrong))
