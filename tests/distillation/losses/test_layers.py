"""The parts of losses with parameters."""

import torch
from torch.nn import functional

from lightning_compress.distillation.losses._layers import Fusion


def test_fusion_adds_both_by_their_attention_at_each_place():
    generator = torch.Generator().manual_seed(0)
    stage, deeper = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 5, 2, 2, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fusion = Fusion(3, 5, 7, deepest=False).eval()
    ours, theirs = fusion.into(stage), functional.interpolate(deeper, scale_factor=2)
    attention = fusion.attend(torch.cat([ours, theirs], dim=1))
    for place in ((0, 1, 2), (1, 3, 0)):
        sample, row, column = place
        share, rest = attention[sample, :, row, column]
        expected = share * ours[sample, :, row, column] + rest * theirs[sample, :, row, column]
        assert torch.allclose(fusion(stage, deeper, stage.shape[2:])[1][sample, :, row, column], expected, atol=1e-6)


def test_fusion_gives_the_channels_and_the_space_of_the_teacher():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fusion = Fusion(3, 5, 7, deepest=True)
    output, onward = fusion(torch.zeros(2, 3, 4, 4), None, torch.Size([8, 6]))
    assert output.shape == (2, 7, 8, 6)
    assert onward.shape == (2, 5, 8, 6)
