"""Channels leave in runs of every kind: precision, accumulation, clipping, schedulers, averages, several optimizers."""

import pytest
import torch
from torch import nn

from lightning_compress import ChannelPruning


def channels(**arguments):
    return ChannelPruning(
        **{"sparsity": 0.5, "criterion": "taylor_activations", "begin": 2, "end": 6, "every": 2} | arguments
    )


def watch(pl):
    """The weights of the first layer after each step, and the losses."""

    class Watch(pl.Callback):
        def __init__(self):
            self.weights, self.losses = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            self.weights.append(pl_module.net[0].weight.detach().clone())
            self.losses.append(float(outputs["loss"]))

    return Watch()


def check(trainer, module, seen, width=8):
    """Thin, with what optimizers remember; still learning; and never out of hand."""
    assert (module.net[0].out_features, module.net[-1].in_features) == (width, width)
    remembered = [(state["exp_avg"], one) for optimizer in trainer.optimizers for one, state in optimizer.state.items()]
    assert all(momentum.shape == one.shape for momentum, one in remembered)
    assert {one for _, one in remembered} == set(module.parameters())
    thin = [one for one in seen.weights if len(one) == width]
    assert len(thin) > 2
    assert (thin[0] != thin[-1]).any(1).all()  # every unit
    assert torch.tensor(seen.losses).isfinite().all()


RUNS = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("limits", RUNS.values(), ids=RUNS)
def test_a_run_of_this_kind_gets_thin_and_learns_on(limits, pl, make_module, make_trainer, loader):
    module, seen = make_module(), watch(pl)
    trainer = make_trainer([channels(), seen], max_epochs=2, **limits)
    trainer.fit(module, loader)
    check(trainer, module, seen)


@pytest.mark.parametrize("kind", ["by step", "on a plateau"])
def test_a_scheduler_goes_on_as_if_nothing_had_gone(kind, pl, make_module, make_trainer, loader):
    class Scheduled(make_module):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            if kind == "by step":
                scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=16)
            else:  # whatever the loss is, it is not better by so much
                scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=100.0)
            config = {"scheduler": scheduler, "interval": "step" if kind == "by step" else "epoch"}
            return {"optimizer": optimizer, "lr_scheduler": config | {"monitor": "train_loss"}}

    class Rates(pl.Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, *_):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    plain, ours, seen, module = Rates(), Rates(), watch(pl), Scheduled()
    make_trainer([plain], max_epochs=2).fit(Scheduled(), loader)
    trainer = make_trainer([channels(), ours, seen], max_epochs=2)
    trainer.fit(module, loader)
    check(trainer, module, seen)
    assert ours.rates == plain.rates
    assert (len(set(ours.rates)) > 10) == (kind == "by step")


def test_an_average_inside_the_module_gets_thin_and_follows(pl, make_module, make_trainer, loader):
    class Averaged(make_module):
        def __init__(self):
            super().__init__()
            self.average = torch.optim.swa_utils.AveragedModel(
                self.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
            )

        def on_train_batch_end(self, *_):
            self.average.update_parameters(self.net)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), lr=0.01)

    module = Averaged()
    make_trainer([channels(targets="net.*")], max_epochs=1).fit(module, loader)
    assert [tuple(one.shape) for one in module.average.module.parameters()] == [(8, 8), (8,), (3, 8), (3,)]
    distance = (module.average.module[0].weight - module.net[0].weight).abs()
    assert 0 < distance.max() < 0.02  # half of the way remains of each step, which is 0.01 at most


def gan(make_module, both):
    """A generator and its critic, each with an optimizer, in turns."""

    class Gan(make_module):
        def __init__(self):
            super().__init__(net=lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
            self.critic = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(), nn.Linear(6, 1))
            self.automatic_optimization = False

        def forward(self, z):
            made = self.net(z)
            return (made, self.critic(made)) if both else made

        def training_step(self, batch, batch_idx):
            for number, optimizer in enumerate(self.optimizers()):
                self.toggle_optimizer(optimizer)
                made = self(batch[0])[0] if both else self(batch[0])
                real = self.critic(batch[0][:, :4]).mean()
                loss = self.critic(made.detach()).mean() - real if number else -self.critic(made).mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)
            return loss.detach()

        def configure_optimizers(self):
            return torch.optim.Adam(self.net.parameters()), torch.optim.Adam(self.critic.parameters())

    return Gan()


@pytest.mark.parametrize("criterion", ["taylor", "taylor_activations"])
@pytest.mark.parametrize("batches", [8, 3])  # the end comes within the last of 3
def test_of_two_networks_in_turns_one_gets_thin(criterion, batches, pl, make_module, make_trainer, loader):
    """Steps are counted of both optimizers, so that moments come in the middle of a batch."""
    module, ours, seen = gan(make_module, both=True), channels(targets="net.*", criterion=criterion, every=1), watch(pl)
    trainer = make_trainer([ours, seen], max_epochs=1, limit_train_batches=batches)
    trainer.fit(module, loader)
    assert ours.reached
    assert [one.out_features for one in (*module.net, *module.critic) if isinstance(one, nn.Linear)] == [8, 4, 6, 1]
    if batches == 8:
        check(trainer, module, seen)


def test_a_network_that_forward_does_not_call_is_refused_with_what_to_do(make_module, make_trainer, loader):
    module = gan(make_module, both=False)
    with pytest.raises(ValueError, match="'critic.0', 'critic.2', which the module's forward does not call.*return"):
        make_trainer([channels(targets="net.*")], max_epochs=1).fit(module, loader)
    assert module.net[0].out_features == 16


@pytest.mark.parametrize(("criterion", "batches"), [("taylor", 1), ("taylor_activations", 2)])
def test_a_cut_that_is_due_late_in_a_batch_waits_if_nothing_was_seen_of_it(
    criterion, batches, make_module, make_trainer, loader
):
    class Steps(make_module):
        """Three steps a batch, of one optimizer."""

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(3):
                self.optimizers().zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                self.optimizers().step()

    module, ours = Steps(), channels(criterion=criterion, end=3)
    make_trainer([ours], max_epochs=1, limit_train_batches=batches).fit(module, loader)
    assert ours.reached
    assert module.net[0].out_features == 8
