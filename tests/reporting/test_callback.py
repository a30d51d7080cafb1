"""CompressionReport: the same numbers in the terminal, in files, and in a real offline W&B run."""

import json

import pytest
import torch
from torch import nn

from lightning_compress import CompressionReport, Pruning, Report, report
from lightning_compress.core.phases import Run
from lightning_compress.recipe.timeline import timeline_rows
from tests.reporting.wandb_file import key_of, records

PARAMETERS = 8 * 16 + 16 + 16 * 3 + 3
MACS = 8 * 16 + 16 * 3


def callbacks(**arguments):
    report = CompressionReport(**{"runs": 5, "seconds": 0.2, **arguments})
    return [Pruning(0.75, begin=1, end=10, every=3), report], report


def test_reports_before_and_after(make_module, make_trainer, loader, tmp_path, capsys):
    both, callback = callbacks()
    trainer = make_trainer(both, max_epochs=2)
    trainer.fit(make_module(), loader, loader)
    after, before = callback.report, callback.report.before
    assert (before.parameters, before.nonzero, before.macs) == (PARAMETERS, PARAMETERS, MACS)
    assert (after.parameters, after.nonzero, after.macs) == (PARAMETERS, PARAMETERS - 132, MACS)
    assert after.macs_nonzero == MACS - 132
    assert after.size_bytes_sparse < before.size_bytes_sparse
    assert after.latency_batch_1.median_ms > 0
    assert before.latency_batch_64.batch == 64
    assert before.latency_batch_64 == after.latency_batch_64  # dense kernels do not skip zeros
    assert any("timed once" in note for note in after.notes)
    assert set(after.metrics) == {"train_loss", "val_loss"}
    steps = [step for step, _ in after.history["pruning/sparsity"]]
    assert steps == sorted(steps)
    assert after.history["pruning/sparsity"][-1] == (16, 0.75)
    assert [layer.name for layer in before.layers] == [layer.name for layer in after.layers]
    assert {path.name for path in tmp_path.iterdir()} == {"compression_report.json", "compression_report.html"}
    assert Report.load(tmp_path / "compression_report.json") == after
    assert "net.0" in capsys.readouterr().out


def test_the_timeline_says_when_it_measures(tmp_path):
    before, after = ("step 0", "report", "measures before"), ("step 1,000", "report", "measures after")
    end = ("step 1,000", "", "the run ends")
    assert timeline_rows([CompressionReport()], Run(None, 1000)) == [before, after, end]
    assert CompressionReport().timeline(Run(10)) == [(0, "measures before")]  # how many steps these are is not known
    given = report(nn.Linear(2, 3)).save(tmp_path / "given.json")
    assert timeline_rows([CompressionReport(baseline=str(given))], Run(None, 1000)) == [after, end]


def test_metrics_of_a_test_join_the_report(make_module, make_trainer, loader, tmp_path):
    both, _ = callbacks(latency=False)
    trainer, module = make_trainer(both, max_epochs=1), make_module()
    trainer.fit(module, loader)
    (measured,) = trainer.test(module, loader, verbose=False)
    saved = json.loads((tmp_path / "compression_report.json").read_text())
    assert saved["metrics"]["val_loss"] == pytest.approx(measured["val_loss"])


