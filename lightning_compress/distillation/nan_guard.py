"""Teachers that say NaN: noticed before the weights change, without waiting for the GPU at each step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.nn.forward_capture import tensors_in


@dataclass
class _Watched:
    finite: Tensor
    ready: Any
    taught: Sequence[Mapping[str, Any]]
    batch: int


class NanGuard:
    """Watches the distillation loss, and asks the teachers if it is not finite.

    On a GPU the answer is fetched while the backward pass runs, and looked at before the optimizer's step.
    """

    def __init__(self) -> None:
        self._watched: list[_Watched] = []

    def record(self, loss: Tensor, taught: Sequence[Mapping[str, Any]], batch: int) -> None:
        """Remember to look at this loss, and at what the teachers said.

        Raises:
            ValueError: on the CPU at once, if a teacher said NaN or infinity.
        """
        if loss.device.type != "cuda":
            _look(math.isfinite(loss.item()), taught, batch)
            return
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(loss.detach().isfinite(), non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        self._watched.append(_Watched(host, ready, taught, batch))

    def check(self) -> None:
        """Look at what was watched since the last time.

        Raises:
            ValueError: if a teacher said NaN or infinity.
        """
        watched, self._watched = self._watched, []
        for one in watched:
            one.ready.synchronize()
            _look(bool(one.finite), one.taught, one.batch)


def _look(finite: bool, taught: Sequence[Mapping[str, Any]], batch: int) -> None:
    if finite:
        return  # NaN of the student's is the user's own affair: a gradient scaler may be at work
    for place, outputs in enumerate(taught):
        for name, value in outputs.items():
            if any(not one.isfinite().all() for one in tensors_in(value) if one.is_floating_point()):
                which = "The teacher" if len(taught) == 1 else f"Teacher {place}"
                raise ValueError(
                    f"{which} gave NaN or infinity in '{name}' at batch {batch}; the student's weights have not "
                    f"changed. Look at the teacher on this batch; if half precision is too narrow for it, give it its "
                    f"own: teacher_precision='32'."
                )
