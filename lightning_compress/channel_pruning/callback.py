"""Remove channels while Lightning trains: the module that goes on training is smaller, and faster."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress._lightning import (
    LightningModule,
    Trainer,
    is_redirected_forward,
    kept_averages,
    rank_zero_info,
    rewrap_ddp,
)
from lightning_compress.channel_pruning.arguments import budget_of, check_options, criterion_of, distribution_of
from lightning_compress.channel_pruning.compensation import compensate
from lightning_compress.channel_pruning.constant_folding import fold_constants
from lightning_compress.channel_pruning.cut_plan import plan_cut
from lightning_compress.channel_pruning.dependency.call_check import CallRecorder, refuse_other_calls
from lightning_compress.channel_pruning.dependency.verification import small_example, verify_cut
from lightning_compress.channel_pruning.distributed import all_reduce_mean_scores, broadcast_units, check_equal_groups
from lightning_compress.channel_pruning.functional.groups import PrunedUnits
from lightning_compress.channel_pruning.penalties import add_penalty_gradients
from lightning_compress.channel_pruning.pruner import ChannelPruner, ChannelPruningConfig, frozen_parameters, is_inside
from lightning_compress.channel_pruning.soft_pruning import zero_channels_
from lightning_compress.channel_pruning.statistics import SEEN, ChannelStatistics
from lightning_compress.core.arguments import as_schedule, check_fraction
from lightning_compress.core.conflicts import ExclusiveClaim
from lightning_compress.core.phases import Duration, PhaseWindow, Run, resolve_window
from lightning_compress.core.registry import required_args
from lightning_compress.nn.batchnorm import BatchNormRecalibration
from lightning_compress.nn.input_recorder import InputRecorder
from lightning_compress.nn.selection import Patterns, as_patterns, select
from lightning_compress.nn.surgery import cut_in_training, refuse_unknown_state
from lightning_compress.nn.weight_averages import averaged_copies
from lightning_compress.training.callback import CompressionCallback, compression_callbacks
from lightning_compress.training.clock import step_after
from lightning_compress.training.structural_callback import StructuralCallback


class ChannelPruning(StructuralCallback):
    """Take the least important channels out of the module while training goes on, until a budget is met.

    Which channels hang together (residual sums, concatenation, flattening, attention heads) is found by watching where
    values go in the module. Parameters stay the same objects and get smaller, and with them gradients, buffers, what
    optimizers remember, averages of the weights and other callbacks' masks. The module that comes out is plain torch.

    Give exactly one budget: `sparsity` (fraction of channels that goes), `parameters` or `macs` (fraction that is
    kept), or `latency_ms` (of the module in eval mode on one thread of the CPU, for the example at two samples).

    Args:
        sparsity, parameters, macs, latency_ms: the budget at `end`.
        latency_in: where latency is taken: "torch" (eager) or "onnxruntime", in floating point. It is taken some ten
            times for each cut, and for ONNX Runtime the module is exported every time: that takes seconds.
        criterion: what makes a channel important: a name in `channel_pruning.functional.criteria` ("l1", "l2", "fpgm",
            "slimming", "taylor", "taylor_activations", "hrank", "entropy", "apoz", "lasso", "thinet", "random"), a
            dotted path, or a function that asks for what it needs by name. What is seen of a batch is seen in the step
            of the cut. Where a criterion asks for "patches" ("lasso", "thinet"), layers that read what is left are
            refitted to give what they gave before, by least squares.
        distribution: how layers share what goes: "uniform" (the same fraction of each), "global", or a function.
        schedule: how the budget comes near between `begin` and `end`: see `Pruning`.
        begin, end, every: first, last and pace of the cuts: "20%", "3 epochs", "500 steps", an int or a float.
        round_to: channels that stay are a multiple of it where a layer has so many; 8 or 16 suit most hardware.
        min_density: smallest fraction of a layer's channels that stays; at least one does, if its branch may not go.
        remove_blocks: whether the branch of a residual sum may lose all of its inner channels, and with them what it
            computes, where the distribution takes them all ("global" may). In every sum something stays.
        soft: only zero the chosen channels until `end`, so that they may come back (SFP; ASFP with a rising schedule).
        penalty: "slimming" (L1 of the scales of normalisation layers) or "group_lasso", between `begin` and `end`, by
            gradients of `penalty_strength`. With `every="100%"` all that goes goes at `end`.
        targets: which layers may lose outputs: wildcards for names or classes, "re:" patterns, module classes,
            functions, or a list of these. None: all trainable ones but embeddings.
        ignore: what to leave out, written like `targets`. Layers that are coupled with it stay whole too.
        example_input: what the module's forward takes: a tensor, a tuple of positional or a dict of keyword arguments.
            None: `module.example_input_array`, or what the module is called with in the first step.
        recalibrate: over how many batches after a cut BatchNorm's statistics are plain means of these batches; 0: none.
        seed: of the "random" criterion; the user's random stream is never touched.
        gate_best: let `ModelCheckpoint(monitor=...)` compare only epochs after `end`, and `EarlyStopping` wait for it.
        name: part of the logged keys and of the checkpoint's; two callbacks need two names.

    Raises:
        ValueError: at construction, before training or, where the module must first be seen at work, in the first step,
            for whatever cannot be done, with the way to mend it. The module is not touched then.

    >>> from pytorch_lightning import Trainer
    >>> from pytorch_lightning.demos.boring_classes import BoringModel
    >>> model, pruning = BoringModel(), ChannelPruning(sparsity=0.75, begin=1, end=3, every=1)
    >>> model.layer = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> Trainer(barebones=True, accelerator="cpu", max_steps=4, callbacks=pruning).fit(model)
    >>> model.layer
    Sequential(
      (0): Linear(in_features=32, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    """

    progress_metric = "macs"
    undone = "Nothing was cut."
    cuts_channels = True
    renamed_arguments = {"floor": "min_density"}

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        parameters: float | None = None,
        macs: float | None = None,
        latency_ms: float | None = None,
        latency_in: str = "torch",
        criterion: str | Callable[..., Tensor] = "l2",
        distribution: str | Callable[..., PrunedUnits] = "uniform",
        schedule: str | Callable[[float], float] = "linear",
        begin: Duration = "20%",
        end: Duration = "60%",
        every: Duration = "5%",
        round_to: int = 1,
        min_density: float = 0.0,
        remove_blocks: bool = False,
        soft: bool = False,
        penalty: str | None = None,
        penalty_strength: float = 1e-4,
        targets: Patterns = None,
        ignore: Patterns = (),
        example_input: Any = None,
        recalibrate: int = 10,
        seed: int = 0,
        gate_best: bool = True,
        name: str = "channels",
    ) -> None:
        super().__init__(name, begin, end, every)
        self.budget = budget_of(latency_in, sparsity=sparsity, parameters=parameters, macs=macs, latency_ms=latency_ms)
        self.latency_in = latency_in
        self.sparsity, self.parameters, self.macs, self.latency_ms = sparsity, parameters, macs, latency_ms
        self.criterion = criterion_of(criterion)
        self.distribution = distribution_of(distribution)
        self.schedule = as_schedule(schedule)
        check_options(round_to, recalibrate, penalty, penalty_strength)
        self.min_density, self.round_to, self.soft = check_fraction("min_density", min_density), round_to, soft
        self.penalty, self.penalty_strength = penalty, penalty_strength
        self.remove_blocks, self.targets, self.ignore = remove_blocks, targets, ignore
        as_patterns(targets), as_patterns(ignore)
        self.example_input, self.recalibrate, self.seed, self.gate_best = example_input, recalibrate, seed, gate_best
        self.first: dict[str, Any] | None = None
        self.pruner: ChannelPruner | None = None
        self.part, self.frozen = "", set[str]()
        self.statistics = ChannelStatistics(nn.Module(), ())
        self.input_recorder: InputRecorder | None = None
        self.calls: CallRecorder | None = None
        self.recalibration = BatchNormRecalibration()
        self.recalibrated_from: int | None = None
        self._module: Callable[[], nn.Module | None] = lambda: None

    def timeline(self, run: Run) -> list[tuple[int, str]]:
        window = resolve_window(self.begin, self.end, self.every, run)
        return [(time, f"{self.budget.kind} {self._progress(time, window):.0%} of the way") for time in window.times()]

    def _progress(self, time: int, window: PhaseWindow) -> float:
        return self.schedule(window.progress(time))

    # Before training ------------------------------------------------------------------------------------------------

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._allowed(trainer, pl_module)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pruner = None
        if self.saved is not None:
            self.first = self.saved["first"]
        elif self._module() is not pl_module or self.restored:
            self.first = None
        self._module = ref(pl_module)
        self.recalibrated_from, self.recalibration.begun = (self.saved or {}).get("recalibrating", (None, False))
        self.undo.callback(self.recalibration.end)
        self.statistics = ChannelStatistics(pl_module, required_args(self.criterion))
        for handle in self.statistics.hooks():
            self.undo.callback(handle.remove)
        self.calls = CallRecorder(pl_module, features_only=True)
        self.undo.callback(self.calls.close)
        if self._given(pl_module) is None:
            self.input_recorder = InputRecorder(pl_module, is_redirected_forward)
            self.undo.callback(self.input_recorder.close)

    def claims(self, trainer: Trainer, pl_module: LightningModule) -> list[ExclusiveClaim]:
        mend = "Give each layer to one of them by targets and ignore; for several phases use one schedule."
        return [ExclusiveClaim("cut channels of", frozenset(self._allowed(trainer, pl_module)), mend)]

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_unknown_state(trainer.optimizers)
        # Later another callback may hold parameters still for a while, and a resumed run must not take them for frozen.
        self.frozen = frozen_parameters(pl_module)
        if self.reached:  # nothing is left to be cut, and hooks of later phases would learn from a look at the module
            self._close()
        elif (given := self._given(pl_module)) is not None:
            self._prepare(trainer, pl_module, "", given)

    def _given(self, pl_module: LightningModule) -> Any:
        return self.example_input if self.example_input is not None else pl_module.example_input_array

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, part: str, example: Any) -> None:
        """Find the groups, and refuse what cannot be done before anything is cut."""
        model = pl_module.get_submodule(part)
        prefix = f"{part}." if part else ""
        allowed, frozen, protected = (
            {name.removeprefix(prefix) for name in names}
            for names in (self._allowed(trainer, pl_module), self.frozen, _protected(trainer, pl_module))
        )
        config = ChannelPruningConfig(
            self.criterion, self.distribution, self.min_density, self.round_to, self.seed, self.remove_blocks
        )
        pruner = ChannelPruner(
            model, small_example(model, example), self.budget, config, allowed, self.first, frozen, protected
        )
        if self.first is None:
            pruner.check()
        check_equal_groups(pruner.groups, pl_module.device)
        self.part, self.pruner, self.first = part, pruner, pruner.state_dict()
        self.statistics.restrict_to(part)
        units = sum(group.units for group in pruner.prunable_groups)
        removable = f" Removable blocks: {', '.join(pruner.removable_blocks)}." if pruner.removable_blocks else ""
        rank_zero_info(
            f"'{self.name}' may cut {units} channels or heads of {len(pruner.prunable_groups)} groups of layers. Not "
            f"pruned: {pruner.unprunable_report() or 'nothing'}.{removable}"
        )

    def _allowed(self, trainer: Trainer, pl_module: LightningModule) -> set[str]:
        protected = _protected(trainer, pl_module)
        chosen = select(pl_module, self.targets, self.ignore).chosen
        vanished = {name for name, one in pl_module.named_parameters(remove_duplicate=False) if not one.numel()}
        return {name for one in chosen for name in one.names if not is_inside(name, protected)} | vanished

    def on_modules_replaced(self, trainer: Trainer, pl_module: LightningModule, names: Sequence[str]) -> None:
        if self.pruner is None or self.reached:
            return
        if self.cut.kept:
            raise ValueError(
                f"{', '.join(names)} would be replaced between cuts of '{self.name}', which counts its budget from the "
                f"first one. Let replacements end before '{self.name}' begins, or begin when it has ended."
            )
        self.first = None
        self.statistics = ChannelStatistics(pl_module, required_args(self.criterion))
        for handle in self.statistics.hooks():
            self.undo.callback(handle.remove)
        self._prepare(trainer, pl_module, self.part, self.pruner.example)

    # At each step ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.statistics.listening = self._acts_in_this_batch(trainer)
        if self.calls is not None:
            self.calls.listening = True
        if self.recalibrated_from is not None:
            self.recalibration.update(
                step_after(trainer, "batches"), self.recalibrated_from, self.recalibrate, pl_module
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.reached or not self.is_open(trainer):
            return
        if (
            self.statistics.listening or not self.statistics.asked & SEEN
        ):  # else nothing was seen: the next batch will do
            time = self.due_time(trainer)
            self.due = self.due if time is None else time
        if self.pruner is not None:
            if self.due is not None:
                self.statistics.take_gradients(self.pruner.prunable_groups)
            if self.penalty is not None:
                stepping = {one for group in optimizer.param_groups for one in group["params"]}
                add_penalty_gradients(
                    self.pruner.model, self.pruner.prunable_groups, self.penalty, self.penalty_strength, stepping
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.statistics.listening = False
        if self.reached:
            return
        if self.pruner is None:
            self._prepare(trainer, pl_module, *_called(self.input_recorder))
            self.statistics.take_gradients(self._pruner.prunable_groups)
        if self.calls is not None:
            self._end_first_step()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _end_first_step(self) -> None:
        """All is known that the first step tells."""
        if self.calls is not None:
            prefix = f"{self.part}." if self.part else ""
            seen = {name.removeprefix(prefix) for name in self.calls.names}
            refuse_other_calls(self._pruner.model, self._pruner.example, seen)
        self._close()

    def _close(self) -> None:
        """Watch the module's calls no longer."""
        for one in (self.input_recorder, self.calls):
            if one is not None:
                one.close()
        self.input_recorder = self.calls = None

    def _acts_in_this_batch(self, trainer: Trainer) -> bool:
        """Whether a moment is due at a step of this batch; in manual optimization each optimizer may take one."""
        if self.window is None or self.reached:
            return False
        more = len(trainer.optimizers) - 1 if self.window.unit == "steps" else 0
        times = [self.window.last_time(step_after(trainer, self.window.unit) + step) for step in range(more + 1)]
        return any(one is not None and one != self.last_time for one in times)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.pruner is not None:
            self._log(trainer)
        elif self.history:  # resumed behind the last cut
            self.log_metrics(trainer, {"macs": self.history[-1][1]})

    # A cut ----------------------------------------------------------------------------------------------------------

    def change_structure(self, trainer: Trainer, pl_module: LightningModule, time: int) -> None:
        pruner, window = self._pruner, self._window
        scores = all_reduce_mean_scores(pruner.scores(self.statistics), pl_module.device)
        chosen = broadcast_units(
            pruner.select_units(scores, self._progress(time, window)), pruner.prunable_groups, pl_module.device
        )
        pruned = {name: units for name, units in chosen.items() if units}
        if pruned and self.soft and time < window.end:
            zero_channels_(pruner.model, pruner.prunable_groups, pruned)
            for other in trainer.callbacks:
                if isinstance(other, CompressionCallback):
                    other.on_weights_replaced()
        elif pruned:
            self._cut(trainer, pl_module, pruned)
            self._log(trainer)
        self.statistics.reset()

    def _cut(self, trainer: Trainer, pl_module: LightningModule, pruned: PrunedUnits) -> None:
        pruner = self._pruner
        if (why := verify_cut(pruner.model, pruner.small, pruner.groups, pruned)) is not None:
            raise ValueError(f"Cutting {', '.join(pruned)} fails: {why}. Nothing was changed; ignore these layers.")
        refuse_unknown_state(trainer.optimizers)
        fold_constants(pruner.model, pruner.small, pruner.groups, pruned)
        if "patches" in self.statistics.asked:
            compensate(self.statistics, pruner.prunable_groups, pruned)
        cut = plan_cut(pruner.groups, pruned).prefixed(self.part)
        cut_in_training(pl_module, cut, trainer.optimizers, list(averaged_copies(pl_module, kept_averages(trainer))))
        for other in trainer.callbacks:
            if isinstance(other, CompressionCallback) and other is not self:
                other.on_channels_pruned(cut)
        rewrap_ddp(trainer)
        self.cut = cut.composed_with(self.cut)
        pruner.record_pruned(pruned)
        if self.recalibrate:
            self.recalibrated_from = step_after(trainer, "batches") + 1
            self.recalibration.restart()

    # What is kept and said ------------------------------------------------------------------------------------------

    def checkpoint_state(self) -> dict[str, Any]:
        recalibrating = [self.recalibrated_from, self.recalibration.begun]
        return {
            **super().checkpoint_state(),
            "first": self.first,
            "recalibrating": recalibrating,
        }

    def _log(self, trainer: Trainer) -> None:
        metrics = {"sparsity": self._pruner.sparsity, **self._pruner.metrics()}
        self.log_metrics(trainer, metrics)

    @property
    def _pruner(self) -> ChannelPruner:
        if self.pruner is None:
            raise RuntimeError(f"'{self.name}' has not seen the module at work yet.")
        return self.pruner


def _called(seen: InputRecorder | None) -> tuple[str, Any]:
    if seen is None or seen.call is None:
        raise ValueError(
            "The first training step called neither the module nor one submodule that holds all of its parameters, so "
            "it is not known what its forward takes. Give ChannelPruning(example_input=...)."
        )
    return seen.call.part, seen.call.example


def _protected(trainer: Trainer, pl_module: LightningModule) -> set[str]:
    """Names of modules that other callbacks count on."""
    return {name for other in compression_callbacks(trainer) for name in other.protected_modules(pl_module)}
