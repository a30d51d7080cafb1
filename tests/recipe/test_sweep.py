"""Sweep files: which runs they make, that W&B's agent would make the same, and what is refused with its place."""

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from lightning_compress.recipe.builtin import builtin_recipes
from lightning_compress.recipe.run_sweep import make_jobs
from lightning_compress.recipe.study import SweepStudy, drawn_settings
from lightning_compress.recipe.subprocess_env import overrides_from_arguments
from lightning_compress.recipe.sweep import read_sweep


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "s.yaml"
        path.write_text(text)
        return path

    return write


def test_a_grid_is_every_combination_once(written):
    sweep = read_sweep(
        written("{method: grid, parameters: {a.x: {values: [0.8, 0.9, 0.9]}, b.y: {value: '8'}, c: {values: [~, 5%]}}}")
    )
    assert drawn_settings(sweep) == [
        ("a.x=0.8", 'b.y="8"', "c=null"),
        ("a.x=0.8", 'b.y="8"', "c=5%"),
        ("a.x=0.9", 'b.y="8"', "c=null"),
        ("a.x=0.9", 'b.y="8"', "c=5%"),
    ]


def test_random_draws_have_a_seed_and_stay_in_their_ranges(written):
    text = """
method: random
parameters:
  bits: {min: 2, max: 4}
  share: {min: 0.5, max: 0.75}
  rate: {min: 0.001, max: 1, distribution: log_uniform_values}
  name: {values: [one, two]}
"""
    sweep = read_sweep(written(text))
    drawn = drawn_settings(sweep, 200, seed=1)
    assert drawn == drawn_settings(sweep, 200, seed=1) != drawn_settings(sweep, 200, seed=2)
    bits, share, rate, name = zip(*([one.partition("=")[2] for one in run] for run in drawn), strict=True)
    assert (set(bits), set(name)) == ({"2", "3", "4"}, {"one", "two"})
    assert all(0.5 <= float(one) <= 0.75 for one in share)
    # A third of the logarithms lies in each factor of ten: 67 of 200, give or take four standard deviations of 6.7.
    assert 40 < sum(float(one) < 0.01 for one in rate) < 94


@pytest.mark.parametrize("name", builtin_recipes("sweeps"))
def test_a_ready_sweep_fits_its_recipe_and_is_the_same_under_wandbs_agent(name, tmp_path):
    path = builtin_recipes("sweeps")[name]
    assert path.read_text(encoding="utf-8").startswith("# ")
    *_, command, recipe, args, end, _, program = yaml.safe_load(path.read_text(encoding="utf-8"))["command"]
    assert (command, args, end, program) == ("join", "${args}", "--", "${program}")
    runs = drawn_settings(read_sweep(path))
    assert len(runs) > 1
    assert len(make_jobs(read_sweep(path), recipe, runs, tmp_path)) == len(runs)
    for run in runs:
        values = {key: {"value": yaml.safe_load(value)} for key, _, value in (one.partition("=") for one in run)}
        assert tuple(overrides_from_arguments(create_sweep_command_args({"args": values})["args"])) == run


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("callbacks: [Pruning]", "s.yaml:1: a sweep is a mapping with `method:` and `parameters:`"),
        ("{method: bayes, parameters: {a: {value: 1}}}", "bayes chooses runs by `metric: {name: val_loss"),
        ("{parameters: {a: {value: 1}}}", "method is one of grid, random, bayes, not None"),
        ("{method: grid, parameter: {}, parameters: {a: {value: 1}}}", "Did you mean 'parameters'?"),
        ("{method: grid, parameters: []}", "parameters is a mapping"),
        ("{method: grid, parameters: {a: 3}}", "parameters.a: write {values: [...]} or {value: ...}, not 3"),
        ("{method: grid, parameters: {a: {values: 3}}}", "parameters.a: values is a list of at least one, not 3"),
        ("{method: grid, parameters: {a: {valus: [3]}}}", "Did you mean 'values'?"),
        ("{method: grid, parameters: {a: {parameters: {b: {value: 1}}}}}", "dotted names beside it, such as a.begin"),
        ("{method: grid, parameters: {a: {min: 0, max: 1}}}", "a grid needs values"),
        ("{method: random, parameters: {a: {min: 2, max: 1}}}", "numbers in this order, not 2 and 1"),
        ("{method: random, parameters: {a: {min: 2}}}", "not 2 and None"),
        ("{method: random, parameters: {a: {min: 0, max: 1, distribution: beta}}}", "is one of uniform, int_uniform"),
        (
            "{method: random, parameters: {a: {min: 0.0, max: 1, distribution: int_uniform}}}",
            "between whole numbers, not 0.0",
        ),
        (
            "{method: random, parameters: {a: {min: 0, max: 1, distribution: log_uniform_values}}}",
            "begins above 0, not at 0",
        ),
        ("{method: grid, metric: val_loss, parameters: {a: {value: 1}}}", "metric is a mapping with name and goal"),
        ("{method: grid, metric: {name: a, goal: min}, parameters: {a: {value: 1}}}", "minimize or maximize"),
    ],
)
def test_what_is_no_sweep_is_refused_with_its_place(written, text, words):
    with pytest.raises(ValueError, match="s.yaml:1: ") as refused:
        read_sweep(written(text))
    assert words in str(refused.value)


