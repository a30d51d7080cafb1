"""What every compression callback shares: when it acts, what it saves, how it logs, how it cleans up."""

import math
from collections.abc import Callable, Sequence
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
from lightning_compress.core.checkpoint import STATE_PREFIX, refuse_damaged_entry
from lightning_compress.core.conflicts import (
    ExclusiveClaim,
    FixedShapes,
    phase_windows,
    refuse_conflicts,
    refuse_late_cuts,
)
from lightning_compress.core.patching import wrapped_method
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
from lightning_compress.training.clock import describe_run, step_after
from lightning_compress.training.loggers import log_config, log_immediately, plain_value
from lightning_compress.training.monitors import paused_early_stopping, reset_monitors
from lightning_compress.training.run_checks import (
    check_lr_schedules,
    check_phase,
    refuse_equal_names,
    refuse_sharded_weights,
)


class CompressionCallback(Callback):
    """A thin layer between Lightning's hooks and functions that know nothing of it; subclasses hold no maths.

    Args:
        name: part of the logged keys and key of the saved state; give two callbacks of one kind two names.
        begin, end, every: durations: "20%", "3 epochs", "500 steps", an int (steps) or a float (fraction of the run);
            `every` is None if nothing has a pace.

    Raises:
        ValueError: if a duration cannot be read, or `begin` is not before `end`.

    >>> class Tick(CompressionCallback):
    ...     def on_before_optimizer_step(self, trainer, pl_module, optimizer):
    ...         time = self.due_time(trainer)
    ...         if time is not None:
    ...             self.mark_done(time)
    >>> tick = Tick("tick", begin=2, end=6, every=2)
    >>> tick.timeline(Run(epochs=None, max_steps=8))
    [(2, 'begins'), (6, 'ends')]
    """

    state_format = 1
    state_kind: str | None = None  # what its entry of a checkpoint holds, for those who read it without the callback
    renamed_arguments: ClassVar[dict[str, str]] = {}  # new names of arguments by old ones, for the words of an error
    has_phase = True  # whether it acts between its begin and its end
    gate_best = False  # whether `ModelCheckpoint` and `EarlyStopping` judge only what comes after its end
    undone: str | None = None  # what has not happened if it never began; None: that is not worth a warning
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
        self.restored, self.released = False, False
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
        """The window, shifted as in the resumed run."""
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
        """The scheduled time that is due now, once; None if there is none.

        Call it while a step is taken. The caller calls `self.mark_done(time)` when it has acted.
        """
        if self.window is None:
            return None
        time = self.window.last_time(step_after(trainer, self.window.unit))
        return None if time == self.last_time else time

    def mark_done(self, time: int) -> None:
        """Remember that what was due at `time` has happened."""
        self.last_time = time

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

    def is_open(self, trainer: Trainer) -> bool:
        """Whether the step that is being taken is one of the phase, or comes after it."""
        return self.window is not None and step_after(trainer, self.window.unit) >= self.window.begin

    def has_begun(self, trainer: Trainer) -> bool:
        """Whether it has done anything, for the warning at the end of a run."""
        return self.last_time is not None

    @property
    def reached(self) -> bool:
        """Whether the end of the phase is behind."""
        return self.window is not None and self.last_time == self.window.end

    def timeline(self, run: Run) -> list[tuple[int, str]]:
        """Times in the unit of this callback's window, and what happens then."""
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
        """Log `compress/<name>/<key>` to the loggers, to callbacks and, for `progress_metric`, to the progress bar."""
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
        refuse_equal_names(self, compression_callbacks(trainer))
        refuse_sharded_weights(self, trainer)
        if not builds_its_layers_late(pl_module):
            self.check(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if builds_its_layers_late(pl_module):
            self.check(trainer, pl_module)
        self.released = self.saved is not None and self.saved["released"]
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
                check_lr_schedules(callbacks, trainer, run, windows)
        check_phase(self, trainer, run)
        self.start(trainer, pl_module)
        if self.gate_best and not self.released:
            self.undo.enter_context(paused_early_stopping(trainer.callbacks, lambda: self.reached))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.undone is not None and not trainer.fast_dev_run and not self.has_begun(trainer):
            rank_zero_warn(f"'{self.name}' never began: the run ended before begin={self.begin!r}. {self.undone}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.undo.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no `teardown` after an exception. Its callbacks that save the broken run come after this one,
        # and its strategy after them: what is undone now would be missing in their checkpoint.
        after = ExitStack()

        def undo(original: Callable[..., Any], *args: Any) -> Any:
            try:
                return original(*args)
            finally:
                after.close()
                self.undo.close()

        after.enter_context(wrapped_method(trainer.strategy, "on_exception", undo))

    # Not `state_dict`: Lightning would refuse two callbacks of one name with words that do not tell about names.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        history = [list(point) for point in self.history]
        own = {"last_moment": self.last_time, "history": history, "moved": self.shifted, "released": self.released}
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
        refuse_damaged_entry(self.state_key, saved, self.state_format, {"last_moment", "history"})

    def release_monitors(self, trainer: Trainer) -> None:
        """If the end is reached, let monitors compare from now on: what was best before is not what was asked for."""
        if not self.reached or self.released:
            return
        self.released = True
        monitored = reset_monitors(trainer.callbacks) if self.gate_best else []
        if monitored:
            rank_zero_info(
                f"'{self.name}' has reached its end at step {trainer.global_step}: checkpoints and early stopping by "
                f"{', '.join(sorted(set(monitored)))} now choose among what comes after it."
            )


def compression_callbacks(trainer: Trainer) -> list[CompressionCallback]:
    """The compression callbacks of a Trainer, in their order.

    >>> from types import SimpleNamespace
    >>> trainer = SimpleNamespace(callbacks=[CompressionCallback("tick"), Callback()])
    >>> [one.name for one in compression_callbacks(trainer)]
    ['tick']
    """
    return [one for one in trainer.callbacks if isinstance(one, CompressionCallback)]
