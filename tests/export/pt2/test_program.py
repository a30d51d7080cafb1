"""What a program is exported from: examples of several forms, open and fixed batches; and what cannot be exported."""

import pytest
import torch
from torch import nn

from lightning_compress.export.pt2.write import write_pt2
from tests.export.deployables import Keywords, deployed, in_the_middle, loaded, random


@pytest.mark.parametrize(
    "example",
    [
        (random(4, 8), random(4, 4) > 0),
        {"values": random(4, 8), "mask": random(4, 4) > 0},
        {"mask": random(4, 4) > 0, "values": random(4, 8), "scale": 0.5},
        (random(4, 8), None, 0.5),
    ],
    ids=["tuple", "dict", "dict with a number", "tuple with None"],
)
def test_the_example_is_a_tensor_a_tuple_or_keywords(tmp_path, example):
    model = deployed(Keywords())
    write_pt2(model, tmp_path / "model.pt2", example)
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    assert torch.equal(loaded(tmp_path / "model.pt2")(*args, **kwargs), model.module(*args, **kwargs))


def test_an_example_of_one_row_leaves_the_batch_open(tmp_path):
    model = deployed(nn.Sequential(nn.Linear(8, 4)))
    write_pt2(model, tmp_path / "model.pt2", random(1, 8))
    assert loaded(tmp_path / "model.pt2")(random(5, 8)).shape == (5, 4)


def test_a_fixed_batch_takes_no_other(tmp_path):
    model = deployed(nn.Sequential(nn.Linear(8, 4)))
    write_pt2(model, tmp_path / "model.pt2", random(4, 8), dynamic_batch=False)
    program = loaded(tmp_path / "model.pt2")
    assert torch.equal(program(random(4, 8)), model.module(random(4, 8)))
    with pytest.raises(Exception, match="4"):
        program(random(5, 8))


@torch.library.custom_op("toy::unknown", mutates_args=())
def unknown(values: torch.Tensor) -> torch.Tensor:
    return values.clone()


@torch.library.custom_op("toy::known", mutates_args=())
def known(values: torch.Tensor) -> torch.Tensor:
    return values.clone()


known.register_fake(torch.empty_like)


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (
            lambda values: values if values.sum() > 0 else -values,
            r"in '1', test_program.py line \d+.*data-dependent.*torch.where",
        ),
        (lambda values: values[: int(values.sum() * 0 + 2)], "in '1'.*data-dependent.*torch.where"),
        (lambda values: values.view(4, -1), "specialized.*With a fixed batch it can be: give dynamic_batch=False"),
        (lambda values: torch.from_numpy(values.numpy()), r"in '1'.*\.numpy\(\).*Use operators"),
        (unknown, "in '1'.*toy::unknown.*Use operators"),
    ],
    ids=["branch", "slice", "batch", "numpy", "operator"],
)
def test_what_cannot_be_exported_is_named_and_nothing_is_written(tmp_path, compute, said):
    (tmp_path / "model.pt2").write_text("before")
    with pytest.raises(ValueError, match=f"(?s){said}"):
        write_pt2(in_the_middle(compute), tmp_path / "model.pt2", random(4, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "before"


def test_a_library_of_operators_is_named_in_the_report(tmp_path):
    assert write_pt2(in_the_middle(known), tmp_path / "model.pt2", random(4, 8)).libraries == ("toy",)


def test_a_batch_that_is_a_constant_can_be_written_as_such(tmp_path):
    model = in_the_middle(lambda values: values.view(4, -1))
    write_pt2(model, tmp_path / "model.pt2", random(4, 8), dynamic_batch=False)
    assert torch.equal(loaded(tmp_path / "model.pt2")(random(4, 8)), model.module(random(4, 8)))


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("images", "this str holds no tensor"),
        ((), "this tuple holds no tensor"),
        (random(4, 9), "cannot be called with this example_input"),
        ({"wrong": random(4, 8)}, "cannot be called with this example_input"),
    ],
    ids=["text", "nothing", "shape", "name"],
)
def test_an_example_that_does_not_fit_is_refused(tmp_path, example, said):
    with pytest.raises(ValueError, match=said):
        write_pt2(deployed(nn.Linear(8, 4)), tmp_path / "model.pt2", example)


def test_a_module_in_training_mode_is_refused(tmp_path):
    model = deployed(nn.Sequential(nn.Linear(8, 4), nn.Dropout()))
    model.module[1].train()
    with pytest.raises(ValueError, match=r"training mode, in '1' at least: call eval\(\)"):
        write_pt2(model, tmp_path / "model.pt2", random(4, 8))
