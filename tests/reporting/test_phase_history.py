"""Phases and what the model is at their boundaries: by hand, over a stop, and in the loggers that people have."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress import (
    ChannelPruning,
    CompressionReport,
    Distillation,
    FineTuning,
    Pruning,
    QuantizationAwareTraining,
    Report,
    report,
)
from lightning_compress._lightning import resume_wandb_runs
from lightning_compress.reporting.loggers import report_markdown
from lightning_compress.reporting.phase_history import PhaseHistory
from lightning_compress.reporting.wandb_resume import saved_run_ids
from tests.reporting.wandb_file import key_of, records

ONE_NAME = pytest.mark.parametrize("pl", ["pytorch_lightning"], indirect=True)
QUIET = {"runs": 3, "seconds": 0.05, "print_table": False}


def pipeline(**arguments):
    """Of 24 steps, 8 to an epoch: freezing, pruning and a restart, one after the other."""
    told = CompressionReport(**{**QUIET, **arguments})
    callbacks = [
        FineTuning(freeze=["net.0"], end=4, name="freeze"),
        Pruning(0.75, begin=4, end=12, every=4),
        FineTuning(learning_rate=0.5, begin=12, end=20, name="recover"),
        Distillation("self@16%", begin=8, end="100%"),
        told,
    ]
    return callbacks, told


def test_who_begins_and_ends_by_hand():
    course = PhaseHistory()
    assert course.crossed(0, {"a": ("A", True), "b": ("B", False)}) == ["a begins"]
    assert course.crossed(1, {"a": ("A", True), "b": ("B", False)}) == []
    assert course.crossed(2, {"a": ("A", False), "b": ("B", True)}) == ["a ends", "b begins"]
    assert [vars(one) for one in course.phases.values()] == [
        {"name": "a", "type": "A", "begin": 0, "end": 2},
        {"name": "b", "type": "B", "begin": 2, "end": None},
    ]
    assert PhaseHistory.from_state_dict(json.loads(json.dumps(course.state_dict()))) == course


def test_phases_and_boundaries_of_a_run(make_module, make_trainer, loader):
    callbacks, told = pipeline()
    make_trainer(callbacks, max_epochs=3, log_every_n_steps=4).fit(make_module(), loader)
    after = told.report
    assert {one.name: (one.type, one.begin, one.end) for one in after.phases} == {
        "freeze": ("FineTuning", 0, 4),
        "pruning": ("Pruning", 4, 12),
        "distillation": ("Distillation", 8, None),
        "recover": ("FineTuning", 12, 20),
    }
    assert [(one.step, one.what) for one in after.boundaries] == [
        (4, "freeze ends, pruning begins"),
        (8, "distillation begins"),
        (12, "pruning ends, recover begins"),
        (20, "recover ends"),
    ]
    dense, half, pruned, last = after.boundaries
    assert dense.nonzero == after.before.nonzero
    assert dense.size_bytes == after.before.size_bytes_sparse
    assert dense.nonzero > half.nonzero > pruned.nonzero == last.nonzero == after.nonzero
    assert pruned.size_bytes == after.size_bytes_sparse
    assert all(one.macs == after.macs and one.latency_ms_batch_1 > 0 for one in after.boundaries)
    assert Report.from_dict(json.loads(after.to_json())) == after


def test_a_boundary_is_measured_after_whatever_the_callbacks_have_done(make_module, make_trainer, loader):
    """The report stands before the callback that cuts: at its end the cut is in the numbers all the same."""
    told = CompressionReport(**QUIET, latency=False)
    cuts = ChannelPruning(sparsity=0.5, begin=4, end=12, every=4)
    module = make_module()
    make_trainer([told, cuts], max_epochs=2).fit(module, loader)
    begun, ended = told.report.boundaries
    assert (begun.step, ended.step) == (4, 12)
    assert (begun.macs, ended.macs) == (8 * 16 + 16 * 3, 8 * 8 + 8 * 3)
    assert ended.size_bytes == report(module).size_bytes_sparse
    assert begun.latency_ms_batch_1 is None


def test_packed_integers_are_the_size_where_there_are_some(make_module, make_trainer, loader):
    told = CompressionReport(**QUIET)
    quantized = QuantizationAwareTraining(weights=4, activations=8, begin=4, end=8)
    wide = lambda: nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    make_trainer([quantized, told], max_epochs=2).fit(make_module(net=wide), loader)
    begun, ended = told.report.boundaries  # where it begins nothing is known of the activations' ranges
    assert ended.size_bytes == told.report.size_bytes_quantized < begun.size_bytes


def test_the_learning_rate_is_that_of_each_step(pl, make_module, make_trainer, loader):
    def halving(parameters):
        return torch.optim.SGD(parameters, lr=0.4)

    class Scheduled(make_module):
        def configure_optimizers(self):
            optimizer = halving(self.parameters())
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step // 4))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    told = CompressionReport(**QUIET, latency=False)
    phase = FineTuning(learning_rate=0.03, begin=8, end=12)
    make_trainer([told, phase], max_epochs=2, log_every_n_steps=2).fit(Scheduled(), loader)
    steps, rates = zip(*told.report.history["learning rate"], strict=True)
    assert steps == (2, 4, 6, 8, 10, 12, 14, 16)
    assert rates == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.03, 0.03, 0.05, 0.05])


def test_where_nobody_knows_what_the_module_takes_there_are_sizes(of_parts, make_trainer, loader):
    told = CompressionReport(**QUIET)
    make_trainer([Pruning(0.75, begin=4, end=12), told], max_epochs=2).fit(of_parts(), loader)
    begun, ended = told.report.boundaries
    assert (begun.step, ended.step) == (4, 12)
    assert begun.macs is ended.macs is ended.latency_ms_batch_1 is None
    assert ended.size_bytes < begun.size_bytes


def test_without_boundaries_only_the_phases_are_told(make_module, make_trainer, loader):
    callbacks, told = pipeline(boundaries=False)
    make_trainer(callbacks, max_epochs=3).fit(make_module(), loader)
    assert len(told.report.phases) == 4
    assert told.report.boundaries == ()


def stopping_after(pl, epoch, path):
    """Writes a checkpoint at the end of an epoch, and stops the run."""

    class Stopping(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == epoch:
                trainer.save_checkpoint(path)
                trainer.should_stop = True

    return Stopping()


def test_a_resumed_run_tells_of_all_of_it(pl, make_module, make_trainer, loader, tmp_path):
    whole, told = pipeline(latency=False, dirpath=str(tmp_path / "whole"))
    make_trainer(whole, max_epochs=3, log_every_n_steps=4).fit(make_module(), loader)
    first, _ = pipeline(latency=False, dirpath=str(tmp_path / "first"))
    path = tmp_path / "stopped.ckpt"
    stopped = make_trainer([*first, stopping_after(pl, 0, path)], max_epochs=3, log_every_n_steps=4)
    stopped.fit(make_module(), loader)  # at a boundary, which is not measured yet
    second, again = pipeline(latency=False, dirpath=str(tmp_path / "second"))
    trainer = make_trainer(second, max_epochs=3, log_every_n_steps=4)
    trainer.fit(make_module(), loader, ckpt_path=path)
    assert again.report.phases == told.report.phases
    assert again.report.boundaries == told.report.boundaries
    assert again.report.history == told.report.history


def test_the_page_draws_phases_and_boundaries(make_module, make_trainer, loader):
    callbacks, told = pipeline()
    make_trainer(callbacks, max_epochs=3, log_every_n_steps=4).fit(make_module(), loader)
    page = told.report.to_html()
    assert page.count('class="band"') == 4
    assert "pruning ends, recover begins" in page
    assert "recover from step 12 to 20" in page
    text = report_markdown(told.report)
    assert "| pruning | Pruning | 4 | 12 |" in text
    assert "| 12 | pruning ends, recover begins |" in text


# In loggers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb_here(tmp_path, monkeypatch):
    for name, value in {
        "SILENT": "true",
        "CACHE_DIR": str(tmp_path / "cache"),
        "DATA_DIR": str(tmp_path / "data"),
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_MODE", "offline")


def history(found):
    rows = (one.history.item for one in found if one.HasField("history"))
    return [{key_of(item): json.loads(item.value_json) for item in row} for row in rows]


def run_id(found):
    (only,) = {one.run.run_id for one in found if one.HasField("run")}
    return only


def artifacts(found):
    logged = [one.artifact for one in found if one.HasField("artifact")]
    return logged + [one.request.log_artifact.artifact for one in found if one.HasField("request")]


@ONE_NAME
def test_one_wandb_run_shows_all_of_the_pipeline(pl, make_module, make_trainer, loader, tmp_path, wandb_here):
    callbacks, told = pipeline()
    callbacks.append(QuantizationAwareTraining(weights=8, activations=8, begin=20))
    logger = pl.loggers.WandbLogger(project="compress", save_dir=tmp_path, log_model=True)
    trainer = make_trainer(callbacks, max_epochs=3, logger=logger, log_every_n_steps=1, enable_checkpointing=True)
    trainer.fit(make_module(), loader, loader)
    logger.experiment.finish()
    found = records(tmp_path)
    rows = history(found)

    def curve(key):
        return [(row["trainer/global_step"], row[key]) for row in rows if key in row]

    acts = [value for _, value in curve("compress/pruning/active")]
    assert acts == [0.0] * 4 + [1.0] * 8 + [0.0] * 12  # a band over steps 4 to 11
    rates = [value for _, value in curve("compress/report/learning_rate")]
    assert rates == pytest.approx([0.01] * 12 + [0.5] * 8 + [0.01] * 4)
    assert [step for step, _ in curve("compress/report/size_bytes")] == [4, 8, 12, 20]
    sizes = [one.size_bytes for one in told.report.boundaries]
    assert [value for _, value in curve("compress/report/size_bytes")] == sizes
    assert all(value > 0 for _, value in curve("compress/report/latency_ms_batch_1"))
    for shown in ("compress/pruning/sparsity", "compress/quantization/bits", "compress/distillation/loss/task"):
        assert curve(shown), shown
    assert [row["compress/phases/nrows"] for row in rows if "compress/phases/_type" in row] == [5]
    assert [row["compress/boundaries/nrows"] for row in rows if "compress/boundaries/_type" in row] == [4]
    (sent,) = [one for one in artifacts(found) if one.name.startswith("compressed-")]
    (best,) = tmp_path.glob("**/*.ckpt")
    told_of_it = json.loads(sent.metadata)
    assert told_of_it["size_bytes_of_the_file"] == best.stat().st_size
    assert told_of_it["compress/nonzero"] == report_of(best)


def report_of(path):
    tensors = torch.load(path, weights_only=True)["state_dict"].values()
    return sum(int(one.count_nonzero()) for one in tensors)


@ONE_NAME
def test_a_resumed_run_goes_on_in_its_wandb_run(pl, make_module, make_trainer, loader, tmp_path, wandb_here):
    stopped = tmp_path / "stopped.ckpt"

    def fitted(folder, path=None, **which):
        callbacks, _ = pipeline(latency=False)
        logger = pl.loggers.WandbLogger(project="compress", save_dir=tmp_path / folder, **which)
        if path is not None and not which:
            resume_wandb_runs([logger], saved_run_ids(path))  # what `lightning-compress run --ckpt-path` does
        (tmp_path / folder).mkdir()
        stops = [stopping_after(pl, 0, stopped)] if path is None else []
        trainer = make_trainer([*callbacks, *stops], max_epochs=3, logger=logger, log_every_n_steps=1)
        trainer.fit(make_module(), loader, ckpt_path=path)
        logger.experiment.finish()
        return records(tmp_path / folder)

    first = fitted("first")
    second = fitted("second", stopped)
    assert run_id(second) == run_id(first)
    steps = [row["trainer/global_step"] for row in history(first) if "compress/pruning/active" in row]
    more = [row["trainer/global_step"] for row in history(second) if "compress/pruning/active" in row]
    assert steps + more == list(range(24))
    with pytest.warns(UserWarning, match=rf"WandbLogger\(id='{run_id(first)}', resume='allow'\)"):
        other = fitted("third", stopped, id="another")
    assert run_id(other) == "another"


@ONE_NAME
def test_tensorboard_csv_and_mlflow_get_what_they_can_show(
    pl, make_module, make_trainer, loader, tmp_path, monkeypatch
):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    loggers = [
        pl.loggers.TensorBoardLogger(tmp_path / "tensorboard"),
        pl.loggers.CSVLogger(tmp_path / "csv"),
        pl.loggers.MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlflow'}"),
    ]
    callbacks, told = pipeline(export="model.onnx")
    trainer = make_trainer(callbacks, max_epochs=3, logger=loggers, log_every_n_steps=1)
    trainer.fit(make_module(), loader)
    sizes = [one.size_bytes for one in told.report.boundaries]

    events = event_accumulator.EventAccumulator(loggers[0].log_dir).Reload()
    scalars = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["compress/report/size_bytes"] == list(zip([4, 8, 12, 20], sizes, strict=True))
    assert [value for _, value in scalars["compress/pruning/active"]] == [0.0] * 4 + [1.0] * 8 + [0.0] * 12
    assert scalars["compress/nonzero"][-1][1] == told.report.nonzero
    (shown,) = events.Tensors("compress/report/text_summary")
    assert b"| 12 | pruning ends, recover begins |" in shown.tensor_proto.string_val[0]
    (shown,) = events.Tensors("compress/pruning/settings/text_summary")
    assert b'"final_sparsity": 0.75' in shown.tensor_proto.string_val[0]

    with open(f"{loggers[1].log_dir}/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [float(row["compress/report/size_bytes"]) for row in rows if row["compress/report/size_bytes"]]
    assert found == sizes
    assert "final_sparsity: 0.75" in (Path(loggers[1].log_dir) / "hparams.yaml").read_text()

    client, run = loggers[2].experiment, loggers[2].run_id
    logged = client.get_metric_history(run, "compress/report/size_bytes")
    assert [(one.step, one.value) for one in logged] == list(zip([4, 8, 12, 20], sizes, strict=True))
    tags = client.get_run(run).data.tags
    assert json.loads(tags["compress/pruning"])["final_sparsity"] == 0.75
    names = {one.path for one in client.list_artifacts(run, "compression_report")}
    expected = {"compression_report.json", "compression_report.html", "model.onnx"}
    assert names == {f"compression_report/{name}" for name in expected}
