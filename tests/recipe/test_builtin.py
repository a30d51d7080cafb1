"""Every ready recipe, in a short run of its kind, does what its first line says."""

import math

import pytest
import torch
from safetensors.torch import load_file

from lightning_compress import Distillation, Recipe, export
from lightning_compress.recipe.builtin import builtin_recipes
from tests.recipe.kinds import EPOCHS, STEPS, callbacks, kind_of, module_of


def weights(module):
    """All weights of layers but those of embeddings."""
    return {
        name: value
        for name, value in module.named_parameters()
        if value.dim() > 1 and name not in ("net.tokens.weight", "net.categories.weight")
    }


def zeros(share):
    def check(module, *_):
        found = weights(module)
        pruned, total = (sum(map(count, found.values())) for count in (lambda one: int((one == 0).sum()), torch.numel))
        assert abs(pruned - share * total) <= len(found)  # each layer rounds for itself

    return check


def two_of_every_four(module, *_):
    for value in weights(module).values():
        assert bool(((value.movedim(1, -1).reshape(-1, 4) != 0).sum(1) == 2).all())


def half_of_the_macs(module, *_):
    first, second = module.net[0].out_channels, module.net[3].out_channels
    macs = 36 * 9 * (4 * first + first * second) + 4 * second
    dense = 36 * 9 * (4 * 8 + 8 * 16) + 4 * 16
    assert 0.35 < macs / dense <= 0.5  # one channel less or more is a lot here
    assert module.net[3].weight.shape == (second, first, 3, 3)


def widths(**expected):
    def check(module, *_):
        found = dict(module.net.named_parameters())
        assert {name: tuple(found[f"{name.replace('_', '.')}.weight"].shape) for name in expected} == expected

    return check


def packed(bits, **others):
    """A file has so many bits of each weight, and of some others others."""

    def check(module, ours, seen, folder):
        export(module, folder / "model.safetensors")
        file = load_file(folder / "model.safetensors")
        for name, value in weights(module).items():
            each = others.get(name.removesuffix(".weight").replace(".", "_"), bits)
            assert file[f"{name}.codes"].numel() == math.ceil(value.numel() * each / 8)

    return check


def taught_by(step):
    """The teacher is what the module was when so many steps were done; if None, an average over all of them."""

    def check(module, ours, seen, _):
        (distillation,) = (one for one in ours if isinstance(one, Distillation))
        (tutor,) = distillation.distiller.objective.tutors
        expected = seen[step] if step is not None else average([*seen.values(), list(module.state_dict().values())])
        torch.testing.assert_close(list(tutor.teacher.module.state_dict().values()), expected)
        assert distillation.history[-1][0] == STEPS  # it taught to the end

    return check


def average(moments):
    """Of decay 0.999; what is no float is that of the last moment."""
    first, *rest = moments
    for values in rest:
        first = [
            0.999 * old + 0.001 * new if new.is_floating_point() else new
            for old, new in zip(first, values, strict=True)
        ]
    return first


def integers_in_onnx(module, ours, seen, folder):
    (example, _), *_ = module.trainer.train_dataloader
    report = export(module, folder / "model.onnx", example)
    assert report.integer_kernels
    assert not report.float_layers


# Weights of 8 bits beside activations of 8 bits take 7 of them.
PROMISES = {
    "channels": [half_of_the_macs],
    "channels_distill_int8": [half_of_the_macs, taught_by(12), packed(7), integers_in_onnx],
    "distill": [taught_by(None)],
    "lottery_ticket": [zeros(0.8)],
    "prune": [zeros(0.9)],
    "prune_2_4": [zeros(0.5), two_of_every_four],
    "prune_distill": [zeros(0.9), taught_by(8)],
    "prune_mnist": [zeros(0.95)],
    "prune_qat": [zeros(0.8), packed(7), integers_in_onnx],
    "prune_restart": [zeros(0.9)],
    "qat_int4": [packed(4, net_0=7, net_8=7), integers_in_onnx],
    "qat_int8": [packed(7), integers_in_onnx],
    "qat_ternary": [packed(2, net_0=7, net_8=7), integers_in_onnx],
    "tabular": [widths(categories=(5, 4), hidden=(16, 12), rest_2=(8, 16)), packed(7)],
    "time_series": [zeros(0.75), packed(7)],
    "transformer": [
        # Heads are 4 wide, and have queries, keys and values: 3 of 4 are left.
        widths(tokens=(12, 16), blocks_0_inputs=(36, 16), blocks_1_output=(16, 12), blocks_1_wide_0=(48, 16)),
        packed(7),
    ],
}


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_ready_recipe_says_what_it_is_for_and_when_everything_happens(name):
    head, _, _ = builtin_recipes()[name].read_text(encoding="utf-8").partition("\ncallbacks:")
    recipe = Recipe.load(builtin_recipes()[name])
    lines = recipe.timeline(1000)
    assert head.startswith("# ")
    assert "\n# For: " in head
    assert "\n# Use: " in head
    assert "refused" not in lines
    assert all(callback.name in lines for callback in recipe.callbacks() if hasattr(callback, "window"))


def test_the_recipe_of_a_whole_run_has_its_model_and_data():
    recipe = Recipe.load(builtin_recipes()["prune_mnist"])
    assert sum(parameter.numel() for parameter in recipe.model().parameters()) == 431_080
    assert recipe.data() is not None


@pytest.mark.parametrize("name", builtin_recipes())
@pytest.mark.parametrize("pl", ["pytorch_lightning"], indirect=True)  # that both names act alike is seen elsewhere
def test_a_ready_recipe_does_what_it_promises(name, pl, make_trainer, tmp_path):
    seen = {}

    class See(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen[trainer.global_step] = [value.clone() for value in pl_module.state_dict().values()]

    ours = callbacks(name, "pytorch_lightning")
    module, trainer = (
        module_of(pl, name),
        make_trainer([*ours, See()], max_epochs=EPOCHS, enable_checkpointing=None, log_every_n_steps=7),
    )
    trainer.fit(module, kind_of(name).loader(), kind_of(name).loader())
    for promise in PROMISES[name]:
        promise(module, ours, seen, tmp_path)
