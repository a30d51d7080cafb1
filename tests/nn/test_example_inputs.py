from collections import namedtuple

import pytest
import torch

from lightning_compress.nn.example_inputs import (
    batch_size,
    call_model,
    check_example,
    copy_example,
    describe_shapes,
    resize_batch,
)

Pair = namedtuple("Pair", ["left", "right"])


def test_samples_are_repeated_or_cut_and_others_stay():
    x, mask = torch.arange(6.0).reshape(3, 2), torch.ones(7, 7)
    batch = resize_batch({"x": x, "more": (mask, [x], "word", None)}, 4)
    assert batch["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert torch.equal(batch["more"][0], mask)
    assert batch["more"][1][0].shape == (4, 2)
    assert batch["more"][2:] == ("word", None)
    assert resize_batch(x, 1).tolist() == [[0, 1]]


def test_another_dimension_can_be_the_batch():
    assert resize_batch(torch.zeros(5, 2, 3), 7, batch_dim=1).shape == (5, 7, 3)
    assert batch_size((torch.tensor(1), torch.zeros(4)), 0) == 4


def test_named_tuples_stay_named():
    assert resize_batch(Pair(torch.zeros(2, 1), 5), 3).left.shape == (3, 1)


@pytest.mark.parametrize("example", [torch.tensor(1.0), "no tensor", torch.zeros(0, 3)])
def test_an_input_without_samples_is_refused(example):
    with pytest.raises(ValueError, match="no sample along dimension 0"):
        resize_batch(example, 2)


def test_a_copy_is_another_memory():
    x = torch.ones(2)
    copy_example([x])[0].zero_()
    resize_batch(x, 2).zero_()
    assert x.tolist() == [1, 1]


def test_a_model_is_called_as_the_user_would():
    def model(*args, **kwargs):
        return args, kwargs

    assert call_model(model, (1, 2)) == ((1, 2), {})
    assert call_model(model, {"a": 1}) == ((), {"a": 1})
    assert call_model(model, [1, 2]) == (([1, 2],), {})
    assert call_model(model, Pair(1, 2)) == ((Pair(1, 2),), {})


def test_shapes_are_told_instead_of_values():
    assert describe_shapes((torch.zeros(2, 3), {"a": 1})) == "(tensor(2, 3), {'a': 1})"


@pytest.mark.parametrize("example", [torch.zeros(2).numpy(), "words", {"x": 3}, [None], ()], ids=repr)
def test_an_example_without_tensors_is_refused_with_its_type(example):
    with pytest.raises(ValueError, match=f"a tensor, a tuple .* but this {type(example).__name__} holds no tensor"):
        check_example(example)
    check_example({"x": (3, [torch.zeros(2)])})
