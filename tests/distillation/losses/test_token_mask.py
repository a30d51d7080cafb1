"""Which tokens count, against the loss that a causal language model is trained with."""

import pytest
import torch
from torch.nn import functional

from lightning_compress.distillation.losses import language
from lightning_compress.distillation.losses.token_mask import next_token_mask


def test_the_mask_counts_the_positions_that_the_shifted_cross_entropy_counts():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 7, generator=generator)
    labels = torch.randint(0, 7, (2, 6), generator=generator)
    labels[0, :3] = labels[1, 4:] = -100
    shifted = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    # A teacher that is sure of the label at each place has no entropy: its divergence is that cross-entropy.
    teacher = 1e4 * functional.one_hot(labels.roll(-1, dims=1).clamp(min=0), 7).float()
    loss = language.token_kl_divergence(logits, teacher, temperature=1.0, mask=next_token_mask(labels))
    assert loss.item() == pytest.approx(shifted.item(), rel=1e-5)


def test_another_label_may_be_the_one_to_ignore():
    assert next_token_mask(torch.tensor([[5, 0, 6, 0]]), ignore_index=0).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("labels", [torch.zeros(4, dtype=torch.long), torch.zeros(2, 4)], ids=["one_dimension", "real"])
def test_what_is_no_batch_of_labels_is_refused(labels):
    with pytest.raises(ValueError, match="integers of shape"):
        next_token_mask(labels)
