"""Masks beside the model: what they zero, how they are stored, and which they refuse."""

from io import BytesIO

import pytest
import torch
from torch import nn

from lightning_compress.pruning.masks import MaskedParameters, pack_mask, unpack_mask


def drawn(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def masked_network(dtype=torch.float32):
    """Two weights with masks, the second one in convolution's shape, and one without."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Conv2d(2, 3, 3), "free": nn.Linear(3, 3)}).to(dtype)
    masked = MaskedParameters({f"{name}.weight": layer.weight for name, layer in model.items()})
    for name in ("a.weight", "b.weight"):
        masked.set(name, drawn(masked.parameters[name].shape))
    return model, masked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_is_pruned_is_zero_and_the_rest_untouched(dtype):
    model, masked = masked_network(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masked.apply()
    for name, value in model.state_dict().items():
        mask = masked.masks[name].bool() if name in masked.masks else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value, torch.where(mask, before[name], 0.0))
        assert value.dtype == dtype
    assert list(model.state_dict()) == list(before)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_without_masks_nothing_happens():
    layer = nn.Linear(3, 2)
    masked = MaskedParameters({"weight": layer.weight})
    before = layer.weight.detach().clone()
    masked.apply()
    masked.apply_to_gradients()
    masked.apply_to_state([torch.optim.SGD(layer.parameters())])
    assert torch.equal(layer.weight, before)
    assert (masked.sparsity, masked.state_dict()) == (0.0, {})


def test_gradients_of_what_is_pruned_are_zero_where_there_are_gradients():
    model, masked = masked_network()
    (model["a"](torch.ones(4, 5)).sum() + model["free"](torch.ones(4, 3)).sum()).backward()
    masked.apply_to_gradients()
    assert torch.equal(model["a"].weight.grad, 4.0 * masked.masks["a.weight"])
    assert torch.equal(model["free"].weight.grad, torch.full((3, 3), 4.0))
    assert model["b"].weight.grad is None


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
        lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.9, centered=True),
        lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    ],
    ids=["sgd", "adamw", "rmsprop", "adafactor"],
)
def test_moments_of_what_is_pruned_are_zero_and_the_rest_untouched(optimizer):
    model, masked = masked_network()
    made = optimizer(model.parameters())
    loss = model["a"](torch.ones(4, 5)).sum() + model["b"](torch.ones(1, 2, 4, 4)).sum() + model["free"].weight.sum()
    loss.backward()
    made.step()
    before = {
        (name, key): value.clone()
        for name, parameter in masked.parameters.items()
        for key, value in made.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }
    masked.apply_to_state([made])
    for (name, key), value in before.items():
        mask = masked.masks.get(name)
        expected = value * mask if mask is not None and value.shape == mask.shape else value
        assert torch.equal(made.state[masked.parameters[name]][key], expected), (name, key)


def test_an_average_of_another_type_is_zeroed_by_name():
    _, masked = masked_network()
    average = {"a.weight": torch.ones(3, 5, dtype=torch.float64), "unknown": torch.ones(2)}
    masked.apply_to(average)
    assert torch.equal(average["a.weight"] != 0, masked.masks["a.weight"] != 0)
    assert average["a.weight"].dtype == torch.float64
    assert (average["unknown"] == 1).all()


def test_sparsity_counts_masks_and_sparsities_count_zeros():
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0, 2.0, -0.0], [3.0, 4.0, 5.0, 6.0]]))
    masked = MaskedParameters({"weight": layer.weight})
    masked.set("weight", torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]))
    assert masked.sparsity == 1 / 8
    assert masked.sparsities() == {"weight": 2 / 8}
    masked.apply()
    assert masked.sparsities() == {"weight": 3 / 8}


@pytest.mark.parametrize(
    "shape", [(0,), (1,), (7,), (8,), (9,), (3, 5), (4, 4), (2, 3, 3, 3), (1, 0, 3), (1000,)], ids=str
)
def test_packing_there_and_back_is_no_change(shape):
    for dtype in (torch.bool, torch.float32, torch.bfloat16):
        mask = drawn(shape)
        packed = pack_mask(mask.to(dtype))
        assert packed.dtype == torch.uint8
        assert packed.numel() == -(-mask.numel() // 8)
        assert torch.equal(unpack_mask(packed, mask.shape), mask)


def test_packing_by_hand():
    # Eight to a byte, the first one lowest: 1 + 4 + 128, then 2.
    assert pack_mask(torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 0, 1]])).tolist() == [133, 2]
    assert unpack_mask(torch.tensor([133, 2], dtype=torch.uint8), torch.Size([2, 5])).int().tolist() == [
        [1, 0, 1, 0, 0], [0, 0, 1, 0, 1],
    ]  # fmt: skip
    transposed = torch.tensor([[1, 0], [0, 1], [1, 1]]).t()  # in the order of the indices: 1 0 1 0 1 1
    assert pack_mask(transposed).tolist() == [1 + 4 + 16 + 32]


def test_what_is_saved_is_read_without_trust_and_comes_back():
    _, masked = masked_network()
    file = BytesIO()
    torch.save(masked.state_dict(), file)
    file.seek(0)
    _, again = masked_network(torch.bfloat16)
    again.masks = {}
    again.load_state_dict(torch.load(file, weights_only=True))
    assert list(again.masks) == ["a.weight", "b.weight"]
    for name, mask in again.masks.items():
        assert torch.equal(mask.bool(), masked.masks[name].bool())
        assert mask.dtype == torch.bfloat16


def bits(count, dtype=torch.uint8):
    return torch.zeros(count, dtype=dtype)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"c": {"shape": [5, 3], "bits": bits(2)}}, "mask for 'c', which is not pruned here. Resume with.* a, b"),
        ({"a": {"shape": [3, 5], "bits": bits(2)}}, r"'a' has shape \[3, 5\] in 2 bytes, but .* shape \[5, 3\]"),
        ({"a": {"shape": [5, 3], "bits": bits(3)}}, r"in 3 bytes, but the weight has shape \[5, 3\]"),
        ({"a": {"shape": [5, 3], "bits": bits(2, torch.float32)}}, "'a' is damaged"),
        ({"a": {"shape": [5, 3]}}, "'a' is damaged"),
        ({"a": {"bits": bits(2)}}, "'a' is damaged"),
        ({"a": torch.ones(5, 3)}, "'a' is damaged"),
        ({"a": None}, "'a' is damaged"),
        ([], "masks are damaged.*list"),
    ],
)
def test_foreign_and_damaged_masks_are_refused_and_those_there_kept(state, message):
    masked = MaskedParameters({"a": nn.Parameter(torch.ones(5, 3)), "b": nn.Parameter(torch.ones(2, 2))})
    masked.set("a", torch.ones(5, 3))
    with pytest.raises(ValueError, match=message):
        masked.load_state_dict(state)
    assert masked.sparsity == 0.0
    assert list(masked.masks) == ["a"]


def test_a_run_that_had_not_begun_to_prune_has_no_masks():
    masked = MaskedParameters({"a": nn.Parameter(torch.ones(5, 3))})
    masked.set("a", torch.zeros(5, 3))
    masked.load_state_dict({})
    assert masked.masks == {}
