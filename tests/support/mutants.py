"""Break the program in small ways, one at a time, and see whether the tests notice.

Usage: python -m tests.support.mutants [--seed=1] [--count=60] [--only=api,config] [--workers=2] [--process]

A mutant is tried on the tests that import its module first, then on the rest of the quick half, with `--process` on the
tests that start processes as well. Prints each one that no test noticed; exits with 1 when less than 90 % were.
"""

import argparse
import ast
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from tests.support.commands import output

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "creatify_exporter"
DEMANDED = 0.9
_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "in": "not in", "not in": "in"}
_COMPARISONS |= {"is": "is not", "is not": "is"}
_OPERATORS: dict[type[ast.operator], tuple[str, str]] = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/")}
_OPERATORS |= {ast.FloorDiv: ("//", "*"), ast.BitOr: ("|", "&")}


@dataclass(frozen=True)
class Mutant:
    """One change of a module: what is between two offsets, in bytes, becomes something else."""

    module: str
    line: int
    start: int
    end: int
    text: str

    def applied(self, source: bytes) -> bytes:
        """Return the source with the change made."""
        return source[: self.start] + self.text.encode() + source[self.end :]


class _Finder:
    def __init__(self, module: str, source: bytes) -> None:
        self.module, self.source = module, source
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self.lines[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.lines[node.end_lineno - 1] + node.end_col_offset

    def instead(self, node: ast.expr | ast.stmt, text: str) -> Mutant:
        return Mutant(self.module, node.lineno, self.start(node), self.end(node), text)

    def between(self, left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[Mutant]:
        start, end = self.end(left), self.start(right)
        gap = self.source[start:end].decode()
        if (at := gap.find(old)) >= 0:
            yield Mutant(self.module, left.lineno, start, end, gap[:at] + new + gap[at + len(old) :])

    def of(self, node: ast.AST) -> Iterator[Mutant]:
        """Yield the mutants of one node."""
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            (operator,) = node.ops
            old = ast.unparse(ast.Compare(ast.Name("a"), [operator], [ast.Name("b")]))[2:-2]
            yield from self.between(node.left, node.comparators[0], old, _COMPARISONS[old])
        elif isinstance(node, ast.BoolOp):
            words = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield from self.between(node.values[0], node.values[1], *words)
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            yield from self.between(node.left, node.right, *_OPERATORS[type(node.op)])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield self.instead(node, f"bool({ast.unparse(node.operand)})")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield self.instead(node, str(not node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield self.instead(node, repr(node.value + 1))
        elif isinstance(node, ast.stmt):
            yield from self.of_statement(node)

    def of_statement(self, node: ast.stmt) -> Iterator[Mutant]:
        if isinstance(node, ast.If | ast.While):
            yield self.instead_of_test(node.test)
        elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
            yield self.instead(node, "return None")
        elif isinstance(node, ast.Raise | ast.AugAssign) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await)
        ):
            yield self.instead(node, "pass")
        elif isinstance(node, ast.Break | ast.Continue):
            yield self.instead(node, "continue" if isinstance(node, ast.Break) else "break")

    def instead_of_test(self, test: ast.expr) -> Mutant:
        return self.instead(test, f"(not ({ast.unparse(test)}))")


def mutants(module: str, source: bytes) -> list[Mutant]:
    """Return every mutant of a module, in the order of its lines."""
    finder, tree = _Finder(module, source), ast.parse(source)
    # What is inside an f-string has no offsets of its own before Python 3.12.
    formatted = [ast.walk(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    left_out = {id(node) for nodes in formatted for node in nodes}
    found = [mutant for node in ast.walk(tree) if id(node) not in left_out for mutant in finder.of(node)]
    return sorted(set(found), key=lambda mutant: (mutant.line, mutant.start, mutant.text))


def sampled(found: dict[str, list[Mutant]], count: int, seed: int) -> list[Mutant]:
    """Return a sample with about as many mutants of each module; the same for the same seed."""
    queues = [random.Random(f"{seed} {module}").sample(all_of, len(all_of)) for module, all_of in sorted(found.items())]
    turns = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return turns[:count]


class Workshop:
    """A copy of the work tree in which mutants are tried."""

    def __init__(self, directory: Path, markers: str) -> None:
        self.directory, self.markers = directory, markers
        for path in output("git", "ls-files", cwd=ROOT).splitlines():
            if (ROOT / path).is_file():
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / path, directory / path)

    def passes(self, tests: Sequence[str], timeout: float) -> bool:
        """Tell whether tests pass in time."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        try:
            ended = subprocess.run(
                [*command, "-m", self.markers, *tests],
                cwd=self.directory,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return ended.returncode in {0, 5}  # 5: none was selected

    def survives(self, mutant: Mutant, timeout: float) -> bool:
        """Tell whether no test notices a mutant."""
        path = self.directory / PACKAGE / f"{mutant.module}.py"
        source = path.read_bytes()
        path.write_bytes(mutant.applied(source))
        try:
            near, far = self.tests_of(mutant.module)
            return self.passes(near, timeout) and self.passes(far, timeout)
        finally:
            path.write_bytes(source)

    def tests_of(self, module: str) -> tuple[list[str], list[str]]:
        """Return the test files that import a module, and the others."""
        near: list[str] = []
        far: list[str] = []
        for path in sorted(self.directory.glob("tests/test_*.py")):
            text = path.read_text(encoding="utf-8")
            imported = f"{PACKAGE}.{module} import" in text or path.stem == f"test_{module}"
            (near if imported else far).append(str(path.relative_to(self.directory)))
        return near, far


def main(arguments: Sequence[str] | None = None) -> int:
    """Try a sample of mutants; return the exit code."""
    parser = argparse.ArgumentParser(prog="make mutants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--only", default="", help="modules, with commas between")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which a mutant counts as noticed")
    parser.add_argument("--process", action="store_true", help="run the tests that start processes as well")
    flags = parser.parse_args(arguments)
    only = set(filter(None, flags.only.split(",")))
    sources = {path.stem: path.read_bytes() for path in sorted((ROOT / PACKAGE).glob("[a-z]*.py"))}
    found = {module: mutants(module, source) for module, source in sources.items() if not only or module in only}
    sample = sampled(found, flags.count, flags.seed)
    markers = "not image and not soak" if flags.process else "not process"
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(flags.workers) as pool:
        free: Queue[Workshop] = Queue()
        for number in range(flags.workers):
            free.put(Workshop(Path(directory) / str(number), markers))
        if not free.queue[0].passes(["tests"], flags.timeout):
            print("the tests fail without any mutant", file=sys.stderr)
            return 1

        def survives(mutant: Mutant) -> bool:
            workshop = free.get()
            try:
                survived = workshop.survives(mutant, flags.timeout)
            finally:
                free.put(workshop)
            if survived:
                source = sources[mutant.module]
                old = source[mutant.start : mutant.end].decode()
                print(f"{PACKAGE}/{mutant.module}.py:{mutant.line}: {old!r} -> {mutant.text!r}", flush=True)
            return survived

        survived = list(pool.map(survives, sample))
    of_module = Counter(mutant.module for mutant in sample)
    alive = Counter(mutant.module for mutant, lives in zip(sample, survived, strict=True) if lives)
    for module, tried in sorted(of_module.items()):
        print(f"{module:12} {tried - alive[module]:3} of {tried:3} noticed")
    noticed = 1 - sum(survived) / max(len(sample), 1)
    print(f"{noticed:.0%} of {len(sample)} mutants noticed, of {sum(map(len, found.values()))} possible")
    return 0 if noticed >= DEMANDED else 1


if __name__ == "__main__":
    sys.exit(main())