def test_a_count_is_for_random_draws_alone(written):
    grid = read_sweep(written("{method: grid, parameters: {a: {value: 1}}}"))
    with pytest.raises(ValueError, match="the method is grid, so leave --count out"):
        drawn_settings(grid, 3)
    draws = read_sweep(written("{method: random, parameters: {a: {value: 1}}}"))
    with pytest.raises(ValueError, match="the method is random, so give --count N"):
        drawn_settings(draws)


BAYES = """
method: bayes
metric: {name: val_loss, goal: minimize}
parameters: {share: {min: 0.0, max: 1.0}, name: {values: [one, two]}}
"""


def loss(trial):
    share, name = (one.partition("=")[2] for one in trial.settings)
    return (float(share) - 0.3) ** 2 + (name == "one")


def all_of(study, stop=None):
    """The settings of all runs; None ends the sweep after that many, with one that was begun and not told."""
    for number, trial in enumerate(study.remaining()):
        if number == stop:
            return None
        study.tell(trial, loss(trial))
    return [trial.settings for trial in study.finished()]


def test_bayes_learns_from_the_runs_before(written):
    study = SweepStudy(read_sweep(written(BAYES)), 30, seed=0)
    runs = all_of(study)
    assert len(runs) == 30
    late = [loss(trial) for trial in study.finished()[20:]]
    drawn = [(float(share.partition("=")[2]) - 0.3) ** 2 for share, _ in runs[:10]]
    assert sum(late) / len(late) < 0.5 * sum(drawn) / len(drawn)


@pytest.mark.parametrize("method", ["bayes", "random", "grid"])
def test_a_sweep_that_was_stopped_has_the_same_runs_when_it_goes_on(method, written, tmp_path):
    text = BAYES.replace("bayes", method)
    if method == "grid":
        text = text.replace("{min: 0.0, max: 1.0}", "{values: [0.1, 0.5, 0.9]}")
    sweep, count = read_sweep(written(text)), None if method == "grid" else 14
    wanted = all_of(SweepStudy(sweep, count, seed=3))
    assert all_of(SweepStudy(sweep, count, seed=3, folder=tmp_path / "runs"), stop=4) is None
    again = SweepStudy(sweep, count, seed=3, folder=tmp_path / "runs")
    assert len(again.finished()) == 4
    assert all_of(again) == wanted
    with pytest.raises(ValueError, match="has the runs of another sweep"):
        SweepStudy(sweep, count, seed=4, folder=tmp_path / "runs")
