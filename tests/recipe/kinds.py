"""What each ready recipe is tried on: a small network of its kind, its data, and a run of 42 steps in epochs of 3."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Recipe
from lightning_compress.recipe.builtin import builtin_recipes
from lightning_compress.recipes.characters import Block

EPOCHS, BATCHES, CLASSES = 14, 3, 4  # at 3 steps an epoch, hardly any share of the run falls on the end of an epoch
STEPS = EPOCHS * BATCHES
QUIETLY = ["report.latency=False", "report.print_table=False"]


class Text(nn.Module):
    """Two blocks of four heads; what they pass on is as wide as the embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(12, 16), nn.Linear(16, CLASSES)
        self.blocks = nn.Sequential(*(Block(16, heads=4, dropout=0.0) for _ in range(2)))

    def forward(self, tokens):
        return self.head(self.blocks(self.tokens(tokens)).mean(1))


class Rows(nn.Module):
    """A column of categories, written as numbers like the others, and an MLP of 32 and 16 neurons."""

    def __init__(self):
        super().__init__()
        self.categories, self.hidden = nn.Embedding(5, 4), nn.Linear(12, 32)
        self.rest = nn.Sequential(nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, rows):
        known = torch.cat([self.categories(rows[:, 0].long()), rows[:, 1:]], 1)
        return self.rest(self.hidden(known))


class Series(nn.Module):
    """A convolution over time before a GRU."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.gru, self.head = nn.GRU(16, 16, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, series):
        features = self.norm(self.conv(series)).relu().transpose(1, 2)
        return self.head(self.gru(features)[0][:, -1])


def images():
    """Two convolutions, of 8 and of 16 channels."""
    first = [nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


@dataclass(frozen=True)
class Kind:
    """A network, and the shape of one sample; where `words` is above 0, of whole numbers below it."""

    network: type[nn.Module]
    shape: tuple[int, ...]
    words: int = 0

    def loader(self):
        """The same batches in the same order in every epoch."""
        generator = torch.Generator().manual_seed(0)
        shape = (8 * BATCHES, *self.shape)
        samples = torch.randn(shape, generator=generator)
        if self.words:
            samples = torch.randint(self.words, shape, generator=generator)
        if self.network is Rows:
            samples[:, 0] = torch.randint(5, shape[:1], generator=generator)
        labels = torch.randint(CLASSES, shape[:1], generator=generator)
        return DataLoader(TensorDataset(samples, labels), batch_size=8)


IMAGES = Kind(images, (4, 6, 6))
KINDS = {"transformer": Kind(Text, (8,), words=12), "tabular": Kind(Rows, (9,)), "time_series": Kind(Series, (4, 12))}


def kind_of(name):
    """What the ready recipe of that name is tried on."""
    return KINDS.get(name, IMAGES)


def callbacks(name, lightning):
    """Those of a ready recipe, with a report that takes no time."""
    path = builtin_recipes()[name]
    quietly = QUIETLY if "CompressionReport" in path.read_text(encoding="utf-8") else []
    return Recipe.load(path, overrides=quietly).callbacks(lightning)


def module_of(pl, name):
    """A module that knows nothing of compression, the same each time; it draws nothing by chance."""

    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(1)
                self.net = kind_of(name).network()

        def forward(self, batch):
            return self.net(batch)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            total = int(self.trainer.estimated_stepping_batches)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=total)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Classifier()
