import functools
import hashlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.distillation.cache.sample_keys import sample_keys, teacher_fingerprint

DTYPES = [
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.bool,
]


def samples(shape, dtype=torch.float32, seed=0):
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key_by_hand(row):
    """The key of one tensor without a batch around it, in Python's unbounded integers."""
    whole = 1 << 64

    def mixed(number):
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % whole
        number = (number ^ number >> 27) * 0x94D049BB133111EB % whole
        return number ^ number >> 31

    content = row.numpy().tobytes()
    content += bytes(-len(content) % 8)
    described = repr(("", str(row.dtype), tuple(row.shape)))
    total = int.from_bytes(hashlib.sha256(described.encode()).digest()[:8], "little")
    for index, word in enumerate(np.frombuffer(content, "<u8").tolist()):
        weight = mixed((index + 1) * 0x9E3779B97F4A7C15 % whole) | 1
        product = word * weight % whole
        total += (product ^ product >> 47) * weight
    key = mixed(total % whole)
    return key - whole if key >= whole // 2 else key


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4)])
def test_keys_are_those_of_the_definition_in_unbounded_integers(shape):
    batch = torch.randn(6, *shape, generator=torch.Generator().manual_seed(1))
    assert sample_keys(batch).tolist() == [key_by_hand(row) for row in batch]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(12, 3), (12, 2, 4), (12,), (12, 1, 3, 7)])
def test_a_sample_has_the_same_key_in_every_batch(shape, dtype):
    batch = samples(shape, dtype)
    keys = sample_keys(batch)
    assert keys.dtype == torch.int64
    assert keys.shape == (12,)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(sample_keys(batch[order]), keys[order])
    assert torch.equal(sample_keys(batch[5:6]), keys[5:6])
    assert torch.equal(torch.cat([sample_keys(part) for part in batch.split(5)]), keys)


def test_how_a_tensor_lies_in_memory_does_not_matter():
    images = samples((4, 3, 6, 6))
    assert torch.equal(sample_keys(images.contiguous(memory_format=torch.channels_last)), sample_keys(images))
    shifted = torch.zeros(4 * 108 + 1)[1:].view(4, 3, 6, 6).copy_(images)
    assert torch.equal(sample_keys(shifted), sample_keys(images))
    assert torch.equal(sample_keys(images.clone().requires_grad_()), sample_keys(images))
    part = samples((3, 5))[:1, :4]
    assert torch.equal(sample_keys(part), sample_keys(part.clone(memory_format=torch.contiguous_format)))


def test_many_rows_are_hashed_in_parts_with_the_same_outcome(monkeypatch):
    batch = samples((9, 10))
    expected = sample_keys(batch)
    monkeypatch.setattr("lightning_compress.distillation.cache.sample_keys.CHUNK_WORDS", 11)
    assert torch.equal(sample_keys(batch), expected)


