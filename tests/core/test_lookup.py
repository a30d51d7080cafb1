import math

import pytest

from lightning_compress.core.lookup import call_with_needs, choices, find, near_miss, needs, restricted_imports
from lightning_compress.pruning import criteria, distributions


def test_a_modules_own_public_functions_are_its_registry():
    assert set(choices(criteria)) == {"magnitude", "random", "gradient", "taylor", "movement", "wanda"}
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
        (3, "3 is no name"),
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

    assert needs(function) == {"weight"}
    assert call_with_needs(function, weight=1, grad=3, other=5) == (1, 3, 2)
    assert near_miss("weigth", ["weight", "grad"]) == " Did you mean 'weight'?"
    assert near_miss("x", ["weight"]) == ""
