"""Strategies that shard weights are refused before anything happens."""

import pytest

from lightning_compress import Pruning


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_are_refused_in_words(name, pl, make_module, make_trainer):
    strategy = getattr(pl.strategies, name)

    class Sharded:
        """A Trainer as far as `setup` looks at it: these strategies want a GPU, or a package, to be made in full."""

        callbacks = ()

    Sharded.strategy = strategy.__new__(strategy)
    with pytest.raises(ValueError, match=f"Pruning needs whole weights on every rank, but {name} shards them"):
        Pruning().setup(Sharded(), make_module(), "fit")
