"""What every compression callback shares: when it acts, what it saves, how it logs, how it cleans up."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from inspect import signature
from typing import Any, ClassVar

from lightning_compress._lightning import (
    Callback,
    LightningModule,
    Trainer,
    builds_its_layers_late,
    rank_zero_info,
    rank_zero_warn,
    steps_schedules_itself,
)
from lightning_compress.core.arguments import refuse_old_names
from lightning_compress.core.checkpoint import STATE_PREFIX
from lightning_compress.core.conflicts import (
    UNITS,
    ExclusiveClaim,
    FixedShapes,
    phase_windows,
    refuse_conflicts,
    refuse_late_cuts,
    refuse_outside,
    total_length,
)
from lightning_compress.core.phases import (
    Duration,
    ParsedDuration,
    PhaseWindow,
    Run,
    check_order,
    parse_duration,
    resolve_window,
    shift_window,
)
from lightning_compress.nn.channel_cut import Cut
from lightning_compress.training.loggers import log_config, log_immediately, plain_value
from lightning_compress.training.lr_schedule_checks import find_short_schedules
from lightning_compress.training.monitors import paused_early_stopping, reset_monitors

SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"}


class CompressionCallback(Callback):
    """A thin layer between Lightning's hooks and functions that know nothing of it; subclasses hold no maths.

    Args:
        name: part of the logged keys and key of the saved state; give two callbacks of one kind two names.
        begin, end, every: durations: "20%", "3 epochs", "500 steps", an int (steps) or a float (fraction of the run);
            `every` is None if nothing has a pace.

    Raises:
        ValueError: if a duration cannot be read, or `begin` is not before `end`.
    """

    state_format = 1
    state_kind: str | None = None  # what its entry of a checkpoint holds, for those who read it without the callback
    renamed_arguments: ClassVar[dict[str, str]] = {}  # new names of arguments by old ones, for the words of an error
    has_phase = True  # whether it acts between its begin and its end
    progress_metric: str | None = None  # the metric that the progress bar shows and `history` keeps

    def __init__(
        self, name: str, begin: Duration = "0%", end: Duration = "100%", every: Duration | None = "1 steps"
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a word, but is {name!r}.")
        check_order(begin, end, every)
        self.name, self.begin, self.end, self.every = name, begin, end, every
        self.window: PhaseWindow | None = None
        self.last_time: int | None = None
        self.shifted: list[float] | None = None
        self.undo = ExitStack()
        self.history: list[tuple[int, float]] = []
        self.restored = False
        self.saved: dict[str, Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls) and cls.renamed_arguments:
            cls.__init__ = refuse_old_names(cls.__init__, cls.renamed_arguments)  # type: ignore[method-assign]

    # What a subclass fills in -----------------------------------------------------------------------------------

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what does not fit this module, before anything is trained or written."""

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find parameters, take `self.saved`, install hooks and put the way back on `self.undo`."""

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin: all is restored, the optimizers and `self.window` are there."""

    def scheduled_window(self, run: Run) -> PhaseWindow:
        """The phase on the clock of a run."""
        return resolve_window(self.begin, self.end, self.every, run)

    def restored_window(self, run: Run) -> PhaseWindow:
        """The phase as it was moved in the run that is gone on with, or as it was written."""
        window = self.scheduled_window(run)
        if not self.resumed or self.shifted is None:
            return window
        begin, end, *after = self.shifted
        return replace(window, begin=int(begin), end=end, offsets=tuple(map(int, after)))

    def shift_earlier(self, since: float, by: int) -> None:
        """A phase that was to end at `since` has ended `by` moments before: what follows it comes as much earlier."""
        self.set_window(
            shift_window(self._window, since, by, parse_duration(self.end) == ParsedDuration(1.0, "fraction"))
        )

    def checkpoint_state(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and plain values only, or `weights_only=True` refuses the checkpoint."""
        return {}

    def on_weights_replaced(self) -> None:
        """Another callback has put other values into the weights: make true again what this one promises of them."""

    def on_channels_pruned(self, cut: Cut) -> None:
        """Another callback has cut tensors of the module by index: cut what was made for their old shapes."""

    def on_modules_replaced(self, trainer: Trainer, pl_module: LightningModule, names: Sequence[str]) -> None:
        """Another callback has put other modules in the place of these: forget what was made for the old ones."""

    def claims(self, trainer: Trainer, pl_module: LightningModule) -> list[ExclusiveClaim]:
        """What this callback does to which weights, and only one callback can do to them."""
        return []

    def changes_shapes(self) -> bool:
        """Whether it changes shapes of the module, up to the end of its phase."""
        return False

    def fixed_shapes(self) -> FixedShapes | None:
        """From when on nobody may cut the module any more, because this callback counts on it."""
        return None

    def sets_learning_rates(self) -> bool:
        """Whether the learning rates of its phase are its own, and not those of the user's schedule."""
        return False

    def current_learning_rate(self) -> float | None:
        """The rate of the first parameters of the first optimizer in the latest step, if this callback has set it."""
        return None

    def protected_modules(self, pl_module: LightningModule) -> list[str]:
        """Names of modules whose channels nobody may cut, because this callback counts on them."""
        return []

    # When -------------------------------------------------------------------------------------------------------

    def due_time(self, trainer: Trainer) -> int | None:
        """The scheduled moment that is due now, once; None if there is none.

        Call it while a step is taken. The caller says `self.done(moment)` when it has acted.
        """
        if self.window is None:
            return None
        moment = self.window.last_time(step_after(trainer, self.window.unit))
        return None if moment == self.last_time else moment

    def mark_done(self, moment: int) -> None:
        """Remember that what was due at `moment` has happened."""
        self.last_time = moment

    def set_window(self, window: PhaseWindow) -> None:
        """Let the phase begin and end at other moments from now on, in a resumed run too."""
        if window != self.window:
            self.window, self.shifted = window, [window.begin, window.end, *window.offsets]

    @property
    def resumed(self) -> bool:
        """Whether this fit goes on from a checkpoint that this callback wrote into."""
        return self.saved is not None

    @property
    def _window(self) -> PhaseWindow:
        if self.window is None:
            raise RuntimeError(f"'{self.name}' knows when it acts once training has begun.")
        return self.window

    @property
    def reached(self) -> bool:
        """Whether the end of the phase is behind."""
        return self.window is not None and self.last_time == self.window.end

    def timeline(self, run: Run) -> list[tuple[int, str]]:
        """Moments in the hand of this callback's window, and what happens then."""
        window = self.scheduled_window(run)
        ends = [] if math.isinf(window.end) else [(int(window.end), "ends")]
        return [(window.begin, "begins"), *ends]

    # What is said -----------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {
            name: plain_value(getattr(self, name))
            for name in signature(type(self).__init__).parameters
            if name != "self"
        }

    def log_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Log `compress/<name>/<key>`: to the loggers now, and where callbacks and the progress bar (`shown`) look."""
        full = {f"compress/{self.name}/{key}": float(value) for key, value in metrics.items()}
        log_immediately(trainer, full)
        if self.progress_metric in metrics:
            self.history.append((int(trainer.global_step), float(metrics[self.progress_metric])))
        for key, value in full.items():
            self.log(key, value, logger=False, prog_bar=key == f"compress/{self.name}/{self.progress_metric}")

    # Lightning's hooks ------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return f"{STATE_PREFIX}{self.name}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.undo.close()
        self.window, self.restored, self.saved = None, False, None
        _refuse_equal_names(self, trainer)
        _refuse_sharded(self, trainer)
        if not builds_its_layers_late(pl_module):
            self.check(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if builds_its_layers_late(pl_module):
            self.check(trainer, pl_module)
        self.attach(trainer, pl_module)
        log_config(trainer, {f"compress/{self.name}": {"class": type(self).__name__, **self.settings()}})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run, callbacks = describe_run(trainer, pl_module), compression_callbacks(trainer)
        windows = phase_windows(callbacks, run)
        self.window = windows[self.name]
        if self.window.begin > self.restored_window(run).begin:
            rank_zero_info(f"'{self.name}' begins after the last cut, at {self.window.begin} {self.window.unit}.")
        if not self.resumed:
            self.last_time, self.history, self.shifted = None, [], None
        if callbacks[0] is self:  # one tells for all
            refuse_late_cuts(callbacks, windows)
            refuse_conflicts(callbacks, {one.name: one.claims(trainer, pl_module) for one in callbacks}, windows)
            if not steps_schedules_itself(pl_module):
                _check_schedules(trainer, run, windows)
        _check_against_the_run(self, trainer, run)
        self.start(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.undo.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.undo.close()  # Lightning does not call `teardown` after an exception

    # Not `state_dict`: Lightning would refuse two callbacks of one name with words that do not tell about names.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        history = [list(point) for point in self.history]
        own = {"last_moment": self.last_time, "history": history, "moved": self.shifted}
        state = {"format": self.state_format, "kind": self.state_kind, **own, **self.checkpoint_state()}
        checkpoint.setdefault("callbacks", {})[self.state_key] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.restored, self.saved = True, checkpoint.get("callbacks", {}).get(self.state_key)
        if self.saved is not None:
            self.refuse_damaged(self.saved)
            self.last_time = self.saved["last_moment"]
            self.history = [(step, value) for step, value in self.saved["history"]]
            self.shifted = self.saved.get("moved")

    # Tools for subclasses ---------------------------------------------------------------------------------------

    def refuse_damaged(self, saved: Any) -> None:
        """Refuse what cannot be this callback's entry of a checkpoint.

        Raises:
            ValueError: with what to do instead.
        """
        if (
            not isinstance(saved, dict)
            or not {"last_moment", "history"} <= saved.keys()
            or saved.get("format") != self.state_format
        ):
            found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
            raise ValueError(
                f"The checkpoint's entry '{self.state_key}' is damaged, or was written by another version: its format "
                f"is {found}, and {self.state_format} is read here. Start from its weights instead, by "
                f"load_from_checkpoint."
            )

    def hold_monitors(self, trainer: Trainer) -> None:
        """Keep `EarlyStopping` waiting until the end of the phase is reached."""
        callbacks: list[Any] = trainer.callbacks
        self.undo.enter_context(paused_early_stopping(callbacks, lambda: self.reached))

    def release_monitors(self, trainer: Trainer) -> None:
        """The end is reached: what was best before is not a model that anybody asked for."""
        if monitored := reset_monitors(trainer.callbacks):
            rank_zero_info(
                f"'{self.name}' has reached its end at step {trainer.global_step}: checkpoints and early stopping by "
                f"{', '.join(sorted(set(monitored)))} now choose among what comes after it."
            )


def step_after(trainer: Trainer, hand: str) -> int:
    """What a hand of the run's clock shows when the step that is being taken is done."""
    return _HANDS[hand](trainer)


