"""Learning rates and weight decays of a phase, against loops that set them by hand and torch's own schedulers."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_compress import FineTuning
from tests.conftest import adamw, sgd
from tests.finetuning.by_hand import equal, noted, train

every_optimizer = pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
# Of the user: name -> (makes a scheduler, its interval).
SCHEDULES = {
    "none": (None, None),
    "cosine": (lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 24), "step"),
    "one-cycle": (lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=25), "step"),
    "by-epoch": (lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.3), "epoch"),
    "sequential": (
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)],
            [4],
        ),
        "step",
    ),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def scheduled(make_module, optimizer, schedule, groups=None):
    """The classifier with a scheduler of the user's."""
    make, interval = SCHEDULES[schedule]

    class Scheduled(make_module):
        def configure_optimizers(self):
            stepped = optimizer(self.parameters() if groups is None else groups(self.net))
            if make is None:
                return stepped
            return [stepped], [{"scheduler": make(stepped), "interval": interval}]

    return Scheduled(optimizer)


def by_hand_with(make_module, optimizer, schedule, loader, rates, groups=None):
    """The same in a plain loop, with these rates in its steps."""
    net = make_module().net
    stepped = optimizer(net.parameters() if groups is None else groups(net))
    make, interval = SCHEDULES[schedule]
    scheduler = None if make is None else make(stepped)
    kinds = {"schedule": scheduler} if interval == "step" else {"by_epoch": scheduler}
    return train(net, stepped, loader, 3, rates=rates, **kinds)


def curve(optimizer, schedule, count):
    """The rates that a scheduler of the user's gives, one after the other."""
    stepped = optimizer([nn.Parameter(torch.zeros(1))])
    scheduler, rates = SCHEDULES[schedule][0](stepped), []
    for _ in range(count):
        rates.append(stepped.param_groups[0]["lr"])
        stepped.step()
        scheduler.step()
    return rates


@every_optimizer
@every_schedule
def test_a_factor_and_a_warm_up_multiply_what_the_user_schedules(
    optimizer, schedule, make_module, make_trainer, loader
):
    module = scheduled(make_module, optimizer, schedule)
    tuning = FineTuning(learning_rate="x0.5", warmup=4, begin=3, end=19)
    trainer = make_trainer([tuning], max_epochs=3)
    trainer.fit(module, loader)

    def rates(step, given):
        return [rate * 0.5 * min(1.0, (step - 2) / 4) if 3 <= step < 19 else rate for rate in given]

    assert equal(module.net, by_hand_with(make_module, optimizer, schedule, loader, rates))


@every_optimizer
@every_schedule
def test_a_number_is_the_rate_of_the_phase(optimizer, schedule, make_module, make_trainer, loader):
    module = scheduled(make_module, optimizer, schedule)
    make_trainer([FineTuning(learning_rate=0.03, begin=3, end=19)], max_epochs=3).fit(module, loader)
    rates = lambda step, given: [0.03 if 3 <= step < 19 else rate for rate in given]
    assert equal(module.net, by_hand_with(make_module, optimizer, schedule, loader, rates))


@every_optimizer
@pytest.mark.parametrize("schedule", [one for one in SCHEDULES if one != "none"])
def test_a_restart_is_the_whole_schedule_over_the_phase(optimizer, schedule, make_module, make_trainer, loader):
    module = scheduled(make_module, optimizer, schedule)
    make_trainer([FineTuning(learning_rate="restart", begin=6, end=18)], max_epochs=3).fit(module, loader)
    whole = curve(optimizer, schedule, 24)
    # 24 steps, or 3 epochs, in 12 steps.
    pace = 2 if SCHEDULES[schedule][1] == "step" else 0.25
    rates = lambda step, given: [whole[int((step - 6) * pace)]] if 6 <= step < 18 else given
    assert equal(module.net, by_hand_with(make_module, optimizer, schedule, loader, rates))


