"""A whole pipeline on two real processes: one model on both, measured where phases meet, and its file."""

import csv

import pytest

from tests.ddp.pipeline_ranks import NAME
from tests.ddp.running import run_two_ranks


@pytest.mark.ddp
@pytest.mark.parametrize("lightning", ["lightning.pytorch", "pytorch_lightning"])
def test_two_ranks_end_in_one_model_and_one_file_that_computes_what_it_does(lightning, tmp_path):
    pytest.importorskip("onnxruntime")
    ranks, said = run_two_ranks("pipeline_ranks", lightning, tmp_path, [NAME])
    first, second = ranks[NAME, 0], ranks[NAME, 1]
    assert first["digest"] == second["digest"]
    assert first["width"] == second["width"] == 128
    assert first["files"] == ["compression_report.json", "compression_report.html", "model.onnx"]
    assert second["files"] == []  # only one of them measures and writes
    assert first["boundaries"] == [
        [2, "freeze ends, channels begins"],
        [3, "distillation begins"],
        [4, "channels ends, pruning begins"],
        [8, "pruning ends"],
        [9, "quantization begins"],
    ]
    assert "sync_dist" not in said
    assert first["off"] < 0.02
    (path,) = tmp_path.glob("**/metrics.csv")
    with path.open(newline="") as file:
        acts = [row["compress/pruning/active"] for row in csv.DictReader(file)]
    assert [float(one) for one in acts if one] == [0.0] * 4 + [1.0] * 4 + [0.0] * 4
