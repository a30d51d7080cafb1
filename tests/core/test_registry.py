"""A module's public names are the registry: what is found, what is refused, what is allowed."""

import math
import sys
from functools import wraps
from types import ModuleType

import pytest

from lightning_compress.core.registry import (
    call_with_supported_args,
    find,
    near_miss,
    registered,
    required_args,
    restricted_imports,
)
from lightning_compress.pruning.functional import criteria, distributions


def test_a_modules_own_public_functions_are_its_registry():
    assert set(registered(criteria)) == {"magnitude", "random", "gradient", "taylor", "movement", "wanda"}
    assert find("global", distributions) is distributions.global_


def test_functions_are_found_by_name_path_or_themselves():
    assert find("magnitude", criteria) is criteria.magnitude
    assert find("math.sqrt", criteria) is math.sqrt
    assert find(math.sqrt, criteria) is math.sqrt


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magnitud", "Did you mean 'magnitude'. Choose one of"),
        ("math.nothing", "'math.nothing' cannot be imported"),
        ("no_such_package.f", "cannot be imported"),
        ("math.pi", "is a float, but must be callable"),
        ("", "No '' in"),
        (".", "'.' cannot be imported"),
        (".relative", "'.relative' cannot be imported"),
        ("..relative.path", "cannot be imported"),
        ("math.", "'math.' cannot be imported"),
        (".criteria.magnitude", "'.criteria.magnitude' cannot be imported"),
        ("_hidden", "No '_hidden' in"),
        ("torch", "No 'torch' in"),
        ("Tensor", "No 'Tensor' in"),
        (3, "3 is no name"),
        (None, "None is no name"),
    ],
)
def test_what_is_not_there_is_said_in_words(name, message):
    with pytest.raises(ValueError, match=message):
        find(name, criteria)


def test_a_file_decides_nothing_that_is_not_allowed():
    with restricted_imports(["math.s*"]):
        assert find("math.sqrt", criteria) is math.sqrt
        assert find("taylor", criteria) is criteria.taylor
        with pytest.raises(ValueError, match=r"'os.system' is not allowed here.*allow=\['os.system'\]"):
            find("os.system", criteria)
    assert callable(find("os.getcwd", criteria))


def test_a_function_gets_what_it_names():
    def function(weight, grad=None, *, scale=2):
        return weight, grad, scale

    assert required_args(function) == {"weight"}
    assert call_with_supported_args(function, weight=1, grad=3, other=5) == (1, 3, 2)
    assert near_miss("weigth", ["weight", "grad"]) == " Did you mean 'weight'?"
    assert near_miss("x", ["weight"]) == ""


def test_classes_are_named_in_snake_case_and_what_is_imported_or_private_is_not_offered():
    module = ModuleType("some_module")

    class TwoWords:
        pass

    class Word:
        pass

    def own(): ...
    def global_(): ...
    def _private(): ...

    for member in (TwoWords, Word, own, global_, _private):
        member.__module__ = "some_module"
        setattr(module, member.__name__, member)
    module.sqrt, module.wraps, module.number = math.sqrt, wraps, 3
    assert registered(module) == {"two_words": TwoWords, "word": Word, "own": own, "global": global_}
    assert find("two_words", module) is TwoWords


def test_what_is_allowed_is_so_only_within_the_context_and_the_inner_one_counts():
    with restricted_imports(["math.*"]):
        with restricted_imports([]), pytest.raises(ValueError, match="not allowed"):
            find("math.sqrt", criteria)
        assert find("math.sqrt", criteria) is math.sqrt
    with pytest.raises(KeyError), restricted_imports([]):
        raise KeyError
    assert find("math.sqrt", criteria) is math.sqrt


def test_what_is_not_allowed_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "module_with_a_trap.py").write_text("def function(): ...\nraise SystemExit('the trap')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with restricted_imports(["math.*", "*.module"]), pytest.raises(ValueError, match="not allowed"):
        find("module_with_a_trap.function", criteria)
    assert "module_with_a_trap" not in sys.modules


OWN_MODULE = """
from functools import partial
from math import sqrt
from shutil import rmtree
from torch import abs

def by_size(weight): ...

class Score:
    def __call__(self, weight): ...
    def method(self, weight): ...

short, score, method = lambda weight: 1, Score(), Score().method
bound, upper, append = partial(by_size), str.upper, [].append
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "lookup_own.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "lookup_own"
    sys.modules.pop("lookup_own", None)


@pytest.mark.parametrize("name", ["by_size", "Score", "short", "score", "method"])
def test_a_wildcard_lets_in_what_is_written_there(own_module, name):
    with restricted_imports([f"{own_module}.*"]):
        assert callable(find(f"{own_module}.{name}", criteria))


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("rmtree", "shutil.rmtree"),
        ("sqrt", "math.sqrt"),
        ("abs", "torch.[^']*abs"),
        ("bound", "functools.partial"),
        ("upper", "builtins.str.upper"),
        ("append", "builtins.list.append"),
    ],
)
def test_a_wildcard_does_not_let_in_what_a_module_has_from_elsewhere(own_module, name, home):
    path = f"{own_module}.{name}"
    with (
        restricted_imports([f"{own_module}.*"]),
        pytest.raises(ValueError, match=rf"'{path}' is '{home}', which is not allowed.*allow=\['{path}'\]"),
    ):
        find(path, criteria)
    with restricted_imports([f"{own_module}.*", path]):
        assert callable(find(path, criteria))
    with restricted_imports([f"{own_module}.*", "*.*"]):
        assert callable(find(path, criteria))
    assert callable(find(path, criteria))


def test_a_name_with_a_default_is_given_if_offered_and_not_needed():
    assert required_args(lambda: None) == set()
    assert required_args(lambda weight, grad, scale=1: None) == {"weight", "grad"}
    assert call_with_supported_args(lambda scale=1: scale) == 1
    with pytest.raises(TypeError, match="weight"):
        call_with_supported_args(lambda weight: weight, grad=1)
