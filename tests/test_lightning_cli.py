"""LightningCLI of each name takes our classes from its own YAML, by short name and by full path."""

import pytest

from tests import warm

SCRIPT = """
import contextlib, sys
from importlib import import_module
import lightning_compress

pl, cli = import_module(sys.argv[1]), import_module(f"{sys.argv[1]}.cli")


class Net(pl.LightningModule):
    pass


for config in sys.argv[2:]:
    try:
        made = cli.LightningCLI(Net, run=False, save_config_callback=None, args=["--config", config])
    except (SystemExit, ValueError) as refused:
        print("refused")
        print(refused, file=sys.stderr)
        continue
    (pruning,) = [one for one in made.trainer.callbacks if type(one).__name__ == "Pruning"]
    print("made", pruning.final_sparsity, pruning.granularity, type(pruning.schedule).__name__)
"""
CONFIG = """
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: {name}
      init_args: {arguments}
"""
CONFIGS = [
    ("Pruning", "{final_sparsity: 0.8}"),
    ("lightning_compress.Pruning", '{final_sparsity: 0.5, granularity: "2:4", schedule: linear}'),
    ("lightning_compress.Pruning", "{final_sparsty: 0.8}"),
    ("lightning_compress.Pruning", "{final_sparsity: 90}"),
]


@pytest.mark.slow
@pytest.mark.parametrize("lightning", ["pytorch_lightning", "lightning.pytorch"])
def test_pruning_is_taken_by_both_names_and_a_wrong_key_or_value_is_refused(tmp_path, lightning):
    pytest.importorskip(lightning)
    pytest.importorskip("jsonargparse")
    (tmp_path / "train.py").write_text(SCRIPT)
    for number, (name, arguments) in enumerate(CONFIGS):
        (tmp_path / f"{number}.yaml").write_text(CONFIG.format(name=name, arguments=arguments))
    configs = [f"{number}.yaml" for number in range(len(CONFIGS))]
    done = warm.run(tmp_path / "train.py", lightning, *configs, cwd=tmp_path)
    assert done.stdout.splitlines() == ["made 0.8 weight Cubic", "made 0.5 2:4 Linear", "refused", "refused"], (
        done.stdout + done.stderr
    )
    assert "final_sparsty" in done.stderr
    assert "For 90 % write 0.9" in done.stderr


DISTILLATIONS = {
    "{teacher: {class_path: lightning_compress.AveragedTeacher, init_args: {decay: 0.9}}, "
    "losses: {'net.0 -> 0': {loss: projected_hint, weight: 2.0}, output: dkd}}": "net.0/projected_hint, dkd",
    "{teacher: teacher.ckpt, teacher_class: lightning_compress.recipes.mnist.LeNet5, begin: 10%}": "kl_divergence",
    "{teacher: [one.ckpt, two.ckpt], teacher_class: lightning_compress.recipes.mnist.LeNet5}": "kl_divergence",
}


@pytest.mark.slow
@pytest.mark.parametrize("lightning", ["pytorch_lightning", "lightning.pytorch"])
def test_distillation_is_taken_with_teachers_of_each_kind(tmp_path, lightning):
    pytest.importorskip(lightning)
    pytest.importorskip("jsonargparse")
    script = SCRIPT.replace("Pruning", "Distillation").replace(
        'print("made", pruning.final_sparsity, pruning.granularity, type(pruning.schedule).__name__)',
        'print("made", ", ".join(term.label for term in pruning.terms))',
    )
    (tmp_path / "train.py").write_text(script)
    for number, arguments in enumerate(DISTILLATIONS):
        (tmp_path / f"{number}.yaml").write_text(CONFIG.format(name="Distillation", arguments=arguments))
    configs = [f"{number}.yaml" for number in range(len(DISTILLATIONS))]
    done = warm.run(tmp_path / "train.py", lightning, *configs, cwd=tmp_path)
    assert done.stdout.splitlines() == [f"made {labels}" for labels in DISTILLATIONS.values()], (
        done.stdout + done.stderr
    )
