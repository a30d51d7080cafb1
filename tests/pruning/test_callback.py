"""When Pruning acts, what it says and saves, and what it refuses."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import Pruning
from tests.conftest import sgd


def sparsities(pl, pruning):
    """A callback that notes the sparsity after each batch."""

    class Note(pl.Callback):
        def __init__(self):
            self.by_batch = []

        def on_train_batch_end(self, trainer, *_):
            self.by_batch.append(round(pruning.sparsity, 4))

    return Note()


def test_the_sparsity_after_n_steps_is_that_of_the_schedule_at_n(pl, make_module, make_trainer, loader):
    pruning = Pruning(0.8, schedule="linear", begin=4, end=20, every=4)
    note = sparsities(pl, pruning)
    make_trainer([pruning, note], max_epochs=3).fit(make_module(), loader)
    # 128 and 48 weights; (step - 4) / 16 * 0.8 of each, rounded.
    expected = {4: 0, 8: (26 + 10) / 176, 12: (51 + 19) / 176, 16: (77 + 29) / 176, 20: (102 + 38) / 176}
    for step in range(1, 25):
        latest = max((moment for moment in expected if moment <= step), default=None)
        assert note.by_batch[step - 1] == (0 if latest is None else round(expected[latest], 4)), step


def test_one_shot_prunes_at_begin(pl, make_module, make_trainer, loader):
    pruning = Pruning(0.5, schedule="constant", begin="1 epochs", end="2 epochs")
    note = sparsities(pl, pruning)
    make_trainer([pruning, note], max_epochs=3).fit(make_module(), loader)
    assert note.by_batch == [0.0] * 7 + [0.5] * 17


def test_accumulation_counts_optimizer_steps(pl, make_module, make_trainer, loader):
    pruning = Pruning(0.5, schedule="constant", begin=2, end=3)
    note = sparsities(pl, pruning)
    make_trainer([pruning, note], max_epochs=1, accumulate_grad_batches=3).fit(make_module(), loader)
    assert note.by_batch == [0.0] * 5 + [0.5] * 3  # steps after batches 3, 6 and 8


class Stream(IterableDataset):
    """Samples without a length."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(32):
            yield torch.randn(8, generator=generator), torch.randint(0, 3, (), generator=generator)


def test_a_loader_of_unknown_length_counts_epochs_or_steps(pl, make_module, make_trainer):
    by_epochs, by_steps = Pruning(0.5), Pruning(0.5)
    make_trainer([by_epochs], max_epochs=10).fit(make_module(), DataLoader(Stream(), batch_size=8))
    assert (by_epochs.window.unit, by_epochs.window.begin, by_epochs.window.end) == ("epochs", 1, 7)
    make_trainer([by_steps], max_epochs=-1, max_steps=20).fit(make_module(), DataLoader(Stream(), batch_size=8))
    assert (by_steps.window.unit, by_steps.window.begin, by_steps.window.end) == ("steps", 2, 14)
    assert by_epochs.sparsity == by_steps.sparsity == 0.5


def test_limited_batches_and_steps_shorten_the_run(pl, make_module, make_trainer, loader):
    limited, stopped = Pruning(0.5, begin="50%", end="100%"), Pruning(0.5, begin="50%", end="100%")
    make_trainer([limited], max_epochs=4, limit_train_batches=3).fit(make_module(), loader)
    assert (limited.window.begin, limited.window.end, limited.sparsity) == (6, 12, 0.5)
    make_trainer([stopped], max_epochs=4, max_steps=10).fit(make_module(), loader)
    assert (stopped.window.begin, stopped.window.end, stopped.sparsity) == (5, 10, 0.5)


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"max_epochs": -1}, "this run has no end"), ({"max_time": {"hours": 1}}, "only max_time ends this run")],
)
def test_a_fraction_of_an_endless_run_is_refused_before_the_first_step(
    limits, message, make_module, make_trainer, loader
):
    module = make_module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        make_trainer([Pruning()], **limits).fit(module, loader)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_steps_work_in_an_endless_run(make_module, make_trainer, loader):
    pruning = Pruning(0.5, begin=2, end=10, every=2)
    make_trainer([pruning], max_time={"seconds": 1}).fit(make_module(), loader)
    assert pruning.sparsity == 0.5


