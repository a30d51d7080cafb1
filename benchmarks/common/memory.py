"""Peak memory: the resident set of the process, as Linux reports it, and tensors alone, from torch's allocator."""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def resident_bytes(field: str) -> int:
    """`VmRSS`, the resident set, or `VmHWM`, its high-water mark."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only.")


def reset_peak() -> None:
    """Reset the high-water mark of the resident set."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_tensor_bytes(action: Callable[[], object]) -> int:
    """Largest number of bytes that tensors on the CPU took at once, above the start, from torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
