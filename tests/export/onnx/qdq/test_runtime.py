import numpy
import pytest
import torch

from lightning_compress.export.onnx.qdq.runtime import as_arrays, relative_difference, run_session
from tests.export.qdq.graphs import model, node, session


def arrays(*values):
    return [numpy.array(value, dtype=numpy.float32) for value in values]


def test_differences_are_shares_of_the_largest_size():
    assert relative_difference(*arrays([1.0, -4.0], [1.0, -4.0])) == 0.0
    assert relative_difference(*arrays([1.0, -4.0], [1.1, -4.0])) == pytest.approx(0.1 / 4.0)
    assert relative_difference(*arrays([numpy.nan, 2.0, numpy.inf], [numpy.nan, 2.0, numpy.inf])) == 0.0
    assert relative_difference(*arrays([1.0], [numpy.nan])) == numpy.inf
    assert relative_difference(*arrays([numpy.nan], [1.0])) == numpy.inf
    assert relative_difference(*arrays([numpy.inf], [1.0])) == numpy.inf
    assert relative_difference(*arrays([[1.0]], [1.0])) == numpy.inf
    assert relative_difference(numpy.array([1, 2, 3, 4]), numpy.array([1, 2, 3, 5])) == 0.25


def test_inputs_go_by_keyword_or_in_their_order():
    made = model([node("Sub", ["a", "b"], "y")], {}, {"a": ["n"], "b": ["n"]})
    one, two = torch.tensor([5.0]), torch.tensor([3.0])
    for example in ((one, two), (one, [two]), {"b": two, "a": one}, {"pair": (one, two)}):
        assert run_session(session(made), example)["y"].tolist() == [2.0]
    with pytest.raises(ValueError, match=r"takes a, b, but the input is tensor\(1,\)"):
        run_session(session(made), one)


def test_outputs_are_the_tensors_of_any_nest():
    nest = {"a": torch.ones(1), "b": [torch.zeros(2), None, (torch.ones(3), 4)]}
    assert [one.shape for one in as_arrays(nest)] == [(1,), (2,), (3,)]