def step_before(trainer: Trainer, hand: str) -> int:
    """What a hand of the run's clock shows before the step that is being taken."""
    return step_after(trainer, hand) - (hand != "epochs")


def describe_run(trainer: Trainer, pl_module: LightningModule) -> Run:
    """What the Trainer knows of the length of its run."""
    batches = trainer.num_training_batches
    changing = any(hasattr(callback, "scheduling") for callback in trainer.callbacks)
    return Run(
        epochs=None if trainer.max_epochs in (None, -1) else trainer.max_epochs,
        max_steps=None if trainer.max_steps == -1 else trainer.max_steps,
        batches_per_epoch=None if math.isinf(batches) else int(batches),
        accumulate=trainer.accumulate_grad_batches,
        automatic=pl_module.automatic_optimization and not changing,
        max_time=_is_timed(trainer),
        dry_run=bool(trainer.fast_dev_run),
    )


_HANDS: dict[str, Callable[[Any], int]] = {
    "steps": lambda trainer: trainer.global_step + 1,
    "batches": lambda trainer: trainer.fit_loop.epoch_loop.batch_progress.total.ready,
    "epochs": lambda trainer: trainer.current_epoch,
}


def _is_timed(trainer: Trainer) -> bool:
    return any(type(callback).__name__ == "Timer" for callback in trainer.callbacks)


