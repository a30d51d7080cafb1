"""A bar comes only where work is long, and goes with it."""

from io import StringIO

from rich.console import Console

from lightning_compress.quantization.ptq import progress
from lightning_compress.quantization.ptq.progress import DelayedProgress


def written(monkeypatch, patience, wanted=True, terminal=True):
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", patience)
    console = Console(file=StringIO(), force_terminal=terminal, width=80)
    with DelayedProgress(wanted, console) as bar:
        assert list(bar.track("abc", "Calibrating", 3)) == ["a", "b", "c"]
    return console.file.getvalue()


def test_short_work_has_no_bar(monkeypatch):
    assert written(monkeypatch, patience=1000.0) == ""


def test_long_work_has_one_on_a_terminal(monkeypatch):
    assert "Calibrating" in written(monkeypatch, patience=0.0)


def test_there_is_none_where_nobody_wants_it_or_nobody_looks(monkeypatch):
    assert written(monkeypatch, patience=0.0, wanted=False) == ""
    assert written(monkeypatch, patience=0.0, terminal=False) == ""
