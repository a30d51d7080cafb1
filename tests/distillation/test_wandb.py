"""What an offline W&B run keeps of a distillation, read back from its file."""

import json

import torch
from torch import nn

from lightning_compress import Distillation
from lightning_compress.distillation.content_keys import fingerprint
from tests.tracking.wandb_file import key_of, records


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
    assert config["compress/distillation/teachers"] == [fingerprint(teacher)]
    rows = [{key_of(item): json.loads(item.value_json) for item in one.history.item} for one in found]
    seen = [row for row in rows if "compress/distillation/loss/soft_targets" in row]
    assert len(seen) == 8
    assert all(0 <= row["compress/distillation/agreement"] <= 1 for row in seen)