@every_schedule
def test_a_rewound_rate_goes_on_as_it_did(schedule, make_module, make_trainer, loader):
    module, seen = scheduled(make_module, sgd, schedule), []
    make_trainer([FineTuning(learning_rate="rewind 2 steps", begin=12, end=20)], max_epochs=3).fit(module, loader)

    def rates(step, given):
        seen.append(given)
        return seen[step - 10] if 12 <= step < 20 else given

    assert equal(module.net, by_hand_with(make_module, sgd, schedule, loader, rates))


def test_a_restart_without_a_schedule_changes_nothing(make_module, make_trainer, loader):
    plain, module = make_module(sgd), make_module(sgd)
    make_trainer(max_epochs=2).fit(plain, loader)
    make_trainer([FineTuning(learning_rate="restart", begin=4)], max_epochs=2).fit(module, loader)
    assert equal(plain, module)


def plateaued(make_module, pl):
    class Plateaued(make_module):
        def configure_optimizers(self):
            stepped = sgd(self.parameters())
            scheduler = lr_scheduler.ReduceLROnPlateau(stepped, factor=0.5, patience=0)
            return {"optimizer": stepped, "lr_scheduler": {"scheduler": scheduler, "monitor": "worse"}}

        def on_train_epoch_end(self):
            self.log("worse", float(self.current_epoch))

    return Plateaued(sgd)


