"""A small language model of characters, as a plain Lightning run that knows nothing of compression."""

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchmetrics import MeanMetric

from lightning_compress._lightning import LightningDataModule, LightningModule

SHARES = (0.9, 0.05)


class Block(nn.Module):
    """Attention to what came before, then two layers at each place; both beside a shortcut, and normalised first."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor) -> Tensor:
        states = states + self._dropped(self._attention(self.norm1(states)))
        return states + self._dropped(self.wide(self.norm2(states)))

    def _attention(self, states: Tensor) -> Tensor:
        query, key, value = self.inputs(states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _dropped(self, states: Tensor) -> Tensor:
        return nn.functional.dropout(states, self.dropout, self.training)


class CharacterModel(LightningModule):
    """A causal transformer: logits of the next character at each place, shape `(batch, length, vocabulary)`.

    Args:
        vocabulary: number of different characters.
        layers: blocks, `blocks.0` and on.
        width: of the states between them; heads are 32 wide.
        length: the longest text it reads at a time.
        learning_rate: the peak of one-cycle AdamW.
        weight_decay: of AdamW.
        dropout: share of what each half of a block adds that is dropped in training.

    Logs `train_loss` in nats; `val_bits` and `test_bits` per character.
    """

    def __init__(
        self,
        vocabulary: int,
        layers: int = 4,
        width: int = 128,
        length: int = 128,
        learning_rate: float = 0.003,
        weight_decay: float = 0.01,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, width // 32, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.val_nats, self.test_nats = MeanMetric(), MeanMetric()

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(self.tokens(tokens) + places)))  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.val_nats.update(self._loss(batch), weight=batch[0].numel())

    def on_validation_epoch_end(self) -> None:
        self.log("val_bits", self.val_nats.compute() / math.log(2), prog_bar=True)
        self.val_nats.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.test_nats.update(self._loss(batch), weight=batch[0].numel())

    def on_test_epoch_end(self) -> None:
        self.log("test_bits", self.test_nats.compute() / math.log(2))
        self.test_nats.reset()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, following = batch
        return nn.functional.cross_entropy(self(tokens).flatten(0, 1), following.flatten())


class Characters(LightningDataModule):
    """A text by its characters, as `(tokens, next tokens)` of shape `(batch, length)`: 90 % to train on, 5 %, 5 %.

    Args:
        text: whatever is to be learned; None: what Python's `help` says of the language, some 500,000 characters.
        length: characters of one sample. Training samples begin anywhere; the others lie side by side, and what came
            before a sample is not known in it.
        batch_size: samples per batch.
        batches: training batches in what counts as an epoch.
    """

    def __init__(self, text: str | None = None, length: int = 128, batch_size: int = 64, batches: int = 100) -> None:
        super().__init__()
        text = python_topics() if text is None else text
        self.length, self.batch_size, self.batches = length, batch_size, batches
        self.alphabet = sorted(set(text))
        number = {character: place for place, character in enumerate(self.alphabet)}
        self.tokens = torch.tensor([number[character] for character in text])
        train, validation = (int(share * len(text)) for share in SHARES)
        self.parts = torch.split(self.tokens, [train, validation, len(text) - train - validation])
        if min(map(len, self.parts)) <= length:
            raise ValueError(f"A part of the text has {min(map(len, self.parts))} characters: it needs over {length}.")

    def train_dataloader(self) -> "DataLoader[Any]":
        samples = _Samples(self.parts[0], self.length, step=1)
        chance = RandomSampler(samples, num_samples=self.batches * self.batch_size)
        return DataLoader(samples, self.batch_size, sampler=chance, collate_fn=_as_is)

    def val_dataloader(self) -> "DataLoader[Any]":
        return self._whole(self.parts[1])

    def test_dataloader(self) -> "DataLoader[Any]":
        return self._whole(self.parts[2])

    def _whole(self, part: Tensor) -> "DataLoader[Any]":
        return DataLoader(_Samples(part, self.length, step=self.length), 2 * self.batch_size, collate_fn=_as_is)


def python_topics() -> str:
    """What Python's `help` says of its topics; English, and another text in each version of Python."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))


class _Samples(Dataset[tuple[Tensor, Tensor]]):
    """Stretches of a text, and the same one character on; a whole batch by one indexing operation."""

    def __init__(self, tokens: Tensor, length: int, step: int) -> None:
        self.tokens, self.step = tokens, step
        self.places = torch.arange(length + 1)

    def __len__(self) -> int:
        return (len(self.tokens) - len(self.places)) // self.step + 1

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        found = self.tokens[torch.tensor(indices)[:, None] * self.step + self.places]
        return found[:, :-1], found[:, 1:]


def _as_is(batch: Any) -> Any:
    return batch
