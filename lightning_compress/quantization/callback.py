"""Quantization-aware training while Lightning trains."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_compress._lightning import (
    LightningModule,
    Trainer,
    kept_averages,
    rank_zero_info,
    rank_zero_warn,
    skips_backward,
)
from lightning_compress.core.arguments import as_schedule
from lightning_compress.core.conflicts import ExclusiveClaim, FixedShapes
from lightning_compress.core.patching import wrapped_method
from lightning_compress.core.phases import Duration, PhaseWindow, Run, resolve_window
from lightning_compress.nn.batchnorm import BatchNormFreezer
from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.dataflow import trace_dataflow
from lightning_compress.nn.forward_capture import is_partly_compiled
from lightning_compress.nn.selection import Patterns, Selection, as_patterns
from lightning_compress.nn.weight_averages import find_averages
from lightning_compress.quantization.arguments import (
    check_no_sparse_gradients,
    check_training,
    freeze_times,
    learned_names,
    quantization_claims,
)
from lightning_compress.quantization.bit_schedule import BitWidthSchedule
from lightning_compress.quantization.config import QuantizationConfig
from lightning_compress.quantization.distributed import (
    all_reduce_ranges,
    average_gradients,
    broadcast_learned,
    check_equal_placements,
)
from lightning_compress.quantization.forward_hooks import quantizer_hooks
from lightning_compress.quantization.functional.formats import Bits
from lightning_compress.quantization.layers import Layer, quantizable_layers
from lightning_compress.quantization.learned_parameters import add_damping, attached_to_optimizers, quantize_gradients
from lightning_compress.quantization.lookup import mark_quantization_pending, quantized_of
from lightning_compress.quantization.methods import MethodLike
from lightning_compress.quantization.optimizer_support import check_optimizers_supported
from lightning_compress.quantization.placement.layout import place_activations
from lightning_compress.quantization.placement.sites import ActivationPlacement
from lightning_compress.quantization.placement.unused_frozen_layers import frozen_warning, unused_frozen_layers
from lightning_compress.quantization.quantized_model import QuantizedModel
from lightning_compress.training.callback import CompressionCallback
from lightning_compress.training.clock import describe_run, step_after


class QuantizationAwareTraining(CompressionCallback):
    """From `begin` on, train with weights and activations on the grids that the deployed model will compute with.

    The model keeps its classes and its `state_dict` keys; quantizers act by hooks. In evaluation biases are rounded
    too, as integer kernels add them. In checkpoints, and in the model after `fit`, weights lie on their grids; what a
    resumed run goes on with is in the callback's part of a checkpoint. After `fit` the model, and a copy, a pickled one
    or a part of it, computes as it was trained: `export(model, path, example_input)` writes it,
    `remove_quantizers(model)` takes the hooks off. A checkpoint has the grids of activations in the callback's part
    alone: `load_compressed` reads them, `load_from_checkpoint` does not.

    Args:
        weights, activations: bits (2 to 16), "ternary", "binary", "fp16", "bf16", "fp8", "fp8_e5m2", or None: float.
        weight_grad_bits, activation_grad_bits: bits of the gradients of weights and of activations, for methods that
            quantize it ("dorefa", "wage"); None: float.
        method: how grids are found: "moving_average", "min_max", "percentile", "mse", "lsq", "pact", "dorefa", "twn",
            "ttq", "binary_connect", "bnn", "xnor", "wage", "stochastic", {"weights": ..., "activations": ...}, a dotted
            path or a function; None: what suits the bits.
        granularity: which weights share a scale: "tensor", "channel" or "group 32".
        symmetric: whether the weights' grids are symmetric around zero.
        first, last: bits of the first and last layer; None: 8, or the others' if those have more; "same": the others'.
        overrides: for single layers by pattern, such as {"*.head": {"weights": 4, "activations": 8}}.
        reduce_range: whether weights of 8 bits beside activations of 8 bits take the codes -63 to 63 alone, on which no
            integer kernel of any CPU saturates; False: -127 to 127, which may be slower to run.
        quantize_output: whether a convolution whose output leaves the network gets a grid of 8 bits there. Integer
            kernels of convolutions need one; those of linear layers do not.
        initial_bits: bits at `begin`, which fall to those asked for at `end`; None: all is quantized at `begin`.
        schedule: how they fall, as in `Pruning`.
        damping: strength by which weights are drawn to the middle of their steps, against oscillation at 2 to 4 bits.
        freeze_bn: from when on BatchNorm uses its running statistics in training too; None: never.
        freeze_ranges: from when on no range changes any more; None: never.
        calibrate_only: only watch ranges; the training is left as it is, and the trained model is quantized.
        begin, end, every: first, last and pace of changes: "20%", "3 epochs", "500 steps", an int (optimizer steps) or
            a float (fraction of the run). From `begin` on the model is quantized to the end of the run, past `end` too.
        targets: which weights, as in `Pruning`; None: those of all convolutions, linear and recurrent layers, attention
            projections and embeddings. Frozen ones too, but for layers that have no part in what is trained.
        ignore: what to leave out, written like `targets`.
        seed: of methods that draw; the user's random stream is never touched.
        gate_best: let `ModelCheckpoint(monitor=...)` compare only quantized epochs, and `EarlyStopping` wait for them.
        name: part of the logged keys and of the checkpoint's. A run has one callback that quantizes.

    Raises:
        ValueError: at construction, before training, or in the first quantized step at the latest.

    Reference: Jacob et al., 2018, https://arxiv.org/abs/1712.05877

    >>> qat = QuantizationAwareTraining(weights=4, activations=8, begin="50%", ignore="*.head")
    >>> qat.timeline(Run(epochs=None, max_steps=100))
    [(50, 'quantizes')]
    """

    progress_metric = "bits"
    undone = "Nothing is quantized."

    renamed_arguments = {"errors": "activation_grad_bits", "gradients": "weight_grad_bits"}

    def __init__(
        self,
        *,
        weights: Bits = 8,
        activations: Bits = 8,
        weight_grad_bits: int | None = None,
        activation_grad_bits: int | None = None,
        method: MethodLike = None,
        granularity: str = "channel",
        symmetric: bool = True,
        first: Bits = None,
        last: Bits = None,
        overrides: Mapping[str, Any] | None = None,
        reduce_range: bool = True,
        quantize_output: bool = False,
        initial_bits: int | None = None,
        schedule: str | Callable[[float], float] = "linear",
        damping: float = 0.0,
        freeze_bn: Duration | None = None,
        freeze_ranges: Duration | None = "90%",
        calibrate_only: bool = False,
        begin: Duration = "50%",
        end: Duration = "100%",
        every: Duration = "1%",
        targets: Patterns = None,
        ignore: Patterns = (),
        seed: int = 0,
        gate_best: bool = True,
        name: str = "quantization",
    ) -> None:
        super().__init__(name, begin, end, every)
        self.weights, self.activations = weights, activations
        self.weight_grad_bits, self.activation_grad_bits = weight_grad_bits, activation_grad_bits
        self.method, self.granularity, self.symmetric = method, granularity, symmetric
        self.first, self.last, self.overrides, self.reduce_range = first, last, dict(overrides or {}), reduce_range
        self.quantize_output = quantize_output
        self.config = QuantizationConfig(
            weights, activations, method, granularity, symmetric, first, last, self.overrides, reduce_range,
            weight_grad_bits, activation_grad_bits, quantize_output,
        )  # fmt: skip
        self.initial_bits, self.schedule = initial_bits, as_schedule(schedule)
        self.bit_schedule = None if initial_bits is None else BitWidthSchedule(initial_bits, self.schedule, self.config)
        self.damping, self.freeze_bn, self.freeze_ranges = damping, freeze_bn, freeze_ranges
        self.freezes = {"freeze_bn": freeze_bn, "freeze_ranges": freeze_ranges}
        check_training(
            calibrate_only,
            damping,
            self.freezes,
            weight_grad_bits=weight_grad_bits,
            activation_grad_bits=activation_grad_bits,
            initial_bits=initial_bits,
        )
        self.calibrate_only, self.targets, self.ignore = calibrate_only, targets, ignore
        as_patterns(targets), as_patterns(ignore)
        self.seed, self.gate_best = seed, gate_best
        self.selection: Selection | None = None
        self.layers: list[Layer] = []
        self.quantized: QuantizedModel | None = None
        self.batchnorm_freezer, self._shared = BatchNormFreezer(()), set[str]()
        self._freezes: dict[str, PhaseWindow] = {}
        self._loaded: dict[str, Any] | None = None
        self._installed = False

    @property
    def reached(self) -> bool:
        """Whether the model is quantized to the bits that were asked for."""
        return self._acts is not None and (self.bit_schedule is None or super().reached)

    def timeline(self, run: Run) -> list[tuple[int, str]]:
        window = resolve_window(self.begin, self.end, self.every, run)
        if self.bit_schedule is None:
            return [(window.begin, "calibrates" if self.calibrate_only else "quantizes")]
        return self.bit_schedule.timeline(window)

    # Before training --------------------------------------------------------------------------------------------

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._build_model(pl_module)
        check_no_sparse_gradients(() if self.calibrate_only else self.layers)
        rank_zero_info(f"'{self.name}' quantizes {self.selection}.{frozen_warning(self.layers)}")

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        carried = self.quantized if self.quantized is not None and self.quantized.is_of(pl_module) else None
        self._build_model(pl_module)
        self.quantized, self._shared = None, set()
        if self.saved is not None:
            state = self.saved["model"]
        else:
            state = carried.state_dict() if carried is not None and not self.restored else None
        self._forget_quantizers(pl_module)
        if state is not None and (quantized := self._take(pl_module, state)) and state["trained"]:
            # What was saved after a fit has no place for what is learned in its optimizers' states.
            late = partial(self._train_along, trainer, quantized)
            self.undo.enter_context(wrapped_method(pl_module, "on_fit_start", late))
        self.undo.enter_context(wrapped_method(pl_module, "training_step", partial(self._step, trainer, pl_module)))

    def _train_along(
        self, trainer: Trainer, quantized: QuantizedModel, original: Callable[..., Any], *args: Any
    ) -> Any:
        """After the hooks of all callbacks: Lightning's `BaseFinetuning` makes the groups of optimizers anew in its."""
        result = original(*args)
        self.undo.enter_context(attached_to_optimizers(quantized, trainer))
        return result

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers_supported(trainer.optimizers, self.layers, self.config)
        self._warn_of_averages(trainer, pl_module)
        self._freezes = freeze_times(describe_run(trainer, pl_module), {} if self.calibrate_only else self.freezes)
        self.batchnorm_freezer = BatchNormFreezer.from_model(pl_module)
        self.undo.callback(self.batchnorm_freezer.stand_still, False)
        if self.quantized is not None:
            self.undo.enter_context(attached_to_optimizers(self.quantized, trainer))
            self._install(self.quantized)
        mark_quantization_pending(pl_module)

    def claims(self, trainer: Trainer, pl_module: LightningModule) -> list[ExclusiveClaim]:
        return quantization_claims(self.layers, self.config)

    def fixed_shapes(self) -> FixedShapes:
        return FixedShapes("begin", "its grids are laid out then")

    def on_channels_pruned(self, cut: Cut) -> None:
        if self.quantized is not None:
            raise ValueError(f"Channels were cut after '{self.name}' had laid out its grids. Let the cuts end before.")

    def on_modules_replaced(self, trainer: Trainer, pl_module: LightningModule, names: Sequence[str]) -> None:
        if self.quantized is not None:
            raise ValueError(
                f"{', '.join(names)} would be replaced after '{self.name}' had laid out its grids. Replace modules "
                f"before it begins."
            )

    # At each step -----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.quantized is None or not self.is_open(trainer):
            return
        self._advance(trainer)
        self.quantized.begin_batch(step_after(trainer, "batches"), quantizing=not self.calibrate_only)
        # SWA ends with an epoch without backward passes, in which normalizations gather their statistics anew.
        self.batchnorm_freezer.stand_still(self._is_past(trainer, "freeze_bn") and not skips_backward(trainer))
        if self._is_past(trainer, "freeze_ranges") and not self.quantized.uncalibrated():
            self.quantized.freeze_observers()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A scaler of gradients looks for what is not finite before the optimizer's hook, and must find it on all ranks.
        if self._acts is not None and getattr(trainer.precision_plugin, "scaler", None) is not None:
            average_gradients(self._acts.learned().values())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._acts is None:
            return
        broadcast_learned(self._acts, self._shared)
        average_gradients(self._acts.learned().values())
        quantize_gradients(self._acts, optimizer)
        if self.damping:
            add_damping(self._acts, self.damping, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._acts is None:
            return
        self._acts.end_batch()
        if not self._acts.state.observers_frozen:
            all_reduce_ranges(self._acts)
        if self.reached and not self.released:
            self._acts.check_ranges(early=True)
        self.release_monitors(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._acts is None:
            return
        self._acts.check_ranges()
        self.log_metrics(trainer, self._acts.metrics())

    def has_begun(self, trainer: Trainer) -> bool:
        return self._acts is not None

    @property
    def _acts(self) -> QuantizedModel | None:
        """The quantizers, once the phase has begun."""
        return self.quantized if self.quantized is not None and self.quantized.state.enabled else None

    # Outside of a fit -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._loaded = None
        if stage != "fit":
            self.undo.close()
        else:
            # Also of checkpoints with weights alone, which callbacks do not hear of; averages are in their places then.
            self.undo.enter_context(wrapped_method(pl_module, "on_save_checkpoint", self._save_on_grids))
        self.undo.enter_context(wrapped_method(pl_module, "on_load_checkpoint", self._look_in))

    def _look_in(self, original: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        self._loaded = checkpoint.get("callbacks", {}).get(self.state_key, {"model": None})
        checkpoint["state_dict"].update(self._loaded.get("latents", {}))
        return original(checkpoint)

    def _save_on_grids(self, original: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        result = original(checkpoint)
        if self._acts is not None:
            weights = checkpoint["state_dict"]
            keys = {key: name for key, name in self._acts.state_dict_keys().items() if key in weights}
            latents = {key: weights[key] for key in keys}
            weights.update({key: self._acts.on_grid(name, weights[key]) for key, name in keys.items()})
            if (entry := checkpoint.get("callbacks", {}).get(self.state_key)) is not None:
                entry["latents"] = latents
        return result

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the model compute as the checkpoint that was loaded says."""
        if trainer.state.fn == "fit" or (self._loaded is None and quantized_of(pl_module) is not None):
            return
        state = None if self._loaded is None else self._loaded["model"]
        self._build_model(pl_module)
        self._forget_quantizers(pl_module)
        if state is None or not state["active"]:
            rank_zero_warn(f"'{self.name}' knows no grids for this model, so it is evaluated in floating point.")
            return
        with torch.inference_mode(False):  # what is made for an evaluation is also exported, or trained on, after it
            quantized = self._take(pl_module, state)
            self._install(quantized)
            quantized.convert()

    on_test_start = on_predict_start = on_validation_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._acts is not None and self._installed:
            self._installed = False  # what acts now stays: the model in hand is the one that was trained
            self._acts.convert()
            if stage == "fit" and self._acts.activations:
                rank_zero_info(
                    f"'{self.name}': the model computes as it was quantized until remove_quantizers(model) is called. "
                    f"Weights in checkpoints lie on their grids; those of activations come with load_compressed, and "
                    f"do not with load_from_checkpoint."
                )
        super().teardown(trainer, pl_module, stage)

    def _install(self, quantized: QuantizedModel) -> None:
        quantized.install()
        self._installed = True
        self.undo.callback(self._uninstall, quantized)

    def _uninstall(self, quantized: QuantizedModel) -> None:
        if self._installed:
            quantized.remove()
        self._installed = False

    def _forget_quantizers(self, pl_module: LightningModule) -> None:
        """Take off what an earlier run or `quantize` has put into our layers; weights go on from what they were."""
        ours = {layer.module for layer in self.layers}
        for owner in {hook.owner for _, module, hook in quantizer_hooks(pl_module) if module in ours}:
            owner.restore_latents(self._loaded is None)
            owner.remove(pl_module)

    # What is kept -----------------------------------------------------------------------------------------------

    def checkpoint_state(self) -> dict[str, Any]:
        if self.quantized is None:
            return {"model": None}
        keys, latents = self.quantized.state_dict_keys(), self.quantized.latents
        # While it trains, what is saved is put on grids, and this filled, when averages are in their places.
        after = {key: latents[name] for key, name in keys.items() if name in latents}
        return {"model": self.quantized.state_dict(), "latents": after}

    def _build_model(self, pl_module: LightningModule) -> None:
        self.selection, self.layers = quantizable_layers(pl_module, self.targets, self.ignore)
        self.config.plan_layers(self.layers)

    def _leave_out(self, names: Iterable[str]) -> None:
        self.layers = [layer for layer in self.layers if layer.name not in names]
        if names:
            rank_zero_info(
                f"'{self.name}' leaves {', '.join(names)} in floating point: they are frozen, and neither take what is "
                f"trained nor give to it."
            )

    def _take(self, pl_module: LightningModule, state: Mapping[str, Any]) -> QuantizedModel:
        self._leave_out(state.get("apart", ()))
        self.quantized = QuantizedModel(
            pl_module, self.layers, self.config, ActivationPlacement.from_state_dict(state["layout"]), self.seed
        )
        self.quantized.load_state_dict(state)
        return self.quantized

    def _step(
        self, trainer: Trainer, pl_module: LightningModule, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The user's step; the first one of the phase is watched, and the next one is quantized."""
        # Hooks that come after the first call of a compiled module never act.
        due = self.is_open(trainer) or (self.window is not None and is_partly_compiled(pl_module))
        if self.quantized is not None or not due:
            return original(*args, **kwargs)
        self._build_model(pl_module)  # channels may have been cut since
        with trace_dataflow(pl_module) as flow:
            result = original(*args, **kwargs)
        if not any(layer.name in flow.inputs for layer in self.layers):
            return result  # the user has skipped this step: the next one is watched
        left_out = unused_frozen_layers(flow, pl_module, self.layers)
        self._leave_out(left_out)
        layout = place_activations(flow, pl_module, self.layers, self.config)
        check_equal_placements(layout, pl_module.device)
        self.quantized = QuantizedModel(pl_module, self.layers, self.config, layout, self.seed)
        self.quantized.unused = left_out
        self._advance(trainer)
        self.undo.enter_context(attached_to_optimizers(self.quantized, trainer))
        self._install(self.quantized)
        return result

    def _advance(self, trainer: Trainer) -> None:
        """Let the bits fall, if that is due."""
        time = self.due_time(trainer)
        if time is not None and self.quantized is not None:
            if self.bit_schedule is not None:
                self.bit_schedule.apply(self.quantized, time, self._window)
            self.mark_done(time)

    def _warn_of_averages(self, trainer: Trainer, pl_module: LightningModule) -> None:
        learned = learned_names(self.layers, self.config)
        if learned and any(find_averages(pl_module, kept_averages(trainer))):
            rank_zero_warn(
                f"'{self.name}' learns a {' and a '.join(learned)} beside the weights, of which no average is kept: "
                f"averages of the weights are quantized with those of the last update. For exact averages take a "
                f"method that learns nothing beside the weights, such as 'mse'."
            )

    def _is_past(self, trainer: Trainer, freeze: str) -> bool:
        window = self._freezes.get(freeze)
        return window is not None and step_after(trainer, window.unit) > window.end
