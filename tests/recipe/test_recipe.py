"""Recipes: what they build, what they refuse with which place, what they cannot make run, how they are overridden."""

import textwrap
from functools import wraps

import pytest

import lightning_compress
from lightning_compress import CompressionReport, Pruning, Recipe
from lightning_compress.core.schedules import Exponential

PRUNE = """
callbacks:
  - Pruning:
      final_sparsity: 0.8
"""


@pytest.fixture
def written(tmp_path):
    """A factory of recipe files, dedented."""

    def write(text):
        path = tmp_path / "r.yaml"
        path.write_text(textwrap.dedent(text).strip() + "\n")
        return path

    return write


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """A package of the user's that leaves a mark on disk when it is imported."""
    folder = tmp_path / "users_own"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "nets.py").write_text(
        textwrap.dedent(f"""
        import pathlib
        from subprocess import Popen
        import pytorch_lightning as pl
        pathlib.Path({str(tmp_path / "imported")!r}).touch()

        class Watch(pl.Callback):
            def __init__(self, size: int = 1, inner=None):
                self.size, self.inner = size, inner

        def by_size(weight):
            return weight.abs()
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "imported"


def refusal(path, **options):
    """The words with which a recipe is refused, at loading or at making its callbacks; without the folder."""
    with pytest.raises(ValueError) as caught:
        Recipe.load(path, **options).callbacks()
    return str(caught.value).replace(f"{path.parent}/", "")


# What it builds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        "Pruning: {final_sparsity: 0.8, begin: 20%}",
        "{class_path: Pruning, init_args: {final_sparsity: 0.8, begin: 20%}}",
        "{class_path: lightning_compress.Pruning, init_args: {final_sparsity: 0.8, begin: 20%}}",
        "lightning_compress.pruning.callback.Pruning: {final_sparsity: 0.8, begin: 20%}",
    ],
)
def test_an_entry_has_a_short_form_and_that_of_lightning_cli(written, entry):
    (pruning,) = Recipe.load(written(f"callbacks:\n  - {entry}")).callbacks()
    assert type(pruning) is Pruning
    assert (pruning.final_sparsity, pruning.begin, pruning.end) == (0.8, "20%", "70%")


def test_a_bare_name_takes_the_defaults_and_the_order_is_kept(written):
    first, second = Recipe.load(written("callbacks: [CompressionReport, Pruning]")).callbacks()
    assert isinstance(first, CompressionReport)
    assert second.settings() == Pruning().settings()


def test_callbacks_are_new_at_each_call(written):
    recipe = Recipe.load(written(PRUNE))
    assert recipe.callbacks()[0] is not recipe.callbacks()[0]


def test_objects_are_made_at_any_depth_and_plain_values_stay(written):
    path = written("""
        callbacks:
          - Pruning:
              granularity: 2:4
              final_sparsity: 0.5
              schedule: {class_path: Exponential, init_args: {rate: 2}}
              ignore: [net.0, "*.bias"]
        """)
    (pruning,) = Recipe.load(path).callbacks()
    assert pruning.schedule == Exponential(rate=2)
    assert (pruning.granularity, pruning.ignore) == ("2:4", ["net.0", "*.bias"])


@pytest.mark.parametrize("lightning", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("prefix", ["", "pytorch_lightning.callbacks.", "lightning.pytorch.callbacks."])
def test_lightnings_own_callbacks_come_from_the_lightning_that_is_asked_for(written, lightning, prefix):
    pl = pytest.importorskip(lightning)
    recipe = Recipe.load(written(f"callbacks: [{prefix}ModelCheckpoint: {{monitor: val_loss}}]"))
    (checkpoint,) = recipe.callbacks(lightning)
    assert type(checkpoint) is pl.callbacks.ModelCheckpoint
    assert checkpoint.monitor == "val_loss"


def test_a_complete_recipe_makes_model_data_and_trainer(written, tmp_path):
    path = written(f"""
        seed_everything: 3
        model: {{class_path: lightning_compress.recipes.mnist.LeNet5, init_args: {{learning_rate: 0.5}}}}
        data: lightning_compress.recipes.mnist.MNIST
        trainer:
          max_epochs: 3
          logger: {{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}}}}}
          enable_checkpointing: false
          accelerator: cpu
        callbacks: [Pruning]
        """)
    recipe = Recipe.load(path)
    model, data, callbacks = recipe.model(), recipe.data(), recipe.callbacks()
    trainer = recipe.trainer(callbacks, max_epochs=9, enable_progress_bar=False)
    assert model.learning_rate == 0.5
    assert data.batch_size == 64
    assert trainer.max_epochs == 3
    assert type(trainer.logger).__name__ == "CSVLogger"
    assert callbacks[0] in trainer.callbacks
    assert trainer.progress_bar_callback is None


def test_to_dict_is_plain_and_has_what_was_overridden(written):
    recipe = Recipe.load(written(PRUNE), overrides=["pruning.begin=5%", "trainer.max_epochs=2"])
    assert recipe.to_dict() == {
        "callbacks": [{"class_path": "Pruning", "init_args": {"final_sparsity": 0.8, "begin": "5%"}}],
        "trainer": {"max_epochs": 2},
    }


# What it refuses, and where -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("callbacks:\n- Pruning:\n    final_sparsty: 0.9",
         "r.yaml:3: callbacks[0].Pruning.final_sparsty: unknown argument 'final_sparsty'. Did you mean 'final_sparsi"),
        ("callbacks:\n- Pruning\n- Prunin: {name: b}",
         "r.yaml:3: callbacks[1].Prunin: unknown class 'Prunin'. Did you mean 'Pruning'?"),
        ("callback:\n- Pruning", "r.yaml:1: recipe.callback: unknown key 'callback'. Did you mean 'callbacks'?"),
        ("callbacks:\n- class_path: Pruning\n  init_arg: {}",
         "r.yaml:3: callbacks[0].init_arg: unknown key 'init_arg'. Did you mean 'init_args'?"),
        ("callbacks:\n- Pruning:\n    schedule:\n      class_path: Exponential\n      init_args: {rat: 2}",
         "r.yaml:5: callbacks[0].Pruning.schedule.Exponential.rat: unknown argument 'rat'. Did you mean 'rate'?"),
        ("callbacks:\n- Pruning:\n  final_sparsity: 0.9", "Pruning, final_sparsity. Indent the arguments"),
        ("callbacks:\n- Pruning:\n    begin: 1%\n    final_sparsity: 90",
         "r.yaml:4: callbacks[0].Pruning.final_sparsity: final_sparsity is a fraction"),
        ("callbacks:\n- Pruning:\n    criterion: magnitud",
         "r.yaml:3: callbacks[0].Pruning.criterion: No 'magnitud'"),
        ("callbacks:\n- Pruning: {schedule: {class_path: Exponential, init_args: {rate: x}}}",
         "r.yaml:2: callbacks[0].Pruning.schedule.Exponential: TypeError"),
        ("callbacks:\n- Pruning\n- Pruning: {final_sparsity: 0.5}",
         "r.yaml:3: callbacks[1].Pruning: the name 'pruning' is taken by callbacks[0].Pruning (r.yaml:2)"),
        ("callbacks:\n- CompressionReport: {name: pruning}\n- Pruning", "the name 'pruning' is taken by"),
        ("callbacks: Pruning", "r.yaml:1: callbacks is a list, not 'Pruning'"),
        ("callbacks:", "callbacks is a list, not nothing"),
        ("callbacks: [null]", "callbacks[0]: a class belongs here"),
        ("callbacks: [[Pruning]]", "callbacks[0]: a class belongs here"),
        ("callbacks: [3]", "but here is 3"),
        ("callbacks: [Pruning: [0.9]]", "callbacks[0]: the arguments are a mapping"),
        ("callbacks: [{class_path: [Pruning]}]", "callbacks[0].class_path: ['Pruning'] is not the name of a class"),
        ("callbacks: [Exponential]", "'Exponential' is no callback"),
        ("callbacks: [report]", "unknown class 'report'"),
        ("[Pruning]", "a recipe is a mapping with the key `callbacks:`, not a list"),
        ("trainer: {max_epochs: 3}", "a recipe has the key `callbacks:`"),
        ("callbacks: []\ntrainer:\n  max_epoch: 3",
         "r.yaml:3: trainer.max_epoch: unknown argument 'max_epoch'. Did you mean 'max_epochs'?"),
        ("callbacks: []\ntrainer: {callbacks: [Pruning]}", "`callbacks:` stands at the top"),
        ("callbacks: []\nseed_everything: often", "seed_everything is a whole number, true or false, not 'often'"),
        ("callbacks: []\nmodel: lightning_compress.recipes.mnist.LeNet",
         "model.LeNet: unknown class 'lightning_compress.recipes.mnist.LeNet'. Did you mean 'LeNet5'?"),
        ("callbacks: []\nmodel: lightning_compress.recipes.mnis.LeNet5", "no module 'lightning_compress.recipes.mnis'"),
        ("callbacks: []\ndata: {class_path: lightning_compress.recipes.mnist.MNIST, init_args: {batchsize: 3}}",
         "data.MNIST.batchsize: unknown argument 'batchsize'. Did you mean 'batch_size'?"),
        ("callbacks:\n- ModelCheckpoint: {mode: most}", "r.yaml:2: callbacks[0].ModelCheckpoint.mode: "),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_file_line_place_and_the_nearest_name(written, text, words):
    assert words in refusal(written(text))


def test_nothing_is_made_at_loading(written, monkeypatch):
    path = written("callbacks: [Pruning]\nmodel: lightning_compress.recipes.mnist.LeNet5")

    @wraps(Pruning.__init__)
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(Pruning, "__init__", never)
    Recipe.load(path)
    with pytest.raises(ValueError, match="AssertionError"):
        Recipe.load(path).callbacks()


def test_one_text_in_place_of_a_list_is_refused(written):
    assert "overrides is a list of texts" in refusal(written(PRUNE), overrides="pruning.begin=1%")
    assert "allow is a list of texts" in refusal(written(PRUNE), allow="users_own.*")


def test_a_recipe_without_a_model_cannot_run_alone(written):
    recipe = Recipe.load(written(PRUNE))
    with pytest.raises(ValueError, match="has no `model:`"):
        recipe.model()
    assert recipe.data() is None


# What it cannot make run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "callbacks: [!!python/object/apply:os.system ['touch {mark}']]",
        "callbacks: [os.system: {{command: touch {mark}}}]",
        "callbacks: [{{class_path: subprocess.Popen, init_args: {{args: [touch, {mark}]}}}}]",
        "callbacks: [Pruning: {{schedule: {{class_path: subprocess.Popen, init_args: {{args: [touch, {mark}]}}}}}}]",
        "callbacks: [Pruning: {{criterion: users_own.nets.by_size}}]",
        "callbacks: [users_own.nets.Watch]",
        "callbacks: []\nmodel: users_own.nets.Watch",
        "callbacks: []\ntrainer: {{logger: {{class_path: subprocess.Popen, init_args: {{args: [touch, {mark}]}}}}}}",
        "callbacks: [lightning_compress.recipe.import_module: {{name: users_own.nets}}]",
        "callbacks: [lightning_compress.recipes.mnist.Path: {{}}]",
        "callbacks: [lightning_compress.recipes.users_own.nets.Watch: {{}}]",
        "callbacks: [pytorch_lightning.callbacks.LambdaCallback: {{}}]",
        "callbacks: [pytorch_lightning.trainer.ModelCheckpoint: {{}}]",
        "callbacks: [..users_own.nets.Watch]",
    ],
)
def test_nothing_of_others_is_imported_or_run_unless_allowed(written, own_package, text):
    assert refusal(written(text.format(mark=own_package)))
    assert not own_package.exists()


def test_the_refusal_says_how_to_allow(written, own_package):
    words = refusal(written("callbacks: [users_own.nets.Watch]"))
    assert "allow=['users_own.nets.Watch'], --allow users_own.nets.Watch or LIGHTNING_COMPRESS_ALLOW=" in words
    assert "'users_own.nets.by_size' is not allowed" in refusal(
        written("callbacks:\n  - Pruning: {criterion: users_own.nets.by_size}")
    )


@pytest.mark.parametrize("allow", [["users_own.*"], ["users_own.nets.Watch", "users_own.nets.by_size"]])
def test_what_is_allowed_is_found(written, own_package, allow):
    text = """
        callbacks:
          - users_own.nets.Watch: {size: 3, inner: {class_path: users_own.nets.Watch}}
          - Pruning: {criterion: users_own.nets.by_size}
        """
    watch, pruning = Recipe.load(written(text), allow=allow).callbacks()
    assert (watch.size, type(watch.inner)) == (3, type(watch))
    assert pruning.criterion.__name__ == "by_size"
    assert "unknown argument 'siz'" in refusal(written("callbacks: [users_own.nets.Watch: {siz: 3}]"), allow=allow)


def test_the_environment_can_allow(written, own_package, monkeypatch):
    monkeypatch.setenv("LIGHTNING_COMPRESS_ALLOW", "other.*, users_own.*")
    assert Recipe.load(written("callbacks: [users_own.nets.Watch]")).callbacks()


def test_a_wildcard_does_not_let_in_what_a_module_imports_from_elsewhere(written, own_package):
    text = "callbacks: [Pruning: {schedule: {class_path: users_own.nets.Popen, init_args: {args: [ls]}}}]"
    assert "is 'subprocess.Popen', which is not allowed" in refusal(written(text), allow=["users_own.*"])
    text = "callbacks: [Pruning: {criterion: users_own.nets.Popen}]"
    assert "is 'subprocess.Popen', which is not allowed" in refusal(written(text), allow=["users_own.*"])


@pytest.mark.parametrize("name", ["lightning_compress.recipes.mnist.Path", "Callable", "lightning_compress.Callable"])
def test_what_our_own_modules_import_from_elsewhere_is_unknown(written, name):
    assert f"unknown class '{name}'" in refusal(written(f"callbacks: [Pruning: {{schedule: {{class_path: {name}}}}}]"))


def test_an_allowed_name_that_is_not_there_is_refused(written, own_package):
    assert "cannot be imported" in refusal(written("callbacks: [users_own.net.Watch]"), allow=["users_own.*"])
    assert "cannot be imported" in refusal(written("callbacks: [users_own.nets.Watc]"), allow=["users_own.*"])
    assert "is no class" in refusal(written("callbacks: [users_own.nets.by_size]"), allow=["users_own.*"])


def test_functions_of_the_package_are_no_classes_and_its_classes_are_public(written):
    for name in lightning_compress.__all__:
        if not isinstance(getattr(lightning_compress, name), type):
            assert "unknown class" in refusal(written(f"callbacks: [{name}]"))


# Overrides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["pruning.final_sparsity", "callbacks.0.final_sparsity", "callbacks.0.init_args.final_sparsity",
     "callbacks[0].Pruning.final_sparsity", "pruning.init_args.final_sparsity"],
)  # fmt: skip
def test_a_value_is_set_by_the_callbacks_name_or_by_its_path(written, key):
    (pruning,) = Recipe.load(written(PRUNE), overrides=[f"{key}=0.95"]).callbacks()
    assert pruning.final_sparsity == 0.95


def test_a_callback_is_found_by_the_name_it_was_given(written):
    text = "callbacks:\n- Pruning\n- Pruning: {name: late, targets: fc}\n- ModelCheckpoint"
    settings = ["late.begin=50%", "pruning.end=40%", "modelcheckpoint.mode=max", "late.targets=[fc, conv1]"]
    recipe = Recipe.load(written(text), overrides=[*settings, "late.targets.1=conv2"])
    first, second, checkpoint = recipe.callbacks()
    assert (first.end, second.begin, checkpoint.mode) == ("40%", "50%", "max")
    assert (first.targets, second.targets) == (None, ["fc", "conv2"])


def test_overrides_are_yaml_apply_in_order_and_reach_nested_objects(written):
    overrides = [
        "pruning.schedule={class_path: Exponential}",
        "pruning.schedule.rate=1e-1",
        "pruning.schedule.init_args.rate=4",
        'pruning.overrides={"*.conv1": 0.3}',
        "pruning.overrides.*.conv1=0.4",
        "pruning.overrides.fc=0.5",
    ]
    (pruning,) = Recipe.load(written(PRUNE), overrides=overrides).callbacks()
    assert pruning.schedule == Exponential(rate=4)
    assert pruning.overrides == {"*.conv1": 0.4, "fc": 0.5}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("prunin.begin=1%", "nothing is named 'prunin'. Did you mean 'pruning'?"),
        ("trainr.max_epochs=3", "nothing is named 'trainr'. Did you mean 'trainer'?"),
        ("pruning.final_sparsty=0.9", "unknown argument 'final_sparsty'. Did you mean 'final_sparsity'?"),
        ("trainer.max_epoch=3", "trainer.max_epoch: unknown argument 'max_epoch'. Did you mean 'max_epochs'?"),
        ("pruning.final_sparsity=90", "callbacks[0].Pruning.final_sparsity: final_sparsity is a fraction"),
        ("callbacks.1.begin=3", "callbacks has 1 entries, counted from 0, so '1' leads nowhere"),
        ("callbacks.-1.begin=3", "'-1' leads nowhere"),
        ("pruning.final_sparsity.more=3", "is 0.8, which has no 'more'"),
        ("pruning.final_sparsit.more=3", "has no 'final_sparsit' in the recipe. Did you mean 'final_sparsity'?"),
        ("pruning.overrides.*.fc=0.5", "Set it as a whole: callbacks.0.overrides={*.fc: ...}."),
        ("pruning.foo=3", "Known: final_sparsity, criterion,"),
        ("pruning.final_sparsity.0=0.5", "Set it as a whole: callbacks.0.final_sparsity=[...]."),
        ("pruning.final_sparsity", "write key=value"),
        ("=3", "write key=value"),
        ("pruning.final_sparsity=", "nothing is written here"),
        ("pruning.ignore=*.conv1", "not valid YAML"),
        ("pruning.ignore=!!python/name:os.system", "the tag '!!python/name:os.system' is refused"),
        ("trainer=3", "trainer is a mapping, not 3"),
        ("callbacks=Pruning", "callbacks is a list, not 'Pruning'"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused_with_the_nearest_name(written, setting, words):
    refused = refusal(written(PRUNE), overrides=[setting])
    assert refused.startswith(f"--set {setting}: ")
    assert words in refused


def test_a_name_that_two_callbacks_have_is_refused(written):
    words = refusal(written("callbacks: [ModelCheckpoint, ModelCheckpoint]"), overrides=["modelcheckpoint.mode=max"])
    assert "2 callbacks are named 'modelcheckpoint'. Write callbacks.0 or callbacks.1." in words
