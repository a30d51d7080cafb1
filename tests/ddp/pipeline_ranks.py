"""Two gloo processes on the CPU through a whole pipeline, to its files. Run by test_pipeline_ranks.py."""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    ChannelPruning,
    CompressionReport,
    Distillation,
    FineTuning,
    Pruning,
    QuantizationAwareTraining,
)
from lightning_compress.core.distributed import tensor_hash
from lightning_compress.quantization.lowering.lower import lower

NAME = "pipeline"


def run(pl, folder):
    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    report = CompressionReport(export="model.onnx", runs=3, seconds=0.05, print_table=False)
    callbacks = [
        FineTuning(freeze="net.2", end=2, name="freeze"),
        ChannelPruning(sparsity=0.5, begin=2, end=4, every=1),
        Pruning(0.5, begin=4, end=8, every=2),
        Distillation("self@16%", begin=3),
        QuantizationAwareTraining(begin=9),
        report,
    ]
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator))
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, log_every_n_steps=1, callbacks=callbacks,
        logger=pl.loggers.CSVLogger(folder), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    module = Classifier()
    trainer.fit(module, DataLoader(data, batch_size=8))
    told = report.report
    seen = {
        "digest": tensor_hash(module.parameters()),
        "width": module.net[0].out_features,
        "files": [path.name for path in report.files],
        "boundaries": [] if told is None else [(one.step, one.what) for one in told.boundaries],
        "off": None if told is None else off(module, report.files[2]),
    }
    return seen, trainer.global_rank


def off(module, path):
    """How far the file is from the module on new data, over the largest output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    with torch.no_grad():
        expected = lower(module).module(batch)
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    lightning, folder = import_module(sys.argv[1]), Path(sys.argv[2])
    seen, rank = run(lightning, folder)
    (folder / f"{NAME}-{rank}.json").write_text(json.dumps(seen))