def test_accumulation_that_changes_by_epoch_counts_batches(pl, make_module, make_trainer, loader):
    pruning = Pruning(0.5)
    scheduler = pl.callbacks.GradientAccumulationScheduler({0: 4, 1: 1})
    make_trainer([pruning, scheduler], max_epochs=3).fit(make_module(), loader)
    assert pruning.window.unit == "batches"
    assert pruning.sparsity == 0.5


def test_warns_if_the_run_ends_before_the_phase(make_module, make_trainer, loader):
    with pytest.warns(UserWarning, match="'pruning' ends at 500, which is step 500, but this run has only 16 steps"):
        make_trainer([Pruning(begin=0, end=500)], max_epochs=2).fit(make_module(), loader)


# Several fits ---------------------------------------------------------------------------------------------------------


def test_a_second_fit_of_the_module_keeps_its_masks_from_the_first_step_on(pl, make_module, make_trainer, loader):
    pruning, module = Pruning(0.5), make_module(sgd)
    make_trainer([pruning], max_epochs=3).fit(module, loader)
    masks = pruning.masks
    note = sparsities(pl, pruning)
    make_trainer([pruning, note], max_epochs=2).fit(module, loader)
    assert set(note.by_batch) == {0.5}
    assert all(torch.equal(mask, masks[name]) for name, mask in pruning.masks.items())
    make_trainer([pruning], max_epochs=2, limit_train_batches=2).test(module, loader, verbose=False)
    assert pruning.sparsity == 0.5


def test_one_trainer_may_go_on_with_more_epochs(make_module, make_trainer, loader):
    pruning, module = Pruning(0.5), make_module(sgd)
    trainer = make_trainer([pruning], max_epochs=2)
    trainer.fit(module, loader)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader)
    assert trainer.global_step == 32
    assert pruning.sparsity == 0.5


def test_iterative_pruning_goes_deeper_fit_by_fit(make_module, make_trainer, loader):
    module = make_module(sgd)
    reached = []
    for final in (0.5, 0.75):
        pruning = Pruning(final)
        make_trainer([pruning], max_epochs=2).fit(module, loader)
        reached.append(pruning.sparsity)
    assert reached == [0.5, 0.75]


def test_pruning_may_be_added_to_a_run_that_is_resumed(pl, make_module, make_trainer, loader, tmp_path):
    dense = make_trainer(max_epochs=1)
    dense.fit(make_module(), loader)
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    pruning = Pruning(0.5)
    make_trainer([pruning], max_epochs=3).fit(make_module(), loader, ckpt_path=tmp_path / "dense.ckpt")
    assert pruning.sparsity == 0.5


def test_weights_only_checkpoints_carry_the_zeros(pl, make_module, make_trainer, loader, tmp_path):
    module = make_module()
    trainer = make_trainer([Pruning(0.5)], max_epochs=2)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    again = type(module).load_from_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert (again.net[0].weight == 0).sum() == 64


# What is best ---------------------------------------------------------------------------------------------------------


def worse_with_sparsity(make_module, pruning):
    """A module whose validation says that the dense weights are best."""

    class Pessimist(make_module):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", pruning.sparsity + 0.001 * self.current_epoch)

        test_step = validation_step

    return Pessimist()


@pytest.mark.parametrize("top", [1, 2])
def test_the_best_checkpoint_is_never_a_dense_one(top, pl, make_module, make_trainer, loader, tmp_path):
    pruning = Pruning(0.5, end="50%")
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=top)
    trainer = make_trainer([pruning, checkpoint], max_epochs=6, enable_checkpointing=True)
    module = worse_with_sparsity(make_module, pruning)
    trainer.fit(module, loader, loader)
    best = torch.load(checkpoint.best_model_path, weights_only=True)
    assert (best["state_dict"]["net.0.weight"] == 0).sum() == 64
    assert best["epoch"] == 2  # the first one whose end lies behind the phase: step 24 of 48
    assert len(list(tmp_path.glob("*.ckpt"))) == top
    trainer.test(module, loader, ckpt_path="best", verbose=False)
    assert (module.net[0].weight == 0).sum() == 64


