"""Several processes, one model: two that talk over gloo, and what needs no second one."""

import json
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_compress.core.distributed import (
    all_ranks_equal,
    all_reduce_sum_,
    broadcast_,
    is_distributed,
    tensor_hash,
)
from lightning_compress.pruning.functional.criteria import magnitude, wanda
from lightning_compress.pruning.functional.distributions import global_, uniform
from lightning_compress.pruning.pruner import Pruner
from tests.pruning.layers_of import layers_of
from tests.warm import FORKS, free_port


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))


def by_chance(weight):
    """Scores that differ by rank."""
    return torch.rand(weight.shape)


def seen_by(rank):
    """All that one rank finds out, as plain values."""
    magnitudes = Pruner(layers_of(network()), magnitude, global_)
    cpu, one = torch.device("cpu"), torch.full((2, 3), float(rank))
    seen = {"several": is_distributed()}
    seen["agree"] = [
        all_ranks_equal(7, cpu),
        all_ranks_equal(rank, cpu),
        all_ranks_equal(-rank, cpu),
        all_ranks_equal(2**63 - 1, cpu),
        all_ranks_equal(2**62 + rank, cpu),
    ]
    total = [one.clone(), one[0] + 1]
    all_reduce_sum_(total)
    seen["summed"] = [value.tolist() for value in total]
    broadcast_([one])
    seen["first"] = one.tolist()

    gathered = Pruner(layers_of(network(), targets="0"), wanda, uniform).statistics
    gathered.squares = {"0.weight": torch.full((1, 6), rank + 1.0).square().sum(0)}
    gathered.all_reduce()
    seen["norms"] = gathered.squares["0.weight"].tolist()

    model = network()
    torch.manual_seed(rank)
    differing = Pruner(layers_of(model), by_chance, uniform)
    seen["agreed"] = [differing.update(0.5), magnitudes.update(0.5)]
    seen["masks"] = tensor_hash(differing.masked.masks.values())
    seen["weights"] = tensor_hash(model.parameters())
    seen["zeros"] = [int((layer.weight == 0).sum()) for layer in model]
    return seen


def work(rank, port, folder):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timeout=timedelta(seconds=120), rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(seen_by(rank)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    port = free_port()
    ranks = [FORKS.Process(target=work, args=(rank, port, folder), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.ddp
def test_ranks_know_whether_they_agree(two_ranks):
    for seen in two_ranks:
        assert seen["several"]
        assert seen["agree"] == [True, False, False, True, False]


@pytest.mark.ddp
def test_tensors_are_summed_or_taken_from_the_first_rank(two_ranks):
    for seen in two_ranks:
        assert seen["summed"] == [[[1.0] * 3] * 2, [3.0] * 3]
        assert seen["first"] == [[0.0] * 3] * 2


@pytest.mark.ddp
def test_input_norms_are_of_what_all_ranks_saw(two_ranks):
    assert [seen["norms"] for seen in two_ranks] == [[5.0] * 6] * 2  # 1 ** 2 + 2 ** 2


@pytest.mark.ddp
def test_masks_that_differ_become_those_of_the_first_rank(two_ranks):
    first, second = two_ranks
    assert first["agreed"] == second["agreed"] == [False, True]
    assert (first["masks"], first["weights"], first["zeros"]) == (second["masks"], second["weights"], second["zeros"])
    assert first["zeros"] == [24, 16]


def test_a_process_alone_is_not_several():
    assert not is_distributed()


def test_a_digest_tells_bytes_and_their_order_apart():
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor(3.0), torch.ones(3, dtype=torch.bfloat16), torch.ones(0)]
    whole = tensor_hash(tensors)
    assert 0 <= whole < 2**63
    assert tensor_hash([one.clone() for one in tensors]) == whole
    assert tensor_hash(iter(tensors)) == whole
    assert tensor_hash(tensors[::-1]) != whole
    for index in range(3):
        changed = [one.clone() for one in tensors]
        changed[index].view(-1)[-1] += 1
        assert tensor_hash(changed) != whole


def test_a_digest_is_of_the_values_and_not_of_the_memory():
    matrix = torch.arange(6.0).view(2, 3)
    assert tensor_hash([matrix.t()]) == tensor_hash([matrix.t().contiguous()]) != tensor_hash([matrix])
    assert tensor_hash([nn.Parameter(matrix)]) == tensor_hash([matrix])
    assert tensor_hash([matrix.bool()]) == tensor_hash([matrix != 0])