def test_a_plateau_restarts_from_the_initial_rate_and_goes_on_falling(pl, make_module, make_trainer, loader):
    module, by_hand = plateaued(make_module, pl), make_module().net
    tuning = FineTuning(learning_rate="restart", begin="2 epochs", end="4 epochs")
    watch = noted(pl, lambda trainer: trainer.optimizers[0].param_groups[0]["lr"])
    trainer = make_trainer([tuning, watch], max_epochs=5)
    trainer.fit(module, loader)
    by_user = [0.1, 0.1, 0.05, 0.025, 0.0125]  # the first epoch is the best one
    assert watch.by_batch[::8] == by_user
    by_epoch = [0.1, 0.1, 0.1 * (0.05 / 0.05), 0.1 * (0.025 / 0.05), 0.0125]
    train(by_hand, sgd(by_hand.parameters()), loader, 5, rates=lambda step, _: [by_epoch[step // 8]])
    assert equal(module.net, by_hand)


@every_optimizer
@every_schedule
def test_layers_and_patterns_have_rates_of_their_own_within_the_users_groups(
    optimizer, schedule, make_module, make_trainer, loader
):
    module = scheduled(make_module, optimizer, schedule)
    tuning = FineTuning(layer_decay=0.5, lr_multipliers={"*.bias": 2.0, "net.2": 0.25}, begin=3, end=19)
    trainer = make_trainer([tuning], max_epochs=3)
    trainer.fit(module, loader)
    factors = [0.5, 2.0 * 0.5, 0.25, 2.0]

    def groups(net):
        return [{"params": [parameter]} for parameter in net.parameters()]

    def rates(step, given):
        return [rate * factor if 3 <= step < 19 else rate for rate, factor in zip(given, factors, strict=True)]

    assert equal(module.net, by_hand_with(make_module, optimizer, schedule, loader, rates, groups))
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [4]


@every_optimizer
def test_accumulation_counts_optimizer_steps(optimizer, make_module, make_trainer, loader):
    module, by_hand = make_module(optimizer), make_module().net
    tuning = FineTuning(learning_rate="x0.1", warmup=2, begin=3, end=6)
    make_trainer([tuning], max_epochs=3, accumulate_grad_batches=3).fit(module, loader)
    factors = {3: 0.1 * 0.5, 4: 0.1, 5: 0.1}
    rates = lambda step, given: [given[0] * factors.get(step, 1.0)]
    train(by_hand, optimizer(by_hand.parameters()), loader, 3, rates=rates, accumulate=3)
    assert equal(module.net, by_hand)


@pytest.mark.parametrize(("decay", "expected"), [(0.1, 0.1), ("x0.5", 0.005), (0, 0.0)])
@every_optimizer
def test_weight_decay_changes_where_the_user_has_some(optimizer, decay, expected, make_module, make_trainer, loader):
    def groups(net):
        return [{"params": net[0].parameters()}, {"params": net[2].parameters(), "weight_decay": 0.0}]

    module, by_hand = scheduled(make_module, optimizer, "none", groups), make_module().net
    stepped = optimizer(groups(by_hand))

    def before(step):
        stepped.param_groups[0]["weight_decay"] = expected if 3 <= step < 12 else 0.01

    trainer = make_trainer([FineTuning(weight_decay=decay, begin=3, end=12)], max_epochs=2)
    trainer.fit(module, loader)
    train(by_hand, stepped, loader, 2, before=before)
    assert equal(module.net, by_hand)
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.0]


def test_checkpoints_and_users_see_their_own_groups(pl, make_module, make_trainer, loader, tmp_path):
    module = scheduled(make_module, adamw, "cosine")
    tuning = FineTuning(learning_rate="x0.1", layer_decay=0.5)
    watch = noted(pl, lambda trainer: [group["lr"] for group in trainer.optimizers[0].param_groups])
    trainer = make_trainer([tuning, watch], max_epochs=1)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert watch.by_batch == [[rate] for rate in curve(adamw, "cosine", 9)[1:]]
    (saved,) = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"]
    assert [(group["params"], group["lr"]) for group in saved["param_groups"]] == [
        ([0, 1, 2, 3], curve(adamw, "cosine", 9)[-1])
    ]


def test_the_rate_is_said(make_module, make_trainer, loader):
    trainer = make_trainer([FineTuning(learning_rate="x0.5")], max_epochs=1)
    trainer.fit(make_module(sgd), loader)
    assert trainer.callback_metrics["compress/finetuning/learning_rate"] == pytest.approx(0.05)


def adversaries(pl):
    """Two nets with an optimizer and a scheduler each, stepped by the user."""

    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            with torch.random.fork_rng():
                torch.manual_seed(1)
                self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            losses = [nn.functional.cross_entropy(net(batch[0]), batch[1]) for net in (self.one, self.two)]
            for optimizer, scheduler, loss in zip(self.optimizers(), self.lr_schedulers(), losses, strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                scheduler.step()

        def configure_optimizers(self):
            both = [sgd(self.one.parameters()), adamw(self.two.parameters())]
            return both, [lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in both]

    return Two()


@pytest.mark.parametrize("kind", ["factor", "restart", "frozen"])
def test_several_optimizers_that_the_user_steps(kind, pl, make_trainer, loader):
    module, by_hand = adversaries(pl), adversaries(pl)
    arguments = {
        "factor": {"lr_multipliers": {"one.*": 0.5, "two.bias": 0.1}},
        "restart": {"learning_rate": "restart"},
        "frozen": {"freeze": "two"},
    }[kind]
    make_trainer([FineTuning(begin="25%", end="75%", **arguments)], max_epochs=2).fit(module, loader)
    for place, net in enumerate((by_hand.one, by_hand.two)):
        stepped, seen = (sgd, adamw)[place]([{"params": [parameter]} for parameter in net.parameters()]), []
        if kind == "frozen" and place == 1:

            def forget(*_, net=net, seen=seen):
                if 4 < len(seen) <= 12:
                    net.zero_grad()

            stepped.register_step_pre_hook(forget)

        def rates(step, given, seen=seen, place=place):
            seen.append(given)
            if not 4 <= step < 12:
                return given
            factors = ((0.5, 0.5), (1.0, 0.1))[place] if kind == "factor" else (1.0, 1.0)
            base = seen[step - 4] if kind == "restart" else given
            return [rate * factor for rate, factor in zip(base, factors, strict=True)]

        train(net, stepped, loader, 2, rates=rates, schedule=lr_scheduler.ExponentialLR(stepped, 0.9))
        assert equal(getattr(module, ("one", "two")[place]), net), place
