"""Runs beside each other: values, their shares of the first, and what is said where these would mislead."""

from dataclasses import replace

import pytest

from lightning_compress.cli import main
from lightning_compress.measure.latency import Latency
from lightning_compress.reporting import LayerReport, Report
from lightning_compress.reporting.compare import compare


def made(nonzero, *, median_ms=2.0, macs_batch=1, cpu="one", **values):
    layer = LayerReport("fc", "Linear", (4, 5), 20, nonzero, 20, nonzero, 80, 40, 20 * macs_batch, nonzero * macs_batch)
    latency = Latency(1, median_ms, 0.1, 5, 1, 1)
    place = {"cpu": cpu, "torch": "2"}
    return Report("Net", (layer,), 100, 60, macs_batch=macs_batch, latency_batch_1=latency, environment=place, **values)


RUNS = {
    "dense": made(20, metrics={"accuracy": 0.5}),
    "pruned": made(5, median_ms=1.0, macs_batch=8, size_bytes_quantized=25, metrics={"accuracy": 0.25, "loss|x": -1.0}),
}


def test_each_number_stands_with_its_share_of_the_first_run():
    first, second = (dict(zip(compare(RUNS).headings, row, strict=True)) for row in compare(RUNS).rows.values())
    assert {name: (cell.value, cell.ratio) for name, cell in second.items()} == {
        "Params": ("20", "1x"),
        "Nonzero": ("5", "0.25x"),
        "MACs": ("20", "1x"),  # of one sample, whatever batch they were counted at
        "Nonzero MACs": ("5", "0.25x"),
        "Dense": ("100 B", "1x"),
        "Sparse": ("60 B", "1x"),
        "Packed": ("25 B", "0.25x"),  # of the dense file: the first run is not quantized
        "Latency, batch 1": ("1.00 ms", "0.5x"),
        "accuracy": ("0.25", ""),
        "loss|x": ("-1", ""),
    }
    assert {cell.ratio for cell in first.values()} == {""}
    assert (first["Packed"].value, first["loss|x"].value) == ("", "")


def test_timings_of_different_machines_are_told_apart():
    assert compare(RUNS).notes == ()
    (note,) = compare({**RUNS, "elsewhere": made(5, cpu="two")}).notes
    assert "one with torch 2; two with torch 2" in note
    untimed = replace(made(5, cpu="two"), latency_batch_1=None)
    assert compare({**RUNS, "untimed": untimed}).notes == ()


def test_the_command_prints_the_table_and_writes_it_as_markdown(tmp_path, capsys):
    files = [str(run.save(tmp_path / name / "report.json")) for name, run in RUNS.items()]
    assert main(["compare", *files, "--output", str(tmp_path / "table.md")]) == 0
    assert "0.25x" in capsys.readouterr().out
    headings, dashes, dense, pruned = (tmp_path / "table.md").read_text().splitlines()
    assert dashes.count("---:") == 10
    assert headings.endswith("| accuracy | loss\\|x |")
    assert dense.startswith("| dense | 20 | 20 |")
    assert pruned.startswith("| pruned | 20 (1x) | 5 (0.25x) |")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"callbacks: [Pruning]", "holds no report: Expecting value"),
        (b'{"format": 7}', "its 'format' is 7, not 1"),
        (b"[1]", "holds no report"),
        (b"\xff\xd8", "holds no report"),
        (None, "No such file"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_name(tmp_path, capsys, content, words):
    good, bad = RUNS["dense"].save(tmp_path / "good.json"), tmp_path / "bad.json"
    if content is not None:
        bad.write_bytes(content)
    assert main(["compare", str(good), str(bad), "--output", str(tmp_path / "table.md")]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "bad.json" in told
    assert not (tmp_path / "table.md").exists()
    assert main(["compare", str(good), "--output", str(tmp_path / "table.txt")]) == 2
    assert "ends in .md" in capsys.readouterr().err