def test_the_gate_can_be_left_open(pl, make_module, make_trainer, loader, tmp_path):
    pruning = Pruning(0.5, end="50%", gate_best=False)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer([pruning, checkpoint], max_epochs=6, enable_checkpointing=True)
    trainer.fit(worse_with_sparsity(make_module, pruning), loader, loader)
    assert torch.load(checkpoint.best_model_path, weights_only=True)["epoch"] == 0


def test_early_stopping_waits_for_the_end_of_the_phase(pl, make_module, make_trainer, loader):
    pruning = Pruning(0.5, end="50%")
    stopping = pl.callbacks.EarlyStopping("val_loss", patience=1)
    trainer = make_trainer([stopping, pruning], max_epochs=8)
    trainer.fit(worse_with_sparsity(make_module, pruning), loader, loader)
    assert pruning.sparsity == 0.5
    assert trainer.current_epoch == 5  # compares from epoch 3 on, when the phase is over; the next one is worse


def test_the_gate_is_not_passed_twice_when_resumed(pl, make_module, make_trainer, loader, tmp_path):
    def run(epochs, **fit):
        pruning = Pruning(0.5, end=20, begin=2, every=2)
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, "best", monitor="val_loss", enable_version_counter=False)
        trainer = make_trainer([pruning, checkpoint], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(worse_with_sparsity(make_module, pruning), loader, loader, **fit)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return checkpoint

    first = run(4)
    second = run(6, ckpt_path=tmp_path / "4.ckpt")
    assert second.best_model_score == first.best_model_score
    assert first.best_model_score.isfinite()


# What is logged -------------------------------------------------------------------------------------------------------


def test_logs_to_whatever_loggers_there_are(pl, make_module, make_trainer, loader, tmp_path):
    csv = pl.loggers.CSVLogger(tmp_path)
    pruning = Pruning(0.5, begin=2, end=10, every=3)
    trainer = make_trainer([pruning], max_epochs=2, logger=csv)
    trainer.fit(make_module(), loader)
    rows = [line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()]
    column = rows[0].index("compress/pruning/sparsity")
    logged = [float(row[column]) for row in rows[1:] if row[column]]
    assert logged == sorted(logged)
    assert len(logged) >= 4
    assert logged[-1] == 0.5
    assert trainer.callback_metrics["compress/pruning/sparsity"] == 0.5
    assert trainer.callback_metrics["compress/pruning/layer_sparsity/net.0.weight"] == 0.5


def test_says_what_it_covers_and_what_not(make_module, make_trainer, loader, caplog):
    make_trainer([Pruning(0.5, ignore="net.2")], max_epochs=1).fit(make_module(), loader)
    assert (
        "'pruning' prunes 1 weights, 65.6% of the model's parameters; left out: net.2.weight (ignored)" in caplog.text
    )


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final_sparsity": 90}, r"final_sparsity is a fraction in \[0, 1\), but is 90. For 90 % write 0.9"),
        ({"final_sparsity": 1.0}, "final_sparsity is a fraction"),
        ({"final_sparsity": -0.1}, "final_sparsity is a fraction"),
        ({"final_sparsity": "0.9"}, "final_sparsity is a fraction"),
        ({"initial_sparsity": 0.95}, "initial_sparsity=0.95 is above final_sparsity=0.9"),
        ({"begin": "70%", "end": "10%"}, "begin='70%' is not before end='10%'"),
        ({"every": 0}, "every=0 never goes on"),
        ({"criterion": "magnitud"}, "No 'magnitud' in .*criteria. Did you mean 'magnitude'"),
        ({"distribution": "glbal"}, "Did you mean 'global'"),
        ({"schedule": "cubik"}, "Did you mean 'cubic'"),
        ({"schedule": lambda progress: 2 * progress}, "returns the share of the way"),
        ({"granularity": "channel"}, "No granularity 'channel'. Choose one of"),
        ({"granularity": "4:2"}, "N:M with 0 < N < M"),
        (
            {"granularity": "2:4"},
            "prunes exactly 0.5 of the weights, but final_sparsity is 0.9. Write final_sparsity=0.5",
        ),
        ({"granularity": "2:4", "final_sparsity": 0.5, "distribution": "erk"}, "fixes the sparsity of every layer"),
        ({"criterion": lambda weight, gradd: weight}, "asks for 'gradd', which nobody gathers. Did you mean 'grad'"),
        ({"criterion": "nowhere.to.be.found"}, "'nowhere.to.be.found' cannot be imported"),
        ({"overrides": {"conv1": 30}}, r"overrides\['conv1'\] is a fraction"),
        ({"name": ""}, "name must be a word"),
        ({"min_density": 2}, "min_density is a fraction"),
    ],
)
def test_refuses_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pruning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "backbone.*"}, "targets: 'backbone.*' matches no parameter. There are net.0.weight, net.0.bias"),
        ({"overrides": {"net.2.weigth": 0.3}}, "'net.2.weigth' matches no pruned weight. Did you mean 'net.2.weight'"),
        (
            {"granularity": "2:3", "final_sparsity": 1 / 3},
            r"net.0.weight: 8 inputs do not divide into groups of 3.*ignore=",
        ),
        ({"granularity": "block 4x4"}, r"net.2.weight: a matrix of 3 x 16 does not divide.*ignore=\['net.2.weight'\]"),
    ],
)
def test_refuses_before_anything_is_trained_or_written(arguments, message, make_module, make_trainer, loader, tmp_path):
    trainer = make_trainer([Pruning(**arguments)], max_epochs=1, enable_checkpointing=True)
    with pytest.raises(ValueError, match=message):
        trainer.fit(make_module(), loader, loader)
    assert trainer.global_step == 0
    assert not list(tmp_path.iterdir())


