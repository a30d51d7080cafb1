"""Whole branches of residual sums leave: which may, what their layers become, and a run in which some do."""

import pytest
import torch
from torch import nn

from lightning_compress import ChannelPruning, Pruning, QuantizationAwareTraining, load_compressed
from lightning_compress.channel_pruning.dependency.graph import build_dependency_graph
from lightning_compress.channel_pruning.dependency.removable_blocks import mark_removable
from lightning_compress.nn.empty_layers import EMPTY, layer_class_for_size
from tests.contract.test_contract import same, saver


class Branch(nn.Module):
    def __init__(self, width=6, groups=1):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, width, 3, padding=1, groups=groups), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, 4, 3, padding=1, groups=groups), nn.BatchNorm2d(4)

    def forward(self, features):
        return self.norm2(self.conv2(self.norm1(self.conv1(features)).relu()))


class Net(nn.Module):
    """Sums of a stem (or of nothing) and branches."""

    def __init__(self, *branches, stem=True):
        super().__init__()
        self.first, self.branches = nn.Conv2d(1, 4, 3), nn.ModuleList(branches)
        self.stem, self.head = stem, nn.Linear(4, 3)

    def forward(self, images):
        features = self.first(images)
        if self.stem:
            for branch in self.branches:
                features = (features + branch(features)).relu()
        else:
            features = sum(branch(features) for branch in self.branches)
        return self.head(features.mean((2, 3)))


def marked(model):
    example = torch.randn(2, 1, 8, 8)
    return [
        group.name
        for group in mark_removable(model, example, build_dependency_graph(model, example))
        if group.removable
    ]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: Net(Branch(), Branch()), ["branches.0.conv1", "branches.1.conv1"]),
        (lambda: Net(Branch(), Branch(), stem=False), ["branches.0.conv1"]),  # something must be left to add
        (lambda: Net(Branch(), stem=False), []),
        (lambda: Net(Branch(groups=2)), ["branches.0.conv1"]),
        (lambda: Net(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1))), []),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)), []),
    ],
)
def test_branches_may_go_as_long_as_something_is_left_in_each_sum(model, names):
    assert marked(model()) == names


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
        {"kernel_size": 2, "dilation": 3, "padding": "same"},
        {"kernel_size": 2, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_without_channels_a_convolution_gives_the_same_shape_and_its_bias(dims, options):
    full = [getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")]
    given = torch.randn(2, 3, *range(7, 7 + dims), requires_grad=True)
    first, norm, second = full[0](3, 5, **options), full[1](5), full[0](5, 3, **options)
    with torch.no_grad():
        between = first(given)
        silent = second(torch.zeros_like(between))
    for tensor, dim in ((first.weight, 0), (first.bias, 0), (norm.weight, 0), (norm.bias, 0), (second.weight, 1)):
        if tensor is not None:
            tensor.data = tensor.data.narrow(dim, 0, 0)
    norm.running_mean.data = norm.running_mean.data[:0]
    first.out_channels = second.in_channels = 0
    for module in (first, norm, second):
        module.__class__ = layer_class_for_size(module)
        assert type(module) in EMPTY.values()
    middle = norm(first(given))
    assert middle.shape == (2, 0, *between.shape[2:])
    assert torch.equal(second(middle), silent)
    second(middle).sum().backward()
    assert all(one.grad is not None for module in (first, norm, second) for one in module.parameters())


def vanishing(**arguments):
    settings = {"criterion": "slimming", "distribution": "global", "begin": 2, "end": 10, "every": 4}
    return ChannelPruning(sparsity=0.6, remove_blocks=True, **{**settings, **arguments})


def net():
    """Of its three branches the middle one is the least important."""
    made = Net(Branch(), Branch(), Branch())
    with torch.no_grad():
        for number, branch in enumerate(made.branches):
            branch.norm1.weight.fill_(0.01 if number == 1 else 2.0).add_(torch.rand(6) / 1000)
            branch.norm2.weight.copy_(torch.tensor([0.5, 3.0, 3.0, 3.0]))
    return made


@pytest.fixture
def loader():
    data = torch.utils.data.TensorDataset(torch.randn(48, 1, 8, 8), torch.arange(48) % 3)
    return torch.utils.data.DataLoader(data, batch_size=8)


@pytest.mark.parametrize("pl", ["pytorch_lightning"], indirect=True)
def test_a_branch_leaves_and_the_run_goes_on_and_resumes_in_the_same_bits(
    pl, make_module, make_trainer, loader, tmp_path
):
    def others():
        return [Pruning(final_sparsity=0.5, begin=1, end=12, every=3), QuantizationAwareTraining(begin=14)]

    path, whole, resumed = tmp_path / "epoch.ckpt", make_module(net=net), make_module(net=net)
    one = make_trainer([vanishing(), *others(), saver(pl, path, 6)], max_epochs=3)
    one.fit(whole, loader)
    branches = whole.net.branches
    assert [branch.conv1.out_channels for branch in branches][1] == 0
    assert all(branch.conv1.out_channels > 0 for branch in (branches[0], branches[2]))
    assert branches[1].conv2.weight.shape == (whole.net.first.out_channels, 0, 3, 3)
    assert branches[1].conv1.weight.shape[1] == whole.net.first.out_channels < 4  # cut after the branch had gone
    two = make_trainer([vanishing(), *others()], max_epochs=3)
    two.fit(resumed, loader, ckpt_path=path)
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert same(one.optimizers[0].state_dict(), two.optimizers[0].state_dict())
    shapes = {tensor: tensor.shape for tensor in whole.parameters()}
    state = one.optimizers[0].state
    assert all(held.shape == shapes[one] for one, kept in state.items() for held in kept.values() if held.ndim)


@pytest.mark.parametrize("pl", ["pytorch_lightning"], indirect=True)
def test_what_comes_out_loads_and_exports(pl, make_module, make_trainer, loader, tmp_path):
    module, images = make_module(net=net), torch.randn(3, 1, 8, 8)
    trainer = make_trainer([vanishing()], max_epochs=2)
    trainer.fit(module, loader)
    assert module.net.branches[1].conv1.out_channels == 0
    trainer.save_checkpoint(tmp_path / "thin.ckpt")
    expected = module.eval()(images)
    loaded = load_compressed(make_module, tmp_path / "thin.ckpt", net=net).eval()
    assert torch.equal(loaded(images), expected)
    program = torch.export.export(module.net, (images,))
    torch.testing.assert_close(program.module()(images), expected)
