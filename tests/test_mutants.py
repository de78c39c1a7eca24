"""The tool that breaks the program does so, and in a way that is Python."""

import ast

import pytest

from tests.support.mutants import PACKAGE, ROOT, mutants, sampled

MODULES = {path.stem: path.read_bytes() for path in (ROOT / PACKAGE).glob("[a-z]*.py")}


@pytest.mark.parametrize(
    ("source", "mutated"),
    [
        ("a < b", {"a <= b"}),
        ("a is not b", {"a is b"}),
        ("a not in b", {"a in b"}),
        ("a and b and c", {"a or b and c"}),
        ("a + b", {"a - b"}),
        ("é = 7", {"é = 8"}),
        ("x = True", {"x = False"}),
        ("x = not a", {"x = bool(a)"}),
        ("f(x)", {"pass"}),
        ("x += 1", {"x += 2", "pass"}),
        ("if a:\n    raise b", {"if (not (a)):\n    raise b", "if a:\n    pass"}),
        ("def f():\n    return a", {"def f():\n    return None"}),
        ("def f():\n    return None", set()),
        ("while a:\n    break", {"while (not (a)):\n    break", "while a:\n    continue"}),
        ('"""Text."""\nx = f"{a:>10}"', set()),
    ],
)
def test_each_kind_of_change_is_made(source: str, mutated: set[str]) -> None:
    found = mutants("m", source.encode())
    assert {mutant.applied(source.encode()).decode() for mutant in found} == mutated


def test_mutants_of_the_program_are_other_valid_programs() -> None:
    for module, source in MODULES.items():
        original = ast.dump(ast.parse(source))
        for mutant in mutants(module, source)[::70]:
            assert ast.dump(ast.parse(mutant.applied(source))) != original, mutant


def test_a_sample_is_the_same_for_the_same_seed_and_takes_from_every_module() -> None:
    found = {module: mutants(module, source) for module, source in MODULES.items()}
    sample = sampled(found, 60, 1)
    assert sample == sampled(found, 60, 1) != sampled(found, 60, 2)
    assert len(set(sample)) == 60
    assert {mutant.module for mutant in sample} == {module for module in found if found[module]}
