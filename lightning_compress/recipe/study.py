"""The runs of a sweep as trials of an Optuna study, kept in a journal so that a sweep that was stopped can go on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_compress.core.optional_dependencies import need
from lightning_compress.recipe.sweep import ParameterRange, Settings, Sweep, as_yaml

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study

JOURNAL = "study.journal"
SAMPLERS = {"grid": "RandomSampler", "random": "RandomSampler", "bayes": "TPESampler"}  # a grid draws nothing


@dataclass(frozen=True)
class SweepTrial:
    """One run of a sweep: its number, from 0 on, and its overrides."""

    number: int
    settings: Settings


class SweepStudy:
    """Which runs a sweep has, which of them are over, and which comes next.

    A grid's runs, and random ones, are known before the first starts. With `bayes` Optuna's TPE chooses each by the
    metric of those before it. What is drawn depends on the seed, the number of the run and the runs before it alone.

    Args:
        sweep: which was read and checked.
        count: of runs; None for a grid.
        seed: of what is drawn.
        folder: where the journal is, or is to be; None: it is kept in memory.

    Raises:
        ModuleNotFoundError: if Optuna is missing: pip install 'lightning-compress[search]'.
        ValueError: if `count` does not go with the method, or the journal is one of another sweep.
    """

    def __init__(self, sweep: Sweep, count: int | None = None, seed: int = 0, folder: Path | None = None) -> None:
        if (sweep.method == "grid") != (count is None):
            needed = "give --count N" if count is None else "leave --count out: a grid has a run for each combination"
            raise ValueError(f"{sweep.path}: the method is {sweep.method}, so {needed}.")
        need("optuna", extra="search")
        self.sweep, self.seed, self.study = sweep, seed, _study(sweep, folder)
        self.space = {name: _distribution(one) for name, one in sweep.parameters.items()}
        self.count = len(sweep.grid()) if count is None else count
        described = f"{sweep.method}, seed {seed}, {sweep.parameters}"
        if self.study.user_attrs.setdefault("sweep", described) != described:
            raise ValueError(
                f"{folder} has the runs of another sweep, {self.study.user_attrs['sweep']}, and not of {described}. "
                f"Name another folder by --output-dir."
            )
        self.study.set_user_attr("sweep", described)
        if sweep.method != "bayes":
            self._ask_for_all()

    def remaining(self) -> Iterator[SweepTrial]:
        """The runs that are not over: first those that were begun, or drawn, before."""
        yield from self._unfinished()
        while self.sweep.method == "bayes" and (number := len(self.study.trials)) < self.count:
            self._ask(number)
            yield from self._unfinished()

    def finished(self) -> list[SweepTrial]:
        """The runs that are over, in their order."""
        return [self._trial(one) for one in self.study.trials if one.state.is_finished()]

    def tell(self, trial: SweepTrial, metric: float | None) -> None:
        """A run is over, with this value of the sweep's metric; None if it has none."""
        from optuna.trial import TrialState

        if metric is None or not isfinite(metric):
            self.study.tell(trial.number, state=TrialState.FAIL)
        else:
            self.study.tell(trial.number, metric)

    def _unfinished(self) -> list[SweepTrial]:
        return [self._trial(one) for one in self.study.trials if not one.state.is_finished()]

    def _ask_for_all(self) -> None:
        combinations = self.sweep.grid() if self.sweep.method == "grid" else []
        for number in range(len(self.study.trials), self.count):
            if combinations:
                self.study.enqueue_trial(combinations[number])
            self._ask(number)

    def _ask(self, number: int) -> None:
        import optuna

        make: type[BaseSampler] = getattr(optuna.samplers, SAMPLERS[self.sweep.method])
        self.study.sampler = make(seed=self.seed * 1_000_003 + number)  # type: ignore[call-arg]
        self.study.ask(self.space)

    def _trial(self, frozen: Any) -> SweepTrial:
        return SweepTrial(frozen.number, _written(self.sweep, frozen.params))


def drawn_settings(sweep: Sweep, count: int | None = None, seed: int = 0) -> list[Settings]:
    """The overrides of each run that is known before the first starts, equal ones once; with `bayes` the first alone.

    >>> from lightning_compress.recipe.builtin import builtin_recipes
    >>> from lightning_compress.recipe.sweep import read_sweep
    >>> len(drawn_settings(read_sweep(builtin_recipes("sweeps")["qat_bits"]))) > 1
    True
    """
    study = SweepStudy(sweep, count, seed)
    first = next(study.remaining())
    rest = () if sweep.method == "bayes" else study.remaining()
    return list(dict.fromkeys([first.settings, *(trial.settings for trial in rest)]))


def _study(sweep: Sweep, folder: Path | None) -> "Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = None
    if folder is not None:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        folder.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    return optuna.create_study(
        storage=storage, study_name=sweep.path.stem, direction=sweep.goal, load_if_exists=folder is not None
    )


def _distribution(parameter: Any) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(parameter, ParameterRange):
        return CategoricalDistribution(list(dict.fromkeys(map(as_yaml, parameter))))
    if parameter.distribution == "int_uniform":
        return IntDistribution(int(parameter.low), int(parameter.high))
    return FloatDistribution(parameter.low, parameter.high, log=parameter.distribution == "log_uniform_values")


def _written(sweep: Sweep, params: Mapping[str, Any]) -> Settings:
    """Overrides; what was chosen from a list is written already."""
    texts = {
        name: as_yaml(params[name]) if isinstance(one, ParameterRange) else params[name]
        for name, one in sweep.parameters.items()
    }
    return tuple(f"{name}={text}" for name, text in texts.items())
