"""What an offline W&B run keeps of a distillation, read back from its file."""

import json
from types import SimpleNamespace

import torch
from torch import nn

from lightning_compress import Distillation
from lightning_compress.distillation.cache.sample_keys import teacher_fingerprint
from tests.reporting.wandb_file import key_of, records


def test_a_run_knows_its_teacher_and_its_terms(pl, make_module, make_trainer, loader, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    with torch.random.fork_rng():
        teacher = nn.Linear(8, 3)
    logger = pl.loggers.WandbLogger(project="compress", offline=True, save_dir=tmp_path)
    trainer = make_trainer([Distillation(teacher, alpha=0.7)], max_epochs=2, logger=logger, log_every_n_steps=2)
    trainer.fit(make_module(), loader)
    logger.experiment.finish()
    found = records(tmp_path)
    updates = [item for one in found for item in (*one.run.config.update, *one.config.update)]
    config = {key_of(item): json.loads(item.value_json) for item in updates}
    assert config["compress/distillation"]["alpha"] == 0.7
    assert config["compress/distillation/teachers"] == [teacher_fingerprint(teacher)]
    rows = [{key_of(item): json.loads(item.value_json) for item in one.history.item} for one in found]
    seen = [row for row in rows if "compress/distillation/loss/kl_divergence" in row]
    assert len(seen) == 8
    assert all(0 <= row["compress/distillation/agreement"] <= 1 for row in seen)


def test_an_online_run_declares_the_teachers_checkpoint_as_used(pl, make_module, make_trainer, loader, tmp_path):
    """W&B refuses this offline, so a stand-in is told what a run with a server would be."""

    class Run:
        def __init__(self):
            self.id, self.offline, self.dir, self.used = "some", False, str(tmp_path), []
            self.settings, self.config = SimpleNamespace(mode="online"), self
            self.told = {}

        def update(self, settings, allow_val_change):
            self.told |= settings

        def use_artifact(self, artifact):
            self.used.append(artifact)

    class WandbLogger(pl.loggers.CSVLogger):
        @property
        def experiment(self):
            return run

        def log_metrics(self, metrics, step=None):
            pass

        def save(self):
            pass

        log_hyperparams = finalize = log_metrics

    class Teacher(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, x):
            return self.layer(x)

    run, path = Run(), tmp_path / "teacher.ckpt"
    with torch.random.fork_rng():
        torch.save({"state_dict": Teacher().state_dict(), "pytorch-lightning_version": pl.__version__}, path)
    callback = Distillation(path, teacher_class=Teacher)
    trainer = make_trainer([callback], max_epochs=1, logger=WandbLogger(tmp_path))
    trainer.fit(make_module(), loader)
    (artifact,) = run.used
    assert artifact.type == "model"
    (entry,) = artifact.manifest.entries.values()
    assert entry.path == "teacher.ckpt"
    assert entry.size == path.stat().st_size
    (told,) = run.told["compress/distillation/teachers"]
    assert artifact.name == f"distillation-teacher-{told[:12]}"
