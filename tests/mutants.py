"""Do the tests notice when one line is wrong? mutants.txt has plausible mistakes, and the tests that should find each.

    python tests/mutants.py                    # all of them, on a copy of this tree: a quarter of an hour on two cores
    python tests/mutants.py --only ppo.py      # those of one file, or whose line holds this text
    python tests/mutants.py --list

Each mutant is one line in another's place, in a temporary copy of the tree, with the tests concerned run until the
first failure. A mutant that no test fails on has survived: it is printed, and the exit code is 1. The same tests must
pass on the copy as it is, or they would prove nothing. Results are kept in --results, under a hash of the mutant, the
scripts and its tests: a run that was stopped goes on, and several runs may share the file. Not a part of the suite,
which only checks that every mutant still applies (test_mutants.py).
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".txt")


class Mutant(NamedTuple):
    file: str
    line: str  # as it stands in the file, without its indentation
    instead: str
    tests: str  # arguments of pytest, within tests/
    equal: str | None = None


def read_mutants(path: Path = LIST) -> list[Mutant]:
    """Blocks of lines, with an empty line between:

    FILE: arguments of pytest
    - the line as it stands there
    + what is put in its place
    = why no test can tell the two apart (only where that is shown)
    """
    mutants = []
    for block in path.read_text().strip().split("\n\n"):
        head, line, instead, *equal = block.splitlines()
        if line[:2] != "- " or instead[:2] not in ("+ ", "+") or any(x[:2] != "= " for x in equal):
            raise ValueError(f"{path}: not a mutant:\n{block}")
        file, tests = head.split(": ", 1)
        mutants.append(Mutant(file, line[2:], instead[2:], tests, *(x[2:] for x in equal)))
    return mutants


MUTANTS = read_mutants()


# ---------------------------------------------------------------------------------------------------- how they are made


def mutate(source: str, mutant: Mutant) -> str:
    """The source with the mutant's line in the place of the one line that it names; ValueError if there is not one."""
    lines = source.splitlines()
    at = [i for i, line in enumerate(lines) if line.strip() == mutant.line]
    if len(at) != 1:
        raise ValueError(
            f"{mutant.file}: {len(at)} lines are {mutant.line!r}, and one should be: mend tests/mutants.txt"
        )
    line = lines[at[0]]
    lines[at[0]] = line[: len(line) - len(line.lstrip())] + mutant.instead
    return "\n".join(lines) + "\n"


def copy_tree(to: Path):
    """What git tracks, and new files, as they stand."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run_tests(tree: Path, tests: str, limit: float = 600) -> str:
    """passed, failed or hung; an error that is none of the tests' stops everything."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--durations=0",
        *shlex.split(tests),
    ]
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree / "tests", env=variables, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return "hung"
    # 1: tests failed, 2: an import failed, 3, 4: pytest itself, 5: no test has such a name
    if done.returncode not in (0, 1, 2):
        raise SystemExit(f"pytest {tests} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return "failed" if done.returncode else "passed"


def fingerprint(tree: Path, tests: str, *more: str) -> str:
    """Of what decides a result: the scripts and the file of the tests."""
    files = [*sorted(tree.glob("*.py")), tree / "tests" / tests.split()[0]]
    sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hashlib.sha256(json.dumps([tests, more, sources]).encode()).hexdigest()[:16]


class Results:
    """Lines {"key", "result"} of a file that several runs may write."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def find(self, key: str) -> str | None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return next((row["result"] for row in map(json.loads, lines) if row["key"] == key), None)

    def get(self, key: str, compute) -> str:
        result = self.find(key)
        if result is None:
            result = compute()
            with open(self.path, "a") as file:  # one write of one short line
                file.write(json.dumps({"key": key, "result": result}) + "\n")
        return result


def try_mutant(mutant: Mutant, tree: Path, results: Results) -> str:
    """killed, or survived."""
    before = results.get(fingerprint(tree, mutant.tests), lambda: run_tests(tree, mutant.tests))
    if before != "passed":
        raise SystemExit(f"pytest {mutant.tests} fails without any mutant")
    file, key = tree / mutant.file, fingerprint(tree, mutant.tests, *mutant[:3])
    source = file.read_text()

    def compute():
        file.write_text(mutate(source, mutant))
        try:
            return "survived" if run_tests(tree, mutant.tests) == "passed" else "killed"
        finally:
            file.write_text(source)

    return results.get(key, compute)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants of this file, or whose line holds this text")
    parser.add_argument("--results", type=Path, default=ROOT / "out/mutants.jsonl", help="what is known already")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    mutants = [m for m in MUTANTS if options.only in (m.file, "") or options.only in m.line]
    survivors, results, start = [], Results(options.results), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        if not options.list:
            copy_tree(tree)
        for mutant in mutants:
            result = "listed" if options.list else try_mutant(mutant, tree, results)
            equal = result == "survived" and mutant.equal
            print(
                f"{'equal' if equal else result:9} {mutant.file:12} {mutant.line[:80]}  ->  {mutant.instead[:60]}",
                flush=True,
            )
            if result == "survived" and not mutant.equal:
                survivors.append(mutant)
    took = time.perf_counter() - start
    print(f"{len(mutants)} mutants, {len(survivors)} survived, {took:.0f} s")
    if survivors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