def test_what_is_tested_is_what_is_counted(make_module, make_trainer, loader, tmp_path):
    both, callback = callbacks(latency=False)
    trainer, module = make_trainer(both, max_epochs=2), make_module()
    trainer.fit(module, loader, loader)
    dense = make_module()
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    checkpoint = torch.load(tmp_path / "dense.ckpt", weights_only=True)
    torch.save({**checkpoint, "state_dict": dense.state_dict()}, tmp_path / "dense.ckpt")
    trainer.test(module, loader, ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    assert callback.report.nonzero == PARAMETERS
    trainer.test(make_module(), loader, verbose=False)
    assert callback.report.nonzero == PARAMETERS


def test_batches_may_be_objects(pl, make_trainer, tmp_path):
    class Graph:
        def __init__(self):
            self.x = torch.randn(4, 8)

    class OnGraphs(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 3)

        def forward(self, graph):
            return self.net(graph.x)

        def training_step(self, graph, batch_idx):
            return self(graph).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    both, callback = callbacks()
    graphs = torch.utils.data.DataLoader([Graph() for _ in range(8)], batch_size=None)
    make_trainer(both, max_epochs=2).fit(OnGraphs(), graphs)
    assert callback.report.parameters == 27
    assert callback.report.nonzero == 27 - 18


def test_another_run_may_be_what_was_before(make_module, make_trainer, loader, tmp_path):
    dense = CompressionReport(latency=False, dirpath=str(tmp_path / "dense"))
    make_trainer([dense], max_epochs=1).fit(make_module(), loader, loader)
    for baseline in (dense.report, str(tmp_path / "dense" / "compression_report.json")):
        both, callback = callbacks(latency=False, baseline=baseline)
        make_trainer(both, max_epochs=2).fit(make_module(), loader, loader)
        assert callback.report.before.metrics == dense.report.metrics
        assert callback.report.before.nonzero == PARAMETERS


def test_a_module_whose_step_calls_a_part_of_it_is_measured_by_that_part(pl, make_module, make_trainer, loader):
    class NoForward(make_module):
        def forward(self, *_):
            raise NotImplementedError

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    both, callback = callbacks(latency=False)
    make_trainer(both, max_epochs=2).fit(NoForward(), loader)
    assert callback.report.macs == callback.report.before.macs == MACS
    assert callback.report.before.nonzero == PARAMETERS
    assert callback.report.macs_nonzero == MACS - 132


def test_what_cannot_be_measured_is_said_in_the_notes(of_parts, make_trainer, loader):
    both, callback = callbacks()
    make_trainer(both, max_epochs=1).fit(of_parts(), loader)
    assert callback.report.macs is None
    assert any("example_input" in note for note in callback.report.notes)


def test_a_wrong_example_does_not_end_a_run_that_is_trained(make_module, make_trainer, loader):
    both, callback = callbacks(example_input=torch.ones(2, 5))
    make_trainer(both, max_epochs=1).fit(make_module(), loader)
    assert callback.report.parameters == PARAMETERS
    assert any("not measured" in note for note in callback.report.notes)


def test_the_average_is_what_is_reported(pl, make_module, make_trainer, loader):
    both, callback = callbacks(latency=False)
    module = make_module()
    trainer = make_trainer([*both, pl.callbacks.EMAWeightAveraging(decay=0.5)], max_epochs=2)
    trainer.fit(module, loader)
    nonzero = sum(int(value.count_nonzero()) for value in module.parameters())
    assert callback.report.nonzero == nonzero == PARAMETERS - 132


def test_nothing_is_written_in_a_dry_run(make_module, make_trainer, loader, tmp_path):
    both, callback = callbacks()
    make_trainer(both, fast_dev_run=2).fit(make_module(), loader)
    assert callback.report.parameters == PARAMETERS
    assert not list(tmp_path.iterdir())


def test_a_baseline_that_is_no_report_is_refused_at_construction(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="Not a report of this version"):
        CompressionReport(baseline=str(tmp_path / "other.json"))


def test_an_offline_wandb_run_holds_config_history_table_summary_and_artifact(
    pl, make_module, make_trainer, loader, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    both, callback = callbacks(export="model.onnx")
    logger = pl.loggers.WandbLogger(project="compress", offline=True, save_dir=tmp_path)
    trainer = make_trainer(both, max_epochs=2, logger=logger, log_every_n_steps=1)
    trainer.fit(make_module(), loader, loader)
    logger.experiment.finish()  # this very run, whichever is W&B's current one: only then is its file complete
    found = records(tmp_path)
    kinds = [one.WhichOneof("record_type") for one in found]
    assert {"exit", "config", "summary", "history", "artifact"} <= set(kinds), kinds
    config = {key_of(item): item.value_json for one in found for item in one.run.config.update}
    config |= {key_of(item): item.value_json for one in found for item in one.config.update}
    assert json.loads(config["compress/pruning"])["final_sparsity"] == 0.75
    rows = [
        {key_of(item): json.loads(item.value_json) for item in one.history.item}
        for one in found
        if one.HasField("history")
    ]
    sparsity = [
        (row["trainer/global_step"], row["compress/pruning/sparsity"])
        for row in rows
        if "compress/pruning/sparsity" in row
    ]
    assert len(sparsity) >= 4
    assert sparsity[-1][1] == 0.75
    steps = [step for step, _ in sparsity]
    assert steps == sorted(steps)
    assert any("val_loss" in row for row in rows)
    (table,) = [row for row in rows if "compress/layers/_type" in row]
    assert table["compress/layers/_type"] == "table-file"
    assert table["compress/layers/nrows"] == len(callback.report.layers)
    summary = {key_of(item): item.value_json for one in found for item in one.summary.update}
    assert json.loads(summary["compress/nonzero"]) == PARAMETERS - 132
    assert json.loads(summary["compress/before/nonzero"]) == PARAMETERS
    artifacts = [one.artifact for one in found if one.HasField("artifact")]
    artifacts += [one.request.log_artifact.artifact for one in found if one.HasField("request")]
    files = {entry.path for one in artifacts if one.type == "compression-report" for entry in one.manifest.contents}
    assert files == {"compression_report.json", "compression_report.html", "model.onnx"}
    told = [json.loads(one.metadata) for one in artifacts if one.type == "compression-report"]
    size_bytes = callback.files[2].stat().st_size
    assert told[0]["compress/size_bytes_exported/model.onnx"] == size_bytes
    assert told[0]["compress/nonzero"] == PARAMETERS - 132
