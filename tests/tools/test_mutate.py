"""Breaks are made where they should, drawn alike each time, and noticed by tests that look at the line."""

import sys
from collections import Counter

import pytest

from tests.tools import mutate

SOURCE = '''"""A file."""
LIMIT = 3 + 4

def middle(values: "int | str", low: int = 0) -> "int | None":
    """Not 1 + 1."""
    if not values or low < 2:
        raise ValueError(f"{low + 1} is too low")
    values.append(low)
    return min(values) - True
'''


def test_every_break_of_a_function_by_hand():
    found = {(one.line, one.operator, one.before, one.after) for one in mutate.mutations(SOURCE, "a.py")}
    assert found == {
        (6, "and/or", "not values or low < 2", "(not values and low < 2)"),
        (6, "drop not or minus", "not values", "(values)"),
        (6, "comparison", "low < 2", "(low >= 2)"),
        (6, "constant + 1", "2", "3"),
        (8, "delete statement", "values.append(low)", "pass"),
        (9, "return None", "return min(values) - True", "return None"),
        (9, "arithmetic", "min(values) - True", "(min(values) + True)"),
        (9, "swap function", "min(values)", "max(values)"),
        (9, "boolean", "True", "False"),
    }


def test_a_break_changes_its_line_only_also_behind_letters_of_several_bytes():
    source = "def f(x):\n    return 'µ' * 2 if x else 1\n"
    (broken,) = {one.apply(source) for one in mutate.mutations(source, "a.py") if one.before == "2"}
    assert broken == "def f(x):\n    return 'µ' * 3 if x else 1\n"


@pytest.fixture
def tree(tmp_path):
    """A package of two subpackages, one ten times the other, and a test of one function."""
    files = {
        "lightning_compress/__init__.py": "",
        "lightning_compress/nn/__init__.py": "",
        "lightning_compress/nn/few.py": "def less(x):\n    return x - 1\n",
        "lightning_compress/core/__init__.py": "",
        "lightning_compress/core/many.py": "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(10)),
        "tests/core/test_many.py": (
            "from lightning_compress.core.many import f0\n\ndef test_it():\n    assert f0(1) == 1\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\npythonpath = ['.']\n", encoding="utf-8")
    return tmp_path


def test_breaks_are_drawn_in_proportion_of_different_lines_and_alike_for_a_seed(tree):
    drawn = mutate.draw(tree, 6, seed=3)
    assert drawn == mutate.draw(tree, 6, seed=3) != mutate.draw(tree, 6, seed=4)
    assert Counter(mutate.subpackage(one.file) for one in drawn) == {"core": 5, "nn": 1}
    assert len({(one.file, one.line) for one in drawn}) == 6


def test_a_tested_line_is_killed_an_untested_one_survives_and_the_tree_is_mended(tree):
    path = tree / "lightning_compress/core/many.py"
    before = path.read_text(encoding="utf-8")
    tested, untested = (
        mutate.Mutation("core/many.py", line, 11, 16, "x", f"x + {line // 2 - 1}", "7") for line in (2, 4)
    )
    outcomes = [mutate.try_mutation(tree, sys.executable, mutation) for mutation in (tested, untested)]
    assert [outcome.result for outcome in outcomes] == ["killed", "survived"]
    assert "test_it" in outcomes[0].failed
    assert path.read_text(encoding="utf-8") == before
    assert mutate.summary(outcomes) == {"core": {"killed": 1, "survived": 1}, "all": {"killed": 1, "survived": 1}}


def test_tests_that_hang_are_a_timeout(tree):
    (tree / "tests/core/test_many.py").write_text(
        "import time\n\ndef test_it():\n    time.sleep(60)\n", encoding="utf-8"
    )
    mutation = mutate.Mutation("core/many.py", 2, 11, 16, "x", "x + 0", "7")
    assert mutate.try_mutation(tree, sys.executable, mutation, limit_s=3).result == "timeout"


def test_a_test_that_fails_without_the_break_proves_nothing(tree):
    (tree / "tests/core/test_many.py").write_text("def test_it():\n    assert False\n", encoding="utf-8")
    mutation = mutate.Mutation("core/many.py", 2, 11, 16, "x", "x + 0", "7")
    assert mutate.try_mutation(tree, sys.executable, mutation).result == "invalid"
