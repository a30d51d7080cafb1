"""Fine-tune in phases while Lightning trains."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import ref

from torch import nn
from torch.optim import Optimizer

from lightning_compress._lightning import LightningModule, Trainer, rank_zero_info
from lightning_compress.core.conflicts import ExclusiveClaim, allowed_shift
from lightning_compress.core.distributed import is_distributed
from lightning_compress.core.phases import Duration, PhaseWindow, Run, clip_to
from lightning_compress.finetuning.arguments import (
    as_learning_rate,
    as_weight_decay,
    check_before,
    check_has_effect,
    check_lr_multipliers,
    check_positive,
)
from lightning_compress.finetuning.freezing import (
    UnfrozenParameters,
    frozen_by_layer,
    split_layers,
    unfreeze_parameters,
)
from lightning_compress.finetuning.functional.layers import unfreeze_times
from lightning_compress.finetuning.layout import FreezeSpec, ResolvedPhase, resolve_phase
from lightning_compress.finetuning.lr_overrides import (
    HyperparameterOverrides,
    OptimizerSnapshot,
    check_optimizers,
    combined_source,
    make_lr_source,
)
from lightning_compress.finetuning.phase_times import PhaseTimes, WrittenTimes, resolve_times
from lightning_compress.finetuning.rewinding import Rewinding
from lightning_compress.finetuning.step_overrides import Values, override_param_groups
from lightning_compress.finetuning.stopping import as_stop_criterion, monitored_value
from lightning_compress.nn.batchnorm import BatchNormRecalibration, has_batchnorm
from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.selection import Patterns, as_patterns
from lightning_compress.training.callback import CompressionCallback, compression_callbacks
from lightning_compress.training.clock import describe_run, step_before


class FineTuning(CompressionCallback):
    """For a phase of the run, let layers stand still, change learning rates and weight decay, or rewind weights.

    Learning rates and weight decays are changed only within the optimizers' steps: each parameter is stepped as it were
    in a group of its own with these values, while schedulers compute on, and checkpoints hold, the user's groups and
    values. That is exact for every optimizer that treats a parameter by the settings of its group (all of torch.optim
    but LBFGS, which is refused `lr_multipliers` and `layer_decay`).

    Args:
        freeze: parameters that do not move in this phase, not by momentum or weight decay either; wildcards for names
            or classes, "re:" patterns, module classes, functions of name and parameter, or a list of these. BatchNorms
            among them keep their statistics. Optimizer states of frozen parameters stay as they are.
        unfreeze: what is trained in this phase, written like `freeze` and stronger than it: also what the user has
            frozen.
        gradual: unfreeze what is frozen layer by layer, from the head down, at equal distances over the phase.
        layers: for `gradual` and `layer_decay`: patterns of each layer, from the input to the head. None: the model's
            layers in the order of their definition, numbered blocks ("encoder.layer.3") as one.
        learning_rate: in this phase: a number for all groups; "x0.1", times the user's schedule; "restart", the user's
            schedule from its beginning to its end, over this phase (where its pace is not known, under manual
            optimization: at the pace it had; ReduceLROnPlateau: from the initial rate on); "rewind", the user's
            schedule as it went on from the moment `rewind`, or from that of "rewind 5%".
        warmup: how long the learning rates rise evenly at the beginning of the phase.
        lr_multipliers: of learning rates by pattern, such as {"backbone.*": 0.1}; the first match counts.
        layer_decay: factor from each layer to the one before it: the last layer has 1, above 0.
        weight_decay: in this phase, a number or a factor "x0.1"; groups without any keep none if others have some.
        rewind: moment before `begin` whose weights, with statistics of BatchNorms, are put back at `begin`.
        reset_moments: let the optimizers begin anew at the rewind; False: keep their momentum.
        recalibrate_bn: "begin" or "end": statistics of BatchNorms are averaged anew from there on, `recalibrate_over`.
        until: what ends the phase before `end`: {"metric": "val_loss", "patience": 3}, if it is no better for 3 epochs,
            or {"metric": "val_acc", "mode": "max", "target": 0.9}; `min_delta` too. Phases of other callbacks
            that begin at `end` or later come as much earlier; those that last to "100%" become as much longer.
        begin, end: "20%", "3 epochs", "500 steps", an int (optimizer steps) or a float (fraction of the run).
        name: part of the logged keys and of the checkpoint's; two callbacks need two names.

    Raises:
        ValueError: at construction or before training, for whatever cannot be done, with the way to mend it.

    >>> from pytorch_lightning import Trainer
    >>> from pytorch_lightning.demos.boring_classes import BoringModel
    >>> model, tuning = BoringModel(), FineTuning(freeze="layer.0.*", learning_rate="x0.1")
    >>> model.layer = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> before = [layer.weight.clone() for layer in (model.layer[0], model.layer[2])]
    >>> Trainer(barebones=True, accelerator="cpu", max_steps=2, callbacks=tuning).fit(model)
    >>> [bool((layer.weight == old).all()) for layer, old in zip((model.layer[0], model.layer[2]), before)]
    [True, False]
    """

    undone = "Nothing was tuned."
    renamed_arguments = {"thaw": "unfreeze", "factors": "lr_multipliers"}

    def __init__(
        self,
        *,
        freeze: Patterns = (),
        unfreeze: Patterns = (),
        gradual: bool = False,
        layers: Sequence[Patterns] | None = None,
        learning_rate: float | str | None = None,
        warmup: Duration | None = None,
        lr_multipliers: Mapping[str, float] | None = None,
        layer_decay: float | None = None,
        weight_decay: float | str | None = None,
        rewind: Duration | None = None,
        reset_moments: bool = True,
        recalibrate_bn: str | None = None,
        recalibrate_over: Duration = "1 epochs",
        until: Mapping[str, Any] | None = None,
        begin: Duration = "0%",
        end: Duration = "100%",
        name: str = "finetuning",
    ) -> None:
        super().__init__(name, begin, end, every=None)
        self.freeze, self.unfreeze, self.gradual, self.layers = freeze, unfreeze, gradual, layers
        self.rate, self.decay = as_learning_rate(learning_rate, rewind), as_weight_decay(weight_decay)
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.lr_multipliers = check_lr_multipliers(lr_multipliers)
        self.layer_decay = None if layer_decay is None else check_positive("layer_decay", layer_decay)
        self.rewind, self.reset_moments = rewind, reset_moments
        self.recalibrate_bn, self.recalibrate_over = recalibrate_bn, recalibrate_over
        self.until = until
        as_patterns(freeze), as_patterns(unfreeze)
        check_has_effect(self.settings())
        for written, time in (("rewind", rewind), ("learning_rate='rewind'", self.rate.time)):
            if time is not None:
                check_before(written, time, begin)
        self._module: Callable[[], nn.Module | None] = lambda: None
        self._forget()

    def timeline(self, run: Run) -> list[tuple[int, str]]:
        window, since = self.scheduled_window(run), self._times(run).weights_from
        ends = [] if window.end == float("inf") else [(int(window.end), "ends")]
        if since is None:
            return [(window.begin, "begins"), *ends]
        return [(since, "remembers the weights"), (window.begin, f"begins with the weights of {since}"), *ends]

    def scheduled_window(self, run: Run) -> PhaseWindow:
        return clip_to(super().scheduled_window(run), self.end, run)

    # Before training --------------------------------------------------------------------------------------------

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resolve(pl_module)
        if self.recalibrate_bn is not None and not has_batchnorm(pl_module):
            raise ValueError(f"recalibrate_bn={self.recalibrate_bn!r}, but the module has no BatchNorm. Leave it out.")

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.restored or self._module() is not pl_module or not trainer.global_step:
            self._forget()
        self._module = ref(pl_module)
        self._resolve(pl_module)
        self.unfrozen = unfreeze_parameters(pl_module, self.unfreeze, trainer.optimizers, is_distributed())
        check_optimizers(trainer.optimizers, self.decay.kind != "same", bool(self.overrides.lr_multipliers))
        replays = self.rate.kind == "restart" and pl_module.automatic_optimization
        configs = trainer.lr_scheduler_configs
        self.starts = [OptimizerSnapshot.capture(one, configs, pl_module, copy=replays) for one in trainer.optimizers]
        for still in self.phase.frozen:
            self.undo.callback(still.release)
        self.undo.callback(self.unfrozen.release)
        self.undo.callback(self.recalibration.end)

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run, window = describe_run(trainer, pl_module), self._window
        self.times = self._times(run)
        self.overrides.warmup = self.times.warmup
        if not self.overrides.sources:  # there are some if one Trainer goes on
            since = self.times.rates_from or 0
            self.overrides.sources = [make_lr_source(self.rate, one, since, window, run) for one in self.starts]
        if self.saved is not None:
            self._load(self.saved)
        self._refuse_to_come_late(step_before(trainer, window.unit))
        self._refuse_rounds_by_epochs(trainer)
        phases = [one for one in trainer.callbacks if isinstance(one, FineTuning)]
        if all(one.window is not None for one in phases):  # the last one to start acts for all
            for place, optimizer in enumerate(trainer.optimizers):
                prepare = partial(_together, phases, trainer, place, optimizer)
                still = lambda: [parameter for one in phases for parameter in one.frozen_names]
                self.undo.enter_context(override_param_groups(optimizer, prepare, still))

    def protected_modules(self, pl_module: LightningModule) -> list[str]:
        """What is frozen for a while is left whole for all of the run."""
        frozen = frozen_by_layer(pl_module, self.freeze, self.unfreeze, split_layers(pl_module, self.layers))
        return [name.rpartition(".")[0] for layer in frozen for one in layer for name in one.names]

    def claims(self, trainer: Trainer, pl_module: LightningModule) -> list[ExclusiveClaim]:
        mend = "Let one begin where the other ends, or give both things to do to one of them."
        return [ExclusiveClaim("be about", frozenset(self.touched), mend, permanent=False)]

    def sets_learning_rates(self) -> bool:
        return self.rate.kind in ("fixed", "restart", "rewind")

    def current_learning_rate(self) -> float | None:
        return self.overrides.rates.get("learning_rate")

    def on_channels_pruned(self, cut: Cut) -> None:
        self.rewinding.on_channels_pruned(cut)

    def on_modules_replaced(self, trainer: Trainer, pl_module: LightningModule, names: Sequence[str]) -> None:
        for still in self.phase.frozen:
            still.release()  # they are held again before the next batch
        self._resolve(pl_module)
        for still in self.phase.frozen:
            self.undo.callback(still.release)

    # At each step -----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        window, times = self._window, self.times
        now = step_before(trainer, window.unit)
        others = (one.rewinding for one in _alike(self, trainer))
        if times.weights_from is not None and self.rewinding.update(
            now, times.weights_from, window.begin, pl_module, trainer.optimizers, others
        ):
            for other in trainer.callbacks:
                if isinstance(other, CompressionCallback):
                    other.on_weights_replaced()
        self._hold_still(now)
        if self.recalibrate_bn is not None:
            begin = window.begin if self.recalibrate_bn == "begin" else window.end
            self.recalibration.update(now, begin, times.calibrated_for, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for still in self.phase.frozen:
            still.drop_gradients()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.on_after_backward(trainer, pl_module)  # for gradients that came otherwise, before they are clipped

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_if_enough(trainer)
        if not self.overrides.rates and not self.frozen_names:
            return
        frozen, total = (sum(one.numel() for one in each) for each in (self.frozen_names, pl_module.parameters()))
        self.log_metrics(trainer, {"frozen": frozen / total, **self.overrides.rates})

    def has_begun(self, trainer: Trainer) -> bool:
        return step_before(trainer, self._window.unit) >= self._window.begin

    @property
    def frozen_names(self) -> list[nn.Parameter]:
        """The parameters that stand still now."""
        return [parameter for still in self.phase.frozen if still.holds for parameter in still.parameters]

    def shift_earlier(self, since: float, by: int) -> None:
        before = self._window.begin
        super().shift_earlier(since, by)
        for source in self.overrides.sources:
            source.begins_earlier(before - self._window.begin)

    def _end_if_enough(self, trainer: Trainer) -> None:
        unit, window = self._window.unit, self._window
        at = step_before(trainer, unit) + (unit != "steps")  # at the end of an epoch its last batch is done
        there = (
            (one, one.window) for one in compression_callbacks(trainer) if one is not self and one.window is not None
        )
        others = [(one, its) for one, its in there if its.unit == unit]
        # The masks of a round are made in the step that reaches its moment, and those who rewind then come after it.
        at += any(bool(its.offsets) and window.end in its.times() for _, its in others)
        if self.enough is None or not window.begin < at < window.end:
            return
        enough = self.enough(monitored_value(self.enough.metric, trainer.callback_metrics))
        if not trainer.strategy.reduce_boolean_decision(enough, all=True):
            return
        self.set_window(replace(window, end=at))
        later = [one for one, its in others if its.begin >= window.end or (its.offsets and its.end >= window.end)]
        moves = [allowed_shift(one, compression_callbacks(trainer), window.end, int(window.end) - at) for one in later]
        for other, by in zip(later, moves, strict=True):
            other.shift_earlier(window.end, by)
        rank_zero_info(f"'{self.name}' ends at {at} {unit}, not {window.end}: {self.enough}.")

    # What is kept -----------------------------------------------------------------------------------------------

    def checkpoint_state(self) -> dict[str, Any]:
        enough = None if self.enough is None else self.enough.state_dict()
        own = {
            "rewinding": self.rewinding.state_dict(),
            "recalibrated": self.recalibration.begun,
            "sources": self.overrides.state_dict(),
        }
        return {**own, "enough": enough}

    def _load(self, saved: dict[str, Any]) -> None:
        self.rewinding.load_state_dict(saved["rewinding"])
        self.recalibration.begun = saved["recalibrated"]
        if self.enough is not None and saved["enough"] is not None:
            self.enough.load_state_dict(saved["enough"])
        self.overrides.load_state_dict(saved["sources"], f"'{self.name}'")

    def _forget(self) -> None:
        self.rewinding, self.recalibration = Rewinding(not self.reset_moments), BatchNormRecalibration()
        self.phase, self.unfrozen, self.overrides, self.times = (
            ResolvedPhase(),
            UnfrozenParameters(),
            HyperparameterOverrides(),
            PhaseTimes(),
        )
        self.enough = as_stop_criterion(self.until)
        self.starts, self.touched = list[OptimizerSnapshot](), frozenset[str]()

    def _resolve(self, pl_module: LightningModule) -> None:
        asked = FreezeSpec(self.freeze, self.unfreeze, self.gradual, self.layers, self.lr_multipliers, self.layer_decay)
        alone = pl_module.automatic_optimization and not is_distributed()
        self.phase = resolve_phase(pl_module, asked, without_graph=alone)
        self.overrides.lr_multipliers, self.overrides.weight_decay = self.phase.lr_multipliers, self.decay
        tunes_all = self.rate.kind != "same" or self.decay.kind != "same" or self.warmup or self.layer_decay
        self.touched = self.phase.everything if tunes_all else self.phase.touched

    def _hold_still(self, now: int) -> None:
        begin, end = self._window.begin, self._window.end
        (self.unfrozen.hold if begin <= now < end else self.unfrozen.release)()
        ends = unfreeze_times(begin, int(end), len(self.phase.frozen)) if self.gradual else [end]
        for still, until in zip(reversed(self.phase.frozen), ends, strict=True):
            if begin <= now < until:
                still.hold()
            elif still.holds:
                still.release()

    def _times(self, run: Run) -> PhaseTimes:
        calibrated = None if self.recalibrate_bn is None else self.recalibrate_over
        written = WrittenTimes(self.begin, self.end, self.warmup, self.rewind, self.rate.time, calibrated)
        return resolve_times(written, super().scheduled_window(run), run)

    def _refuse_to_come_late(self, now: int) -> None:
        begin, since = self._window.begin, self.times.weights_from
        weights = since is not None and since < now and not (self.rewinding.weights or self.rewinding.done)
        rates = any(source.lacks(now - begin) for source in self.overrides.sources) and now < self._window.end
        if weights or rates:
            raise ValueError(
                f"'{self.name}' goes back to what was before moment {now} of this run, but the checkpoint that "
                f"is gone on from was written without it, or with other arguments. Let it go back to a later moment."
            )

    def _refuse_rounds_by_epochs(self, trainer: Trainer) -> None:
        if self.times.weights_from is None or self._window.unit != "epochs":
            return
        for other in compression_callbacks(trainer):
            if other.window is not None and other.window.offsets:
                raise ValueError(
                    f"'{self.name}' would rewind the weights before '{other.name}' has chosen what to prune: how many "
                    f"batches an epoch has is not known here, so both would act as the epoch begins. Give the Trainer "
                    f"limit_train_batches=N."
                )


def _alike(phase: FineTuning, trainer: Trainer) -> Iterator[FineTuning]:
    """The other phases whose moments are counted on the same hand."""
    for other in trainer.callbacks:
        if isinstance(other, FineTuning) and other is not phase and other._window.unit == phase._window.unit:
            yield other


def _together(phases: Sequence[FineTuning], trainer: Trainer, place: int, optimizer: Optimizer) -> Values | None:
    """What all phases make of an optimizer's step that is being taken."""
    found = []
    for phase in phases:
        window = phase.window
        if window is not None and not phase.overrides.idle:
            step = step_before(trainer, window.unit) - window.begin
            found.append(phase.overrides.values(place, optimizer, step, window.end - window.begin))
    return combined_source(found)
