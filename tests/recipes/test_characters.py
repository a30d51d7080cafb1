import math

import pytest
import torch

from lightning_compress._lightning import Trainer
from lightning_compress.recipes.characters import CharacterModel, Characters, python_topics

TEXT = "".join(chr(97 + (place * place) % 23) for place in range(2000))


def small(**arguments):
    return CharacterModel(vocabulary=23, layers=2, width=32, length=16, **arguments)


def test_half_the_layers_are_about_half_the_parameters():
    # By hand, of a block: two norms, query, key and value, output, and the two wide layers.
    width = 128
    block = (
        4 * width + 3 * width * (width + 1) + width * (width + 1) + 4 * width * (width + 1) + width * (4 * width + 1)
    )
    rest = 100 * width + 128 * width + 2 * width + 100 * (width + 1)
    for layers in (2, 4):
        module = CharacterModel(vocabulary=100, layers=layers)
        assert sum(parameter.numel() for parameter in module.parameters()) == layers * block + rest


def test_nothing_is_known_of_what_follows():
    torch.manual_seed(0)
    module, tokens = small().eval(), torch.randint(0, 23, (2, 16))
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 23
    before, after = module(tokens), module(changed)
    assert before.shape == (2, 16, 23)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-6)


def test_the_text_is_split_by_position_and_shifted_by_one():
    data = Characters(TEXT, length=16, batch_size=8, batches=5)
    assert [len(part) for part in data.parts] == [1800, 100, 100]
    assert "".join(data.alphabet[token] for token in torch.cat(data.parts)) == TEXT
    training = list(data.train_dataloader())
    assert len(training) == 5
    for tokens, following in training:
        assert tokens.shape == following.shape == (8, 16)
        assert torch.equal(tokens[:, 1:], following[:, :-1])
        for one, after in zip(tokens, following, strict=True):
            words = "".join(data.alphabet[token] for token in [*one, after[-1]])
            assert words in TEXT[:1800]
    whole = [tokens for tokens, _ in data.test_dataloader()]
    assert torch.equal(torch.cat(whole).flatten(), data.parts[2][:96])  # six samples side by side


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="has 5 characters: it needs over 16"):
        Characters(TEXT[:100], length=16)


def test_learns_a_text_and_measures_it_in_bits(tmp_path):
    torch.manual_seed(0)
    data, module = Characters(TEXT, length=16, batch_size=16, batches=30), small(learning_rate=0.01, dropout=0.0)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    (measured,) = trainer.test(module, datamodule=data, verbose=False)
    module.eval()
    with torch.no_grad():
        nats = [
            -module(tokens).log_softmax(-1).gather(-1, following[..., None]).flatten()
            for tokens, following in data.test_dataloader()
        ]
    assert measured["test_bits"] == pytest.approx(torch.cat(nats).mean().item() / math.log(2), rel=1e-5)
    assert measured["test_bits"] < 3  # log2(23) is 4.5, and the text repeats itself


def test_the_shipped_text_is_english_and_long():
    text = python_topics()
    assert len(text) > 300_000
    assert "statement" in text
