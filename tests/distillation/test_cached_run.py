"""A run whose teacher's outputs are computed once and read from disk."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_compress import Distillation


class Counting(nn.Module):
    """A teacher that counts the samples it is asked about."""

    def __init__(self, seed=7):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        self.samples = 0

    def forward(self, x):
        self.samples += len(x)
        return self.inner(x)


@pytest.fixture
def shuffled(loader):
    def make(dataset=None, **arguments):
        generator = torch.Generator().manual_seed(5)
        return DataLoader(dataset or loader.dataset, batch_size=8, shuffle=True, generator=generator, **arguments)

    return make


def close(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in pairs)


def test_the_teacher_is_asked_once_about_each_sample(make_module, make_trainer, shuffled, tmp_path):
    teacher, again, plain = Counting(), Counting(), Counting()
    cached, resumed, live = make_module(), make_module(), make_module()
    path = tmp_path / "cache"
    make_trainer([Distillation(teacher, cache=path)], max_epochs=3).fit(cached, shuffled())
    assert teacher.samples == 64
    make_trainer([Distillation(again, cache=path)], max_epochs=3).fit(resumed, shuffled())
    assert again.samples == 0
    make_trainer([Distillation(plain)], max_epochs=3).fit(live, shuffled())
    assert plain.samples == 3 * 64
    assert close(cached, live)
    assert close(cached, resumed)


def test_the_users_random_streams_do_not_notice(make_module, make_trainer, loader, tmp_path):
    states = []
    for callbacks in ([Distillation(Counting(), cache=tmp_path / "cache")], [Distillation(Counting())]):
        torch.manual_seed(3)
        make_trainer(callbacks, max_epochs=1).fit(make_module(), DataLoader(loader.dataset, 8, shuffle=True))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_layers_are_kept_too(make_module, make_trainer, shuffled, tmp_path):
    losses = {("net.0", "inner.0"): "projected_hint", "output": "kl_divergence"}
    cached, live = make_module(), make_module()
    make_trainer([Distillation(Counting(), losses=losses, cache=tmp_path / "cache")], max_epochs=2).fit(
        cached, shuffled()
    )
    make_trainer([Distillation(Counting(), losses=losses)], max_epochs=2).fit(live, shuffled())
    assert close(cached, live)


@pytest.mark.parametrize("form", ["float16", "top-2"])
def test_smaller_forms_are_near(form, make_module, make_trainer, shuffled, tmp_path):
    cached, live = make_module(), make_module()
    arguments = {"losses": "kl_divergence", "temperature": 1.0}
    callback = Distillation(Counting(), cache=tmp_path / "cache", cache_form=form, **arguments)
    make_trainer([callback], max_epochs=1).fit(cached, shuffled())
    make_trainer([Distillation(Counting(), **arguments)], max_epochs=1).fit(live, shuffled())
    for one, other in zip(cached.parameters(), live.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=5e-3, rtol=5e-2)


class Noisy(Dataset):
    """Samples that come out differently each time; or, seeded by their index, alike."""

    def __init__(self, dataset, seeded):
        self.dataset, self.seeded = dataset, seeded

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        generator = torch.Generator().manual_seed(index) if self.seeded else None
        return x + 0.1 * torch.randn(x.shape, generator=generator), y


def test_a_random_augmentation_is_refused(make_module, make_trainer, shuffled, loader, tmp_path):
    trainer = make_trainer([Distillation(Counting(), cache=tmp_path / "cache")], max_epochs=1)
    with pytest.raises(ValueError, match="8 of 8 samples came out differently"):
        trainer.fit(make_module(), shuffled(Noisy(loader.dataset, seeded=False)))
    assert not list(tmp_path.glob("cache*"))


def test_an_augmentation_that_is_seeded_by_the_sample_is_kept(make_module, make_trainer, shuffled, loader, tmp_path):
    teacher = Counting()
    data = Noisy(loader.dataset, seeded=True)
    make_trainer([Distillation(teacher, cache=tmp_path / "cache")], max_epochs=2).fit(make_module(), shuffled(data))
    assert teacher.samples == 64


def test_other_teachers_and_other_data_are_refused(make_module, make_trainer, shuffled, loader, tmp_path):
    def fit(teacher, dataset=None):
        trainer = make_trainer([Distillation(teacher, cache=tmp_path / "cache")], max_epochs=1)
        trainer.fit(make_module(), shuffled(dataset))

    fit(Counting())
    with pytest.raises(ValueError, match="is of the teacher"):
        fit(Counting(seed=8))
    x, y = loader.dataset.tensors
    with pytest.raises(ValueError, match="of 64 samples, but your data set has 32"):
        fit(Counting(), TensorDataset(x[:32], y[:32]))
    with pytest.raises(ValueError, match="samples are not in the cache"):
        fit(Counting(), TensorDataset(x + 1, y))


def test_an_input_that_the_step_computes_is_refused(make_module, make_trainer, shuffled, tmp_path):
    module = make_module()
    module.training_step = lambda batch, batch_idx: F.cross_entropy(module.net(batch[0] * 2), batch[1])
    trainer = make_trainer([Distillation(Counting(), cache=tmp_path / "cache")], max_epochs=1)
    with pytest.raises(ValueError, match="a tensor that training_step computes"):
        trainer.fit(module, shuffled())


def test_a_stream_of_samples_is_refused(make_module, make_trainer, loader, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(loader.dataset)

    trainer = make_trainer([Distillation(Counting(), cache=tmp_path / "cache")], max_epochs=1)
    with pytest.raises(ValueError, match="map-style"):
        trainer.fit(make_module(), DataLoader(Stream(), batch_size=8))


def test_a_cache_of_another_form_or_other_layers_is_refused(make_module, make_trainer, shuffled, tmp_path):
    def fit(**arguments):
        trainer = make_trainer([Distillation(Counting(), cache=tmp_path / "cache", **arguments)], max_epochs=1)
        trainer.fit(make_module(), shuffled())

    fit()
    with pytest.raises(ValueError, match="another form than cache_form='top-2'"):
        fit(cache_form="top-2")
    with pytest.raises(ValueError, match=r"no outputs of inner.0, only of output"):
        fit(losses={("net.0", "inner.0"): "projected_hint", "output": "kl_divergence"})


def test_workers_change_nothing(make_module, make_trainer, shuffled, tmp_path):
    cached, live = make_module(), make_module()
    callback = Distillation(Counting(), cache=tmp_path / "cache")
    make_trainer([callback], max_epochs=2).fit(cached, shuffled(num_workers=1))
    make_trainer([Distillation(Counting())], max_epochs=2).fit(live, shuffled(num_workers=1))
    assert close(cached, live)
