"""A sweep file, in W&B's own format: parameters by the dotted names of overrides, and the runs that these make.

    {method: grid,                          # or random; or bayes, which chooses each run by the metric of those before
     metric: {name: val_loss, goal: minimize},
     parameters: {pruning.final_sparsity: {values: [0.8, 0.9]}, finetuning.learning_rate: {value: restart}}}

Here it runs locally: `lightning-compress sweep SWEEP.yaml --recipe RECIPE.yaml -- python train.py`. The same file
serves `wandb sweep SWEEP.yaml` and `wandb agent ID`. The agent runs the `command` of the file, in which it writes each
parameter as `--pruning.final_sparsity=0.8` in place of `${args}`; `lightning-compress join` takes these, puts recipe
and overrides into the environment, where a Trainer finds them, and starts the script, which is not edited for it:

    program: train.py
    command: ["${env}", lightning-compress, join, prune, "${args}", --, python, "${program}"]

A script that reads such arguments itself hands them to `Recipe.load(..., overrides=...)`, or sets the variables
`LIGHTNING_COMPRESS_RECIPE` and `LIGHTNING_COMPRESS_SET` before it makes a Trainer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from lightning_compress.recipe.objects import check_keys
from lightning_compress.recipe.safe_yaml import SourceValue, parse_yaml, read_yaml

KEYS = (
    "method", "metric", "parameters", "program", "command", "name", "description", "project", "entity",
    "early_terminate", "run_cap",
)  # fmt: skip
LEFT_TO_WANDB = ("early_terminate", "run_cap")
GOALS = ("minimize", "maximize")

METHODS = ("grid", "random", "bayes")
DISTRIBUTIONS = ("uniform", "int_uniform", "log_uniform_values")
Settings: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class ParameterRange:
    """Numbers between two others, in one of `DISTRIBUTIONS`."""

    low: float
    high: float
    distribution: str


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        path: where it was read.
        method: "grid", "random" or "bayes".
        parameters: what each may be: a list of values, or a range.
        metric, goal: by which runs are compared; None if the file has none.
        unused: its keys that only W&B acts on.
    """

    path: Path
    method: str
    parameters: Mapping[str, Sequence[Any] | ParameterRange]
    metric: str | None = None
    goal: str = "minimize"
    unused: tuple[str, ...] = ()

    def grid(self) -> list[dict[str, str]]:
        """Each combination of the values once, as text of YAML; ranges are left out."""
        choices = {
            name: list(dict.fromkeys(map(as_yaml, values)))
            for name, values in self.parameters.items()
            if not isinstance(values, ParameterRange)
        }
        return [dict(zip(choices, chosen, strict=True)) for chosen in product(*choices.values())]


def read_sweep(path: str | Path) -> Sweep:
    """Read and check a sweep file; the names of its parameters are checked with a recipe only.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no sweep, or of a kind that only W&B can run; with file and line.
    """
    root = read_yaml(path)
    if not isinstance(root.value, dict) or "parameters" not in root.value:
        raise ValueError(f"{root.where}: a sweep is a mapping with `method:` and `parameters:`.")
    check_keys(root.value, KEYS, "sweep", "key")
    method = root.value.get("method", SourceValue(None, root.where))
    if method.value not in METHODS:
        raise ValueError(f"{method.where}: method is one of {', '.join(METHODS)}, not {method.plain()!r}.")
    parameters = root.value["parameters"]
    if not isinstance(parameters.value, dict) or not parameters.value:
        raise ValueError(f"{parameters.where}: parameters is a mapping of dotted names, such as pruning.begin.")
    metric, goal = _metric(root.value.get("metric"))
    if method.value == "bayes" and metric is None:
        raise ValueError(
            f"{method.where}: bayes chooses runs by `metric: {{name: val_loss, goal: minimize}}`: add one."
        )
    return Sweep(
        path=Path(path),
        method=method.value,
        parameters={str(name): _parameter(name, one, method.value) for name, one in parameters.value.items()},
        metric=metric,
        goal=goal,
        unused=tuple(key for key in LEFT_TO_WANDB if key in root.value),
    )


def _metric(node: SourceValue | None) -> tuple[str | None, str]:
    if node is None:
        return None, GOALS[0]
    if not isinstance(node.value, dict) or "name" not in node.value:
        raise ValueError(f"{node.where}: metric is a mapping with name and goal, not {node.plain()!r}.")
    goal = node.plain().get("goal", GOALS[0])
    if goal not in GOALS:
        raise ValueError(f"{node.where}: metric.goal is {' or '.join(GOALS)}, not {goal!r}.")
    return str(node.plain()["name"]), goal


def _parameter(name: object, node: SourceValue, method: str) -> Sequence[Any] | ParameterRange:
    place = f"{node.where}: parameters.{name}"
    if not isinstance(node.value, dict):
        raise ValueError(f"{place}: write {{values: [...]}} or {{value: ...}}, not {node.plain()!r}.")
    if "parameters" in node.value:
        raise ValueError(f"{place}: write its parameters by dotted names beside it, such as {name}.begin.")
    check_keys(node.value, ("values", "value", "min", "max", "distribution"), f"parameters.{name}", "key")
    written = node.plain()
    if "value" in written:
        return [written["value"]]
    if "values" in written:
        if not isinstance(written["values"], list) or not written["values"]:
            raise ValueError(f"{place}: values is a list of at least one, not {written['values']!r}.")
        values: list[Any] = written["values"]
        return values
    return _range(place, written, method)


def _range(place: str, written: dict[str, Any], method: str) -> ParameterRange:
    if method == "grid":
        raise ValueError(f"{place}: a grid needs values: [...]. A range is drawn from by method: random or bayes.")
    low, high = written.get("min"), written.get("max")
    if not all(isinstance(one, int | float) for one in (low, high)) or low > high:  # type: ignore[operator]
        raise ValueError(f"{place}: min and max are numbers in this order, not {low!r} and {high!r}.")
    are_integers = isinstance(low, int) and isinstance(high, int)
    distribution = written.get("distribution", "int_uniform" if are_integers else "uniform")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"{place}: distribution is one of {', '.join(DISTRIBUTIONS)} here, not {distribution!r}.")
    if distribution == "int_uniform" and not are_integers:
        raise ValueError(f"{place}: int_uniform is between whole numbers, not {low} and {high}.")
    if distribution == "log_uniform_values" and low <= 0:  # type: ignore[operator]
        raise ValueError(f"{place}: log_uniform_values begins above 0, not at {low}.")
    return ParameterRange(low, high, distribution)  # type: ignore[arg-type]


def as_yaml(value: Any) -> str:
    """A plain value as an override has it, without quotes where it does without.

    >>> as_yaml(0.9), as_yaml("20%"), as_yaml("8"), as_yaml([1, None])
    ('0.9', '20%', '"8"', '[1, null]')
    """
    if isinstance(value, str):
        try:
            if parse_yaml(value, str).plain() == value:
                return value
        except ValueError:
            pass
    return json.dumps(value)
