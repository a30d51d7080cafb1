"""From outputs and batches to the tensors that losses compare."""

from collections import namedtuple

import pytest
import torch

from lightning_compress.distillation.batch_fields import detach_tensors, select_mask, select_target, select_tensor
from lightning_compress.distillation.step_output import gradient_cosine, loss_of, replace_loss

LOGITS, OTHER = torch.randn(2, 3), torch.randn(2)


class Output:
    logits = LOGITS


@pytest.mark.parametrize(
    "output",
    [LOGITS, Output(), {"logits": LOGITS, "loss": OTHER}, {"out": LOGITS}, (LOGITS, OTHER), [None, LOGITS],
     namedtuple("Named", "logits hidden")(LOGITS, OTHER)],
)  # fmt: skip
def test_the_logits_are_found(output):
    assert select_tensor(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "key"),
    [
        ({"aux": LOGITS, "out": OTHER}, "aux"),
        ((OTHER, LOGITS), 1),
        (Output(), "logits"),
        ([LOGITS], lambda out: out[0]),
    ],
)
def test_the_logits_may_be_named(output, key):
    assert select_tensor(output, key) is LOGITS


@pytest.mark.parametrize(
    ("output", "key"), [({"hidden": LOGITS}, None), ("text", None), ((LOGITS,), 3), (Output(), "no")]
)
def test_an_output_without_logits_is_refused_with_the_way_to_name_them(output, key):
    with pytest.raises(ValueError, match="output='logits', output=0"):
        select_tensor(output, key)


class Batch:
    y = OTHER


@pytest.mark.parametrize(
    ("batch", "key"),
    [((LOGITS, OTHER), None), ([LOGITS, OTHER], None), ({"x": LOGITS, "labels": OTHER}, None), (Batch(), None),
     ({"x": LOGITS, "mine": OTHER}, "mine"), ((LOGITS, None, OTHER), 2), ((LOGITS, OTHER), lambda batch: batch[1])],
)  # fmt: skip
def test_the_target_is_found(batch, key):
    assert select_target(batch, key) is OTHER


@pytest.mark.parametrize("batch", [LOGITS, (LOGITS,), {"x": LOGITS}, (LOGITS, "label")])
def test_a_batch_may_have_no_target(batch):
    assert select_target(batch) is None


def test_tokens_count_by_their_labels_shifted_or_not():
    labels = torch.tensor([[5, -100, 7], [8, 9, -100]])
    assert select_mask(LOGITS, labels).tolist() == [[True, False, True], [True, True, False]]
    # Of Hugging Face's, whose logits predict the next label.
    assert select_mask(Output(), labels).tolist() == [[False, True, False], [True, False, False]]
    assert select_mask(LOGITS, torch.tensor([1, 2])) is None


def test_a_loss_is_put_in_the_place_of_another():
    output = {"loss": OTHER, "shown": 3}
    assert loss_of(output) is OTHER
    assert replace_loss(output, LOGITS) == {"loss": LOGITS, "shown": 3}
    assert output["loss"] is OTHER
    assert replace_loss(OTHER, LOGITS) is LOGITS
    assert loss_of({"shown": 3}) is None
    with pytest.raises(ValueError, match="training_step returned str"):
        loss_of("loss")


def test_values_lose_their_gradients_at_any_depth():
    graph = torch.ones(2, requires_grad=True) * 2
    found = detach_tensors({"a": [graph, "word"], "b": (graph,)})
    assert not found["a"][0].requires_grad
    assert not found["b"][0].requires_grad
    assert found["a"][1] == "word"


def test_the_cosine_of_two_gradients():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    along, across = weight @ torch.tensor([3.0, 4.0]), weight @ torch.tensor([-4.0, 3.0])
    assert gradient_cosine(along, along * 7, [weight]) == pytest.approx(1.0)
    assert gradient_cosine(along, across, [weight]) == pytest.approx(0.0, abs=1e-7)
    assert gradient_cosine(along, -along, [weight]) == pytest.approx(-1.0)
    assert gradient_cosine(along, torch.tensor(1.0), [weight]) == 0.0
