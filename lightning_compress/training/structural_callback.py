"""What callbacks that change the structure of the module share: a plan in the checkpoint, and the way back to it."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_compress._lightning import LightningModule, Trainer, kept_averages, rewrap_ddp
from lightning_compress.core.conflicts import ExclusiveClaim
from lightning_compress.core.distributed import all_ranks_equal, broadcast_, is_distributed, tensor_hash
from lightning_compress.core.patching import wrapped_method
from lightning_compress.core.phases import Duration
from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.module_replacement import (
    Initialize,
    Replaced,
    find_module,
    refuse_irreplaceable,
    replace_in_training,
    skeleton,
)
from lightning_compress.nn.optimizer_replacement import CarryState
from lightning_compress.nn.replacement import Replacement
from lightning_compress.nn.selection import canonical_name
from lightning_compress.nn.structure import STRUCTURE, Structure, rebuild
from lightning_compress.nn.weight_averages import averaged_copies
from lightning_compress.training.callback import CompressionCallback, compression_callbacks


@dataclass(frozen=True)
class ModuleChange:
    """A replacement that is to be made now, with what `replace_in_training` takes.

    >>> from lightning_compress.nn.replacement import builder_path, torch_layer
    >>> identity = Replacement("net.block", builder_path(torch_layer), {"kind": "Identity"})
    >>> ModuleChange(identity).replacement.name
    'net.block'
    """

    replacement: Replacement
    initialize: Initialize | None = None
    carry_state: CarryState | None = None
    example_inputs: tuple[Any, ...] | None = None


class StructuralCallback(CompressionCallback):
    """A callback that replaces modules, or cuts channels, while training goes on.

    The plan of what was changed is in its part of a checkpoint. Before weights of a checkpoint are loaded, in every
    stage of a Trainer that has the callback, the module gets the checkpoint's structure. `load_compressed` and
    `start_from` do the same without the callback.

    A subclass says in `replaced_modules` which modules it will replace, does so in `change_structure` by
    `replace_modules`, and adds `super().checkpoint_state()` to what it saves.

    Args:
        name, begin, end, every: as for `CompressionCallback`.

    >>> from lightning_compress.nn.replacement import builder_path, torch_layer
    >>> class DropBlock(StructuralCallback):
    ...     def replaced_modules(self, pl_module):
    ...         return ["net.block"]
    ...     def change_structure(self, trainer, pl_module, time):
    ...         identity = Replacement("net.block", builder_path(torch_layer), {"kind": "Identity"})
    ...         self.replace_modules(trainer, pl_module, [ModuleChange(identity)])
    >>> DropBlock("drop_block", begin="50%", end="60%").state_key
    'lightning_compress/drop_block'
    """

    state_kind = STRUCTURE
    undone: str | None = "No module was replaced."
    cuts_channels = False  # whether it cuts channels; then it cannot start from a checkpoint whose channels were cut
    # What cannot be done to a weight while its module may still be replaced, in the words of others' claims.
    excludes: frozenset[str] = frozenset({"prune", "quantize", "cut channels of", "be about"})

    def __init__(
        self, name: str, begin: Duration = "0%", end: Duration = "100%", every: Duration | None = "1 steps"
    ) -> None:
        super().__init__(name, begin, end, every)
        self.cut = Cut()
        self.replaced: list[Replaced] = []
        self.due: int | None = None
        self._restructured: Callable[[], nn.Module | None] = lambda: None

    # What a subclass fills in ---------------------------------------------------------------------------------------

    def replaced_modules(self, pl_module: LightningModule) -> Sequence[str]:
        """Names of the modules that this callback replaces, so that what cannot be is refused before training."""
        return ()

    def change_structure(self, trainer: Trainer, pl_module: LightningModule, time: int) -> None:
        """Change what is due at `time` of the phase: the optimizer's step is taken, and its batch ends."""

    # Before training ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.due = None
        if self._restructured() is not pl_module:
            self.cut, self.replaced = Cut(), []
            self._restructured = ref(pl_module)
        # Weights of another shape than the module's can only be loaded when the module has theirs, in every stage.
        rebuilding = partial(self._rebuild, trainer, pl_module)
        self.undo.enter_context(wrapped_method(pl_module, "on_load_checkpoint", rebuilding))

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse modules that cannot be replaced, or that other callbacks count on.

        Raises:
            ValueError: with the name of the module.
        """
        for name in self.replaced_modules(pl_module):
            refuse_irreplaceable(name, find_module(pl_module, name))
            for other in compression_callbacks(trainer):
                for needed in () if other is self else other.protected_modules(pl_module):
                    if f"{needed}.".startswith(f"{name}.") or f"{name}.".startswith(f"{needed}."):
                        raise ValueError(
                            f"'{self.name}' would replace '{name}', but '{other.name}' counts on '{needed}' as it is. "
                            f"Leave it out of one of them."
                        )

    def changes_shapes(self) -> bool:
        return True

    def claims(self, trainer: Trainer, pl_module: LightningModule) -> list[ExclusiveClaim]:
        names = {f"{name}." for name in self.replaced_modules(pl_module)}
        inside = (canonical_name(name) for name, _ in pl_module.named_parameters(remove_duplicate=False))
        weights = frozenset(name for name in inside if any(name.startswith(start) for start in names))
        hint = f"Let '{self.name}' end before the other one begins, or leave the module out of one of them."
        return [ExclusiveClaim("replace the modules of", weights, hint, permanent=False, conflicts_with=self.excludes)]

    # In training ----------------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.has_phase and not self.reached:
            time = self.due_time(trainer)
            self.due = self.due if time is None else time

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.due is not None:
            time, self.due = self.due, None
            self.change_structure(trainer, pl_module, time)
            self.mark_done(time)
            self.release_monitors(trainer)

    def replace_modules(
        self, trainer: Trainer, pl_module: LightningModule, changes: Iterable[ModuleChange], seed: int = 0
    ) -> None:
        """Replace modules of the module that trains, all of them or, if one cannot be replaced, none.

        Optimizers, averages of the weights, DistributedDataParallel and the other callbacks follow. Call it in
        `change_structure`, on all ranks with the same changes.

        Args:
            changes: in the order in which they are made.
            seed: of values that builders draw at random.

        Raises:
            ValueError: if ranks would replace other modules, or as `replace_in_training`. Nothing is changed then.
        """
        changes = list(changes)
        _refuse_different([change.replacement for change in changes], pl_module.device)
        count = sum(len(one.replaced) for one in structural_callbacks(trainer))
        made = []
        with ExitStack() as undo:
            for order, change in enumerate(changes, count):
                replacement = replace(change.replacement, order=order)
                original = skeleton(find_module(pl_module, replacement.name))
                takes_back = replace_in_training(
                    pl_module,
                    replacement,
                    change.initialize,
                    optimizers=trainer.optimizers,
                    copies=list(averaged_copies(pl_module, kept_averages(trainer))),
                    carry_state=change.carry_state,
                    example_inputs=change.example_inputs,
                    seed=seed,
                    agree=_take_values_of_first_rank,
                )
                undo.callback(takes_back)
                made.append(Replaced(replacement, original))
            names = [change.replacement.name for change in changes]
            for other in compression_callbacks(trainer):
                if other is not self:
                    other.on_modules_replaced(trainer, pl_module, names)
            undo.pop_all()
        self.replaced += made
        for one in structural_callbacks(trainer):
            for name in names:
                one.cut = one.cut.without(name)
        rewrap_ddp(trainer)

    # What is kept ---------------------------------------------------------------------------------------------------

    @property
    def structure(self) -> Structure:
        """What this callback has changed in the module."""
        return Structure(tuple(one.replacement for one in self.replaced), self.cut)

    def checkpoint_state(self) -> dict[str, Any]:
        return self.structure.state_dict()

    def _saved_structure(self, checkpoint: dict[str, Any]) -> Structure:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:
            return Structure()
        self.refuse_damaged(state)
        return Structure.from_state_dict(state)

    def _rebuild(
        self, trainer: Trainer, pl_module: LightningModule, original: Callable[..., Any], checkpoint: dict[str, Any]
    ) -> Any:
        """Give the module the structure of the checkpoint before its weights are loaded."""
        callbacks = structural_callbacks(trainer)
        if callbacks[0] is self:  # one acts for all: what they replaced is replaced again in its order
            _rebuild_all(callbacks, trainer, pl_module, checkpoint)
        return original(checkpoint)


def structural_callbacks(trainer: Trainer) -> list[StructuralCallback]:
    """The callbacks of a Trainer that change the structure of its module, in their order.

    >>> from types import SimpleNamespace
    >>> tick, change = CompressionCallback("tick"), StructuralCallback("change")
    >>> [one.name for one in structural_callbacks(SimpleNamespace(callbacks=[tick, change]))]
    ['change']
    """
    return [one for one in trainer.callbacks if isinstance(one, StructuralCallback)]


def _rebuild_all(
    callbacks: Sequence[StructuralCallback], trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
) -> None:
    saved = [one._saved_structure(checkpoint) for one in callbacks]
    combined = Structure.combined(saved)
    now = Structure.combined([one.structure for one in callbacks]).cut
    replaced = sorted((made for one in callbacks for made in one.replaced), key=lambda made: made.replacement.order)
    found: list[Replaced] = []
    for model, prefix in [(pl_module, ""), *averaged_copies(pl_module, kept_averages(trainer))]:
        inside = [one for one in (made.restricted_to(prefix) for made in replaced) if one is not None]
        weights, wanted = checkpoint["state_dict"], combined.restricted_to(prefix)
        rebuilt = rebuild(model, weights, wanted, "The checkpoint", now.restricted_to(prefix), inside)
        found = rebuilt if model is pl_module else found
    for callback, structure in zip(callbacks, saved, strict=True):
        callback.cut = structure.cut
        callback.replaced = [one for one in found if one.replacement in structure.replacements]


def _refuse_different(replacements: Sequence[Replacement], device: torch.device) -> None:
    """Refuse ranks that would replace other modules.

    Raises:
        ValueError: on every rank.
    """
    if not is_distributed():
        return
    written = repr([one.state_dict() for one in replacements]).encode()
    if not all_ranks_equal(tensor_hash([torch.tensor(list(written), dtype=torch.uint8)]), device):
        raise ValueError(
            f"The ranks would replace modules differently: here {', '.join(map(str, replacements))}. Choose them from "
            f"what is the same on all ranks, such as the weights."
        )


def _take_values_of_first_rank(module: nn.Module) -> None:
    if is_distributed():
        broadcast_(one.data for one in (*module.parameters(), *module.buffers()))
