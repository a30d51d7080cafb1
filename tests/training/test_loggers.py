"""Which loggers get what."""

from types import SimpleNamespace

import pytest

from lightning_compress.training.loggers import loggers_of_kind


class WandbLogger: ...


class Own(WandbLogger): ...


@pytest.mark.parametrize(
    ("first", "dry", "found"), [(True, False, 2), (False, False, 0), (True, True, 0), (False, True, 0)]
)
def test_only_the_first_rank_of_a_real_run_has_loggers_of_a_kind(first, dry, found):
    trainer = SimpleNamespace(is_global_zero=first, fast_dev_run=dry, loggers=[WandbLogger(), object(), Own()])
    assert len(loggers_of_kind(trainer, "WandbLogger")) == found
