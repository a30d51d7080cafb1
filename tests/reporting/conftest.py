"""A module of which nobody can tell what it takes."""

import pytest
from torch import nn


@pytest.fixture
def of_parts(make_module):
    """A class whose step calls its two parts, neither of which has all of its parameters, and not itself."""

    class Parts(make_module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

    return Parts
