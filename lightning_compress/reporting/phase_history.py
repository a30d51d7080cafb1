"""Follow the phases of a run: who acts when, and what the model is where one begins or ends."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_compress.core.phases import PhaseWindow
from lightning_compress.reporting import Boundary, Phase, Report


@dataclass
class PhaseHistory:
    """What has happened so far.

    Args:
        phases: by name, in the order in which they began.
        boundaries: what was measured.
    """

    phases: dict[str, Phase] = field(default_factory=dict)
    boundaries: list[Boundary] = field(default_factory=list)

    def crossed(self, step: int, active: Mapping[str, tuple[str, bool]]) -> list[str]:
        """Who has begun or ended since the last call, in words.

        Args:
            step: optimizer steps that are done.
            active: type of each callback that has a phase, and whether it is in it, by name.
        """
        words = []
        for name, (kind, acts) in active.items():
            phase = self.phases.get(name)
            if acts and (phase is None or phase.end is not None):
                self.phases[name] = Phase(name, kind, step if phase is None else phase.begin)
                words.append(f"{name} begins")
            elif not acts and phase is not None and phase.end is None:
                self.phases[name] = Phase(name, kind, phase.begin, step)
                words.append(f"{name} ends")
        return words

    @property
    def lacks_costs(self) -> bool:
        """Whether what the latest boundary costs is not known yet, because nobody has seen the model called."""
        return bool(self.boundaries) and self.boundaries[-1].macs is None

    def add(self, step: int, what: str, report: Report) -> dict[str, float]:
        """Remember what the model is at a boundary; as numbers to be logged, too."""
        self.boundaries.append(Boundary(step, what, report.nonzero, report.size_bytes_smallest))
        sizes = {"nonzero": float(report.nonzero), "size_bytes": float(report.size_bytes_smallest)}
        return sizes | self.add_costs(report)

    def add_costs(self, report: Report) -> dict[str, float]:
        """Remember what the model costs at the latest boundary."""
        latency = None if report.latency_batch_1 is None else report.latency_batch_1.median_ms
        self.boundaries[-1] = replace(self.boundaries[-1], macs=report.macs, latency_ms_batch_1=latency)
        costs = {"macs": report.macs, "latency_ms_batch_1": latency}
        return {key: float(value) for key, value in costs.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        return {
            "phases": [dict(vars(one)) for one in self.phases.values()],
            "boundaries": [dict(vars(one)) for one in self.boundaries],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "PhaseHistory":
        phases = (Phase(**one) for one in state["phases"])
        return cls({one.name: one for one in phases}, [Boundary(**one) for one in state["boundaries"]])


def active_phases(callbacks: Iterable[Any], at: Callable[[str], int]) -> dict[str, tuple[str, bool]]:
    """Who acts now: type and answer by name; none that has no window.

    Args:
        callbacks: with `name` and `window`.
        at: the present time, by unit: "steps", "batches" or "epochs".
    """
    windows: list[tuple[Any, PhaseWindow]] = [(one, one.window) for one in callbacks if one.window is not None]
    return {one.name: (type(one).__name__, window.begin <= at(window.unit) < window.end) for one, window in windows}
