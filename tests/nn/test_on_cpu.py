"""A module is on the CPU for a moment, and back afterwards."""

from torch import nn

from lightning_compress.nn.on_cpu import on_cpu


def test_what_lies_on_the_cpu_stays_there():
    model = nn.Linear(2, 3)
    before = model.weight.data_ptr()
    with on_cpu(model):
        assert model.weight.data_ptr() == before
    assert model.weight.data_ptr() == before
