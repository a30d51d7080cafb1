"""What needs a GPU: half precision with a gradient scaler, whose first steps overflow and are skipped."""

import pytest
import torch

from lightning_compress import Pruning
from tests.conftest import adamw, sgd


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "movement"])
@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
def test_zeros_are_true_with_a_gradient_scaler(criterion, optimizer, make_module, make_trainer, loader):
    module, pruning = make_module(optimizer), Pruning(0.75, criterion=criterion, begin=1, end=10, every=2)
    trainer = make_trainer([pruning], max_epochs=3, accelerator="cuda", precision="16-mixed")
    trainer.fit(module, loader)
    zeros = [int((value == 0).sum()) for value in module.parameters() if value.ndim > 1]
    assert zeros == [96, 36]
    assert all(value.isfinite().all() for value in module.parameters())
