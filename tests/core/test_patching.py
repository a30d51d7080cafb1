from contextlib import ExitStack

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