def test_refuses_two_masks_on_one_weight(make_module, make_trainer, loader):
    two = [Pruning(), Pruning(targets="net.0", name="second")]
    with pytest.raises(ValueError, match=r"'pruning' and 'second' would both prune net.0.weight"):
        make_trainer(two, max_epochs=1).fit(make_module(), loader)


def test_two_callbacks_may_share_a_model(make_module, make_trainer, loader):
    first, second = Pruning(0.5, targets="net.0"), Pruning(0.25, targets="net.2", name="second")
    make_trainer([first, second], max_epochs=2).fit(make_module(), loader)
    assert (first.sparsity, second.sparsity) == (0.5, 0.25)


def test_refuses_to_work_beside_model_pruning(pl, make_module, make_trainer, loader):
    with pytest.raises(ValueError, match="Remove ModelPruning"):
        make_trainer([Pruning(), pl.callbacks.ModelPruning("l1_unstructured", amount=0.5)]).fit(make_module(), loader)


def test_refuses_the_masks_of_another_model(make_module, make_trainer, loader, tmp_path):
    trainer = make_trainer([Pruning(0.5, begin=1, end=4)], max_epochs=1)
    trainer.fit(make_module(), loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"mask for 'net.0.weight', which is not pruned here. Resume with the targets"):
        make_trainer([Pruning(targets="net.2")], max_epochs=2).fit(
            make_module(), loader, ckpt_path=tmp_path / "last.ckpt"
        )
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["callbacks"]["lightning_compress/pruning"]["masks"]["net.0.weight"]["bits"] = torch.zeros(3).byte()
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match="in 3 bytes, but the weight has shape"):
        make_trainer([Pruning(0.5, begin=1, end=4)], max_epochs=2).fit(
            make_module(), loader, ckpt_path=tmp_path / "damaged.ckpt"
        )


def test_refuses_scores_that_are_nan(make_module, make_trainer, loader):
    pruning = Pruning(0.5, criterion=lambda weight: weight * float("nan"))
    with pytest.raises(ValueError, match="gave NaN for 'net.0.weight'"):
        make_trainer([pruning], max_epochs=2).fit(make_module(), loader)


def test_a_criterion_of_the_users_own_may_be_named_by_its_path(make_module, make_trainer, loader):
    own = "tests.pruning.own_criterion.largest_first"
    pruning, module = Pruning(0.5, criterion=own, schedule="constant", begin=1, end=5), make_module()
    largest = module.net[0].weight.abs().flatten().topk(32).indices
    make_trainer([pruning], max_epochs=1).fit(module, loader)
    assert not pruning.masks["net.0.weight"].flatten()[largest].any()
