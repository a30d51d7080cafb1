"""The zoo keeps its promises: small, repeatable, and every parameter has a part in the output."""

import pytest
import torch

from tests.channel_pruning.zoo import REFUSED, ZOO, call, first_sample, tensors

# Compares samples across the batch, so that a batch of one has another output by design.
ACROSS_THE_BATCH = {"contrastive"}


def made(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ZOO[name]()


def test_the_zoo_is_large_and_refusals_are_of_it():
    assert len(ZOO) >= 34
    assert set(REFUSED) < set(ZOO)
    assert all(make.__doc__ for make in ZOO.values())


@pytest.mark.parametrize("name", ZOO)
def test_it_is_small_trains_and_uses_every_parameter(name):
    model, example = made(name)
    assert model.training
    assert all(len(tensor) == 4 for tensor in tensors(example))
    assert 1_000 < sum(parameter.numel() for parameter in model.parameters()) < 200_000
    outputs = tensors(call(model, example))
    sum(output.square().mean() for output in outputs).backward()
    assert all(output.isfinite().all() for output in outputs)
    without = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {key for key, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("name", ZOO)
def test_the_same_seed_gives_the_same_model_and_input_which_gives_the_same_output_in_eval_mode(name):
    (model, example), (again, same_example) = made(name), made(name)
    model.eval()
    again.eval()
    with torch.no_grad():
        first = tensors(call(model, example))
        for outputs in (tensors(call(model, example)), tensors(call(again, same_example))):
            assert all(torch.equal(*pair) for pair in zip(first, outputs, strict=True))


@pytest.mark.parametrize("name", sorted(set(ZOO) - ACROSS_THE_BATCH))
def test_one_sample_gives_what_it_gives_in_a_batch(name):
    model, example = made(name)
    model.eval()
    with torch.no_grad():
        batch, alone = tensors(call(model, example)), tensors(call(model, first_sample(example)))
    for in_batch, output in zip(batch, alone, strict=True):
        torch.testing.assert_close(output, in_batch[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_layers_that_make_an_output_are_named_head(name):
    assert any(part.startswith("head") for key, _ in made(name)[0].named_modules() for part in key.split("."))
