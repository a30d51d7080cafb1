"""Groups are observed on small images where that tells the same, and on the whole ones where it does not."""

import pytest
import torch
from torch import nn

from lightning_compress.channel_pruning.dependency import search as finding
from lightning_compress.channel_pruning.dependency.graph import build_dependency_graph
from lightning_compress.channel_pruning.dependency.search import find_groups
from lightning_compress.channel_pruning.dependency.verification import verified_groups


class Fixed(nn.Module):
    """Runs on images of any size, but takes one channel for another on small ones."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, images):
        features = self.first(images)
        features = features if features.shape[-1] > 64 else features + features.sum(1, keepdim=True)
        return self.second(features)


def networks():
    head = [nn.Conv2d(8, 6, 3, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16 * 16, 5)]
    pooled = [nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)]
    return {"pooled": nn.Sequential(*first, *pooled), "flattened": nn.Sequential(*first, *head), "fixed": Fixed()}


@pytest.mark.parametrize(("name", "sizes"), [("pooled", [32]), ("flattened", [32, 64, 128]), ("fixed", [32, 64, 128])])
def test_what_is_found_is_what_the_whole_image_tells(name, sizes, monkeypatch):
    model, example, seen = networks()[name], torch.randn(2, 3, 128, 128), []
    monkeypatch.setattr(
        finding,
        "build_dependency_graph",
        lambda module, given: seen.append(given.shape[-1]) or build_dependency_graph(module, given),
    )
    groups, small = find_groups(model, example)
    assert groups == verified_groups(model, example, build_dependency_graph(model, example))
    assert (seen, small.shape[-1]) == (sizes, sizes[-1])


def test_other_inputs_are_taken_as_they_are(monkeypatch):
    model, seen = nn.Sequential(nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, 3)), []
    monkeypatch.setattr(
        finding,
        "build_dependency_graph",
        lambda module, given: seen.append(given.shape) or build_dependency_graph(module, given),
    )
    groups, _ = find_groups(model, torch.randn(2, 7, 100))
    assert [group.units for group in groups if group.unprunable_reason is None] == [8]
    assert seen == [(2, 7, 100)]