def test_every_flipped_bit_gives_another_key():
    sample = samples((6,), torch.int32)
    flipped = sample.repeat(192, 1)
    for index in range(192):
        flipped[index, index // 32] ^= (1 << index % 32) - (1 << 32 if index % 32 == 31 else 0)
    keys = sample_keys(torch.cat([sample[None], flipped]))
    assert len(keys.unique()) == 193


def test_signs_flipped_in_pairs_do_not_cancel():
    # Each is half of the range of its word, so any weighted sum of the words alone loses them in pairs.
    count = 64
    flipped = torch.ones(count * (count - 1) // 2, count)
    for row, (first, second) in zip(flipped, torch.combinations(torch.arange(count)), strict=True):
        row[first], row[second] = -1.0, -1.0
    keys = sample_keys(torch.cat([torch.ones(1, count), flipped, torch.ones(count, count) - 2 * torch.eye(count)]))
    assert len(keys.unique()) == len(keys)


def test_keys_are_spread_over_all_64_bits():
    keys = sample_keys(torch.arange(4096))
    for bit in range(64):
        assert 0.45 < float((keys >> bit & 1).float().mean()) < 0.55


def test_order_type_and_shape_within_a_sample_count():
    row = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    others = [
        row.flip(1),
        row.view(1, 2, 2),
        row.view(torch.int32),
        row.to(torch.float64),
        torch.cat([row, torch.zeros(1, 1)], 1),
        {"image": row},
        (row, row),
        (row[:, :2], row[:, 2:]),
    ]
    assert len({int(sample_keys(one)) for one in [row, *others]}) == 1 + len(others)


def test_nested_inputs_count_in_all_their_tensors():
    ids, mask = samples((5, 4), torch.int64, 1), samples((5, 4), torch.bool, 2)
    keys = sample_keys({"ids": ids, "more": [mask, ("text", 3)]})
    assert torch.equal(sample_keys({"more": (mask, ["other"]), "ids": ids}), keys)
    changed = mask.clone()
    changed[2, 1] ^= True
    same = sample_keys({"ids": ids, "more": [changed]}) == keys
    assert same.tolist() == [True, True, False, True, True]


def test_two_inputs_that_change_places_are_another_sample():
    one, other = samples((5, 4), seed=1), samples((5, 4), seed=2)
    assert not (sample_keys((one, other)) == sample_keys((other, one))).any()


def test_an_empty_batch_has_no_keys():
    assert sample_keys(torch.zeros(0, 3)).shape == (0,)
    assert sample_keys(torch.zeros(2, 0)).shape == (2,)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["text", 3], "no tensor"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}, "{'/a': 2, '/b': 3}"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.eye(3).to_sparse(), "sparse"),
    ],
)
def test_inputs_without_one_row_per_sample_are_refused(inputs, words):
    with pytest.raises(ValueError, match=words):
        sample_keys(inputs)


def test_no_random_stream_is_touched():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    sample_keys(torch.ones(2, 1 << 17))  # longer than any other here: its weights are made now
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_keys_and_fingerprints_are_the_same_on_a_gpu():
    for inputs in (samples((64, 3, 32, 32)), samples((7, 5), torch.bfloat16), samples((9,), torch.uint8)):
        keys = sample_keys(inputs.cuda())
        assert keys.is_cuda
        assert torch.equal(keys.cpu(), sample_keys(inputs))
    net = teacher()
    assert teacher_fingerprint(net) == teacher_fingerprint(net.cuda())


def teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())


def test_a_fingerprint_is_of_the_weights_and_buffers_and_classes():
    changes = {
        "weight": lambda net: net[0].weight.data[0, 0].mul_(-1),
        "buffer": lambda net: net[1].running_mean.add_(1),
        "type": lambda net: net[0].bfloat16(),
        "shape": lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.data.view(3, 4))),
        "name": lambda net: net.add_module("3", net._modules.pop("2")),
        "class": lambda net: net.__setitem__(2, nn.GELU()),
    }
    prints = {teacher_fingerprint(teacher())}
    assert prints == {teacher_fingerprint(teacher().eval())}
    for change in changes.values():
        net = teacher()
        change(net)
        prints.add(teacher_fingerprint(net))
    assert len(prints) == 1 + len(changes)
    assert all(len(one) == 64 and int(one, 16) for one in prints)


def test_a_fingerprint_of_a_function_is_of_its_code_and_what_it_sees():
    def around(net, scale):
        return lambda x: net(x) * scale

    def with_default(x, scale=2):
        return x * scale

    def with_other_default(x, scale=3):
        return x * scale

    with_other_default.__qualname__ = with_default.__qualname__
    other = teacher()
    other[0].bias.data += 1
    assert teacher_fingerprint(around(teacher(), 2)) == teacher_fingerprint(around(teacher(), 2))
    prints = [
        teacher_fingerprint(around(teacher(), 2)),
        teacher_fingerprint(around(teacher(), 3)),
        teacher_fingerprint(around(other, 2)),
        teacher_fingerprint(with_default),
        teacher_fingerprint(with_other_default),
        teacher_fingerprint(lambda x: x * 2),
        teacher_fingerprint(lambda x: x * 3),
        teacher_fingerprint(lambda x: x.relu()),
        teacher_fingerprint(lambda x: x.tanh()),
        teacher_fingerprint(teacher().forward),
        teacher_fingerprint(other.forward),
    ]
    assert len(set(prints)) == len(prints)


def test_a_callable_without_code_has_no_fingerprint():
    with pytest.raises(ValueError, match=r"functools.partial.*Write a function around it"):
        teacher_fingerprint(functools.partial(torch.relu))
