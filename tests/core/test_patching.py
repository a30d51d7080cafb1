"""One method of one object, changed and put back: nested, in any order, beside others who do the same."""

from contextlib import ExitStack
from functools import wraps
from inspect import signature
from itertools import permutations

import pytest
import torch
from torch import nn

from lightning_compress.core.patching import wrapped_method


class Greeter:
    def greet(self, name):
        return f"hello {name}"


def loud(greet, name):
    return greet(name).upper()


def twice(greet, name):
    return f"{greet(name)} {greet(name)}"


def test_wrappers_nest_and_end_in_any_order():
    greeter, first, second = Greeter(), ExitStack(), ExitStack()
    first.enter_context(wrapped_method(greeter, "greet", loud))
    second.enter_context(wrapped_method(greeter, "greet", twice))
    assert greeter.greet("you") == "HELLO YOU HELLO YOU"
    first.close()
    assert greeter.greet("you") == "hello you hello you"
    second.close()
    assert greeter.greet("you") == "hello you"
    assert "greet" not in vars(greeter)
    assert Greeter().greet("you") == "hello you"


def test_a_method_of_the_instance_comes_back():
    greeter = Greeter()
    own = greeter.greet = lambda name: f"hi {name}"
    with wrapped_method(greeter, "greet", loud):
        assert greeter.greet("you") == "HI YOU"
    assert vars(greeter)["greet"] is own


def test_a_method_that_somebody_replaced_meanwhile_is_theirs():
    greeter = Greeter()
    with wrapped_method(greeter, "greet", loud):
        theirs = greeter.greet = lambda name: f"hey {name}"
    assert vars(greeter)["greet"] is theirs


def test_it_ends_after_an_exception():
    greeter = Greeter()
    try:
        with wrapped_method(greeter, "greet", loud):
            raise RuntimeError
    except RuntimeError:
        assert "greet" not in vars(greeter)


def marked(text):
    """A wrapper that leaves its mark behind the others'."""
    return lambda greet, name: f"{greet(name)} {text}"


def test_every_order_of_ending_leaves_the_others_as_they_nest():
    for order in permutations(range(3)):
        greeter, stacks, open_ = Greeter(), [ExitStack() for _ in range(3)], [0, 1, 2]
        for number, stack in enumerate(stacks):
            stack.enter_context(wrapped_method(greeter, "greet", marked(number)))
        for number in order:
            assert greeter.greet("you") == " ".join(["hello you", *map(str, open_)])
            stacks[number].close()
            open_.remove(number)
        assert vars(greeter) == {}


def test_one_wrapper_may_be_used_twice():
    greeter, inner, middle, outer = Greeter(), ExitStack(), ExitStack(), ExitStack()
    same = marked("a")
    for stack, wrapper in ((inner, same), (middle, marked("b")), (outer, same)):
        stack.enter_context(wrapped_method(greeter, "greet", wrapper))
    assert greeter.greet("you") == "hello you a b a"
    outer.close()
    assert greeter.greet("you") == "hello you a b"
    inner.close()
    assert greeter.greet("you") == "hello you b"
    middle.close()
    assert vars(greeter) == {}


def test_what_others_have_put_over_ours_stays_and_works():
    greeter = Greeter()
    with ExitStack() as first:
        first.enter_context(wrapped_method(greeter, "greet", marked("ours")))
        ours = greeter.greet
        theirs = greeter.greet = wraps(ours)(lambda name: f"{ours(name)} theirs")  # takes our attributes along
        with wrapped_method(greeter, "greet", marked("again")):
            assert greeter.greet("you") == "hello you ours theirs again"
        assert vars(greeter)["greet"] is theirs
        assert greeter.greet("you") == "hello you ours theirs"
    assert vars(greeter)["greet"] is theirs
    assert greeter.greet("you") == "hello you theirs"


def test_a_wrapper_decides_whether_and_with_what_the_method_is_called():
    greeter = Greeter()
    with wrapped_method(greeter, "greet", lambda greet, name: None):
        assert greeter.greet("you") is None
    with wrapped_method(greeter, "greet", lambda greet, *args, **kwargs: greet("them")):
        assert greeter.greet(name="you") == "hello them"


def test_other_objects_the_class_and_the_signature_stay_as_they_are():
    greeter, other = Greeter(), Greeter()
    before = Greeter.greet
    with wrapped_method(greeter, "greet", loud):
        assert other.greet("you") == "hello you"
        assert Greeter.greet is before
        assert list(signature(greeter.greet).parameters) == ["name"]
        assert greeter.greet.__name__ == "greet"


def test_a_method_of_a_torch_module_is_wrapped_too():
    layer = nn.Linear(2, 2)
    inputs = torch.ones(1, 2)
    with wrapped_method(layer, "forward", lambda forward, inputs: forward(inputs) * 0):
        assert (layer(inputs) == 0).all()
    assert (layer(inputs) != 0).any()
    assert "forward" not in vars(layer)


def test_a_name_that_is_no_method_is_refused_and_nothing_is_left_behind():
    greeter = Greeter()
    with pytest.raises(AttributeError, match="great"), wrapped_method(greeter, "great", loud):
        pass
    assert vars(greeter) == {}
