"""Prune weights while Lightning trains."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from inspect import signature
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress._lightning import LightningModule, Trainer, kept_averages, rank_zero_info, rank_zero_warn
from lightning_compress.core.arguments import as_schedule, check_fraction
from lightning_compress.core.conflicts import ExclusiveClaim, FixedShapes
from lightning_compress.core.interpolation import interpolate
from lightning_compress.core.patching import wrapped_method
from lightning_compress.core.phases import Duration, PhaseWindow, Run, window_from_milestones
from lightning_compress.core.registry import check_signature, find
from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.selection import Patterns, Selection, as_patterns, select
from lightning_compress.nn.weight_averages import find_averages
from lightning_compress.pruning.allocation import PrunableLayers
from lightning_compress.pruning.arguments import check_pattern, overridden
from lightning_compress.pruning.functional import criteria, distributions
from lightning_compress.pruning.granularity import Block, NOfM, parse_granularity
from lightning_compress.pruning.masks import MaskedParameters
from lightning_compress.pruning.pruner import Pruner
from lightning_compress.pruning.rounds import check_rounds, sparsity_after
from lightning_compress.training.callback import CompressionCallback


class Pruning(CompressionCallback):
    """Zero the least important weights while training goes on, more of them as the schedule rises.

    Pruned weights are exact zeros from the update on, in every forward pass, checkpoint and average of the weights. The
    model keeps its parameters and its `state_dict` keys; masks live in the callback and in its part of a checkpoint.

    Args:
        final_sparsity: fraction of the targeted weights that is pruned at `end`, in [0, 1).
        criterion: what makes a weight important: a name in `pruning.functional.criteria` ("magnitude", "random",
            "gradient", "taylor", "movement", "wanda"), a dotted path, or a function that asks for what it needs by
            name.
        granularity: what is pruned together: "weight", "2:4" (any N:M), "block 4x4", "kernel", "row", "column",
            "filter", "group".
        distribution: how layers share the sparsity: "uniform", "global", "erk", "lamp", a dotted path or a function.
        schedule: "constant", "linear", "cubic", "cosine", "exponential", "steps", "one_cycle", or a function of the
            progress in [0, 1] that returns the share of the way from the initial to the final sparsity.
        initial_sparsity: sparsity at `begin`; a target like the final one, not an increment.
        begin, end, every: first, last and pace of the mask updates: "20%", "3 epochs", "500 steps", an int (optimizer
            steps) or a float (fraction of the run). After `end` the masks stay as they are.
        rounds: the moments of all mask updates, such as ["20%", "40%", "60%"], instead of `begin`, `end`, `every` and
            `schedule`: each prunes the same share of what is left. A `FineTuning` that begins at such a moment begins
            right after the masks: rewinding weights there makes lottery tickets.
        targets: which weights: wildcards for names or classes, "re:" patterns, module classes, functions of name and
            parameter, or a list of these. None: all trainable ones of two or more dimensions but embeddings.
        ignore: what to leave out, written like `targets`.
        overrides: final sparsity of single layers by pattern, such as {"*.conv1": 0.3}; the first match counts.
        min_density: smallest fraction of a layer's units that stays; at least one unit always does.
        seed: of the "random" criterion; the user's random stream is never touched.
        gate_best: let `ModelCheckpoint(monitor=...)` compare only epochs after `end`, and `EarlyStopping` wait for it.
        name: part of the logged keys and of the checkpoint's; two callbacks need two names.

    Raises:
        ValueError: at construction or before training, for whatever cannot be done, with the way to mend it.

    >>> from pytorch_lightning import Trainer
    >>> from pytorch_lightning.demos.boring_classes import BoringModel
    >>> model, pruning = BoringModel(), Pruning(final_sparsity=0.75, begin=0, end=4, every=1)
    >>> Trainer(barebones=True, accelerator="cpu", max_steps=5, callbacks=pruning).fit(model)
    >>> pruning.sparsity, model.layer.weight.numel(), int(model.layer.weight.count_nonzero())
    (0.75, 64, 16)
    """

    progress_metric = "sparsity"
    undone = "Nothing is pruned."
    renamed_arguments = {"floor": "min_density"}

    def __init__(
        self,
        final_sparsity: float = 0.9,
        *,
        criterion: str | Callable[..., Tensor] = "magnitude",
        granularity: str = "weight",
        distribution: str | Callable[..., dict[str, int]] = "uniform",
        schedule: str | Callable[[float], float] = "cubic",
        initial_sparsity: float = 0.0,
        begin: Duration = "10%",
        end: Duration = "70%",
        every: Duration = "1%",
        rounds: Sequence[Duration] | None = None,
        targets: Patterns = None,
        ignore: Patterns = (),
        overrides: dict[str, float] | None = None,
        min_density: float = 0.0,
        seed: int = 0,
        gate_best: bool = True,
        name: str = "pruning",
    ) -> None:
        if rounds is not None:
            defaults = {name: argument.default for name, argument in signature(Pruning).parameters.items()}
            check_rounds(rounds, {"schedule": schedule, "begin": begin, "end": end, "every": every}, defaults)
            begin, end = rounds[0], rounds[-1]
        super().__init__(name, begin, end, None if rounds else every)
        self.rounds = rounds
        self.final_sparsity = check_fraction("final_sparsity", final_sparsity)
        self.initial_sparsity = check_fraction("initial_sparsity", initial_sparsity)
        self.min_density = check_fraction("min_density", min_density)
        if self.initial_sparsity > self.final_sparsity:
            raise ValueError(f"initial_sparsity={initial_sparsity} is above final_sparsity={final_sparsity}.")
        self.criterion = check_signature(find(criterion, criteria), criteria.OFFERED)
        self.granularity = granularity
        self.granularity_spec = parse_granularity(granularity)
        self.distribution = check_signature(find(distribution, distributions), distributions.OFFERED)
        self.schedule = as_schedule(schedule)
        self.targets, self.ignore = targets, ignore
        as_patterns(targets), as_patterns(ignore)
        self.overrides = {key: check_fraction(f"overrides[{key!r}]", value) for key, value in (overrides or {}).items()}
        self.seed, self.gate_best = seed, gate_best
        check_pattern(granularity, self.final_sparsity, self.distribution, self.overrides, self.min_density)
        self.selection: Selection | None = None
        self.pruner: Pruner | None = None
        self.carried_sparsity, self.updated = 0.0, False
        self.followed = ExitStack()
        self._module: Callable[[], nn.Module | None] = lambda: None

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask of each pruned weight by the weight's name: boolean, True where a weight stays."""
        return {} if self.pruner is None else {name: mask.bool() for name, mask in self.masked.masks.items()}

    @property
    def sparsity(self) -> float:
        """Fraction of the targeted weights that is pruned now."""
        return 0.0 if self.pruner is None else self.masked.sparsity

    @property
    def masked(self) -> MaskedParameters:
        """The targeted weights and their masks, once a fit has begun."""
        return self._pruner.masked

    def sparsity_at(self, time: int, window: PhaseWindow) -> float:
        """What the schedule asks for at a moment of a window."""
        if self.rounds is not None:
            done = sum(one <= time for one in window.times())
            return sparsity_after(done, len(self.rounds), self.initial_sparsity, self.final_sparsity)
        return interpolate(self.initial_sparsity, self.final_sparsity, self.schedule(window.progress(time)))

    def scheduled_window(self, run: Run) -> PhaseWindow:
        return super().scheduled_window(run) if self.rounds is None else window_from_milestones(self.rounds, run)

    def timeline(self, run: Run) -> list[tuple[int, str]]:
        window = self.scheduled_window(run)
        return [(time, f"sparsity {self.sparsity_at(time, window):.2%}") for time in window.times()]

    # Before training --------------------------------------------------------------------------------------------

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_others(trainer)
        self._build_pruner(pl_module)
        rank_zero_info(f"'{self.name}' prunes {self.selection}.")

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        carried = self.pruner if self._module() is pl_module and not self.restored else None
        # Laid out again: a module may replace its layers in its own `setup`, which comes after that of callbacks.
        self.pruner = self._build_pruner(pl_module)
        self._module = ref(pl_module)
        self.carried_sparsity, self.updated = 0.0, False
        if self.saved is not None:
            self.pruner.load_state_dict(self.saved)
            self.carried_sparsity = self.saved["carried"]
        elif carried is not None:
            self.masked.load_state_dict(carried.masked.state_dict())
            self.carried_sparsity = self.sparsity
        self.undo.callback(self.followed.close)
        self._follow(trainer, pl_module)

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the inputs of layers, and let averages of the weights be masked as the weights."""
        for handle in self._pruner.statistics.hooks():
            self.followed.callback(handle.remove)
        for average in find_averages(pl_module, kept_averages(trainer)):
            follow = partial(_update_then_mask, self.masked, average.parameters)
            self.followed.enter_context(wrapped_method(average.owner, "update_parameters", follow))
            self.masked.averaged_copies.append(average.parameters)
        self.followed.callback(self.masked.averaged_copies.clear)

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_unstepped(self, trainer)
        if not self.resumed:
            self._pruner.statistics.remember_initial()
        for optimizer in trainer.optimizers:
            # Momentum and weight decay move pruned weights even when their gradient is zero.
            handle = optimizer.register_step_post_hook(lambda *_: self._after_step(trainer))
            self.undo.callback(handle.remove)
        self.masked.apply()

    def on_weights_replaced(self) -> None:
        if self.pruner is not None:
            self.masked.apply()

    def on_channels_pruned(self, cut: Cut) -> None:
        if self.pruner is not None:
            self.pruner.slice_channels(cut)
            self.masked.apply()

    def on_modules_replaced(self, trainer: Trainer, pl_module: LightningModule, names: Sequence[str]) -> None:
        if self.pruner is not None:
            older = self.pruner
            self.followed.close()
            self.pruner = self._build_pruner(pl_module)
            self.pruner.take_over(older)
            self._follow(trainer, pl_module)

    def claims(self, trainer: Trainer, pl_module: LightningModule) -> list[ExclusiveClaim]:
        return [
            ExclusiveClaim(
                "prune",
                frozenset(self._pruner.masked.parameters),
                "Give each weight to one of them by targets and ignore; for several phases on one weight use one "
                "schedule.",
            )
        ]

    def fixed_shapes(self) -> FixedShapes:
        if isinstance(self.granularity_spec, Block | NOfM):
            return FixedShapes("begin", "a cut breaks units of neighbours apart")
        return FixedShapes("end", "a cut takes zeros along, and no update comes after it")

    # At each step -----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._pruner.statistics.listening = self._is_open(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._is_open(trainer):
            self._pruner.statistics.add_gradients({one for group in optimizer.param_groups for one in group["params"]})
            self._update_if_due(trainer)
        self.masked.apply_to_gradients()

    def _after_step(self, trainer: Trainer) -> None:
        if self._is_open(trainer):
            self._update_if_due(trainer)  # for optimizers that are stepped behind Lightning's back
        self.masked.apply()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.updated:
            self.updated = False
            self._log(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer)

    # What is kept and said --------------------------------------------------------------------------------------

    def checkpoint_state(self) -> dict[str, Any]:
        return {"carried": self.carried_sparsity, **self._pruner.state_dict()}

    def _log(self, trainer: Trainer) -> None:
        by_layer = self.masked.sparsities()
        layers = {f"layer_sparsity/{name}": value for name, value in by_layer.items()}
        metrics = {"sparsity": self.masked.weighted_mean(by_layer), "target": self._pruner.sparsity}
        self.log_metrics(trainer, {**metrics, **layers})

    @property
    def _pruner(self) -> Pruner:
        if self.pruner is None:
            raise RuntimeError(
                f"'{self.name}' has not seen a model yet: its masks are there once trainer.fit has begun."
            )
        return self.pruner

    def _is_open(self, trainer: Trainer) -> bool:
        return self.is_open(trainer) and not self.reached

    def _update_if_due(self, trainer: Trainer) -> None:
        time, pruner = self.due_time(trainer), self._pruner
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if time is None or not pruner.has_gradients(len(trainer.optimizers) > 1, scaled):
            return
        sparsity = self.sparsity_at(time, self._window)
        if sparsity < pruner.sparsity or sparsity > max(pruner.sparsity, self.carried_sparsity):
            self.updated = True
            if not pruner.update(sparsity, trainer.optimizers):
                rank_zero_warn(f"'{self.name}': the ranks' masks differed; all have those of rank 0 now.")
        self.mark_done(time)
        self.release_monitors(trainer)

    def _build_pruner(self, pl_module: LightningModule) -> Pruner:
        """Find the weights and check whatever can be checked about them."""
        self.selection = select(pl_module, self.targets, self.ignore)
        layers = PrunableLayers({one.name: one for one in self.selection.chosen}, self.granularity_spec)
        if misfits := layers.misfits():
            reasons = "; ".join(f"{name}: {why}" for name, why in misfits.items())
            raise ValueError(
                f"granularity '{self.granularity}' does not fit: {reasons}. Leave these out: "
                f"ignore={[*as_patterns(self.ignore), *misfits]}."
            )
        return Pruner(
            layers,
            self.criterion,
            self.distribution,
            final_sparsity=self.final_sparsity,
            overrides=overridden(self.overrides, self.selection),
            min_density=self.min_density,
            seed=self.seed,
        )


def _update_then_mask(
    masked: MaskedParameters, average: dict[str, nn.Parameter], update: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    update(*args, **kwargs)
    masked.apply_to(average)


def _refuse_others(trainer: Trainer) -> None:
    if any(type(callback).__name__ == "ModelPruning" for callback in trainer.callbacks):
        raise ValueError(
            "Lightning's ModelPruning and Pruning would both mask the weights. Remove ModelPruning: Pruning does what "
            "it does, and keeps its masks over a resume."
        )


def _refuse_unstepped(pruning: Pruning, trainer: Trainer) -> None:
    stepped = {one for optimizer in trainer.optimizers for group in optimizer.param_groups for one in group["params"]}
    if trainer.optimizers and not stepped & set(pruning.masked.parameters.values()):
        raise ValueError(
            f"None of the weights that '{pruning.name}' prunes belongs to an optimizer, so they will not train. Was "
            f"the module copied after its optimizer was built? Build it in configure_optimizers."
        )