def compression_callbacks(trainer: Trainer) -> list[CompressionCallback]:
    """The compression callbacks of a Trainer, in their order."""
    return [one for one in trainer.callbacks if isinstance(one, CompressionCallback)]


def _check_against_the_run(callback: CompressionCallback, trainer: Trainer, run: Run) -> None:
    """Refuse a phase that the run never comes to, and warn of one that it leaves unfinished."""
    window = callback.window
    if window is None or trainer.fast_dev_run:
        return
    refuse_outside(callback.name, callback.begin, window, run)
    if math.isinf(window.end):
        return
    total = total_length(run, window.unit)
    if total is not None and window.end > total:
        rank_zero_warn(
            f"'{callback.name}' ends at {callback.end!r}, which is {UNITS[window.unit]} {window.end}, but this run has "
            f"only {total} {window.unit}: it will not reach its end. Lower `end`, or train longer."
        )
    if _is_timed(trainer):
        rank_zero_warn(f"'{callback.name}' may not reach its end: max_time may end this run before.")


def _check_schedules(trainer: Trainer, run: Run, windows: Mapping[str, PhaseWindow]) -> None:
    """Refuse learning-rate schedules at whose end torch stops the run, and warn of others that end before it."""
    kinds = {type(one).__name__ for one in trainer.callbacks}
    if trainer.fast_dev_run or "StochasticWeightAveraging" in kinds:  # it takes a schedule of its own in the end
        return
    last = [windows[one.name] for one in compression_callbacks(trainer) if one.sets_learning_rates()]
    covered = any(window.end >= (total_length(run, window.unit) or math.inf) for window in last)
    for short in find_short_schedules(trainer.lr_scheduler_configs, run, trainer.global_step, trainer.current_epoch):
        if short.stops and not kinds & {"EarlyStopping", "Timer"}:
            raise ValueError(short.words)
        if short.stops or not covered:
            rank_zero_warn(short.words)


def _refuse_equal_names(callback: CompressionCallback, trainer: Trainer) -> None:
    others = [
        other for other in compression_callbacks(trainer) if other is not callback and other.name == callback.name
    ]
    if others:
        raise ValueError(
            f"Two callbacks have the name '{callback.name}': {type(callback).__name__} and {type(others[0]).__name__}. "
            f"Give one another name: {type(callback).__name__}(..., name='{callback.name}_2')."
        )


def _refuse_sharded(callback: CompressionCallback, trainer: Trainer) -> None:
    strategy = type(trainer.strategy)
    if SHARDED & {cls.__name__ for cls in strategy.__mro__}:
        raise ValueError(
            f"{type(callback).__name__} needs whole weights on every rank, but {strategy.__name__} shards them. Use "
            f"strategy='ddp', or one device."
        )
