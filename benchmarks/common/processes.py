"""Run parts of a benchmark in fresh processes, with malloc settings that suit what is measured.

A script with parts takes `--part`, the arguments of `Parts.alone` as JSON, and prints the result as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Processes that are timed keep what they free, and all threads share one heap: glibc's own way gives each thread a
# heap, which it cuts back and faults in again, and makes one and the same step differ by 5 % from thread to thread.
KEEP = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
# Where memory is measured, what is freed is given back at once, or the mark would tell what malloc keeps in store.
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
AS_IT_IS: dict[str, str] = {}


@dataclass(frozen=True)
class Parts:
    """Functions of a script by name, each of which can run in this process or in a fresh one."""

    script: str
    functions: dict[str, Callable[..., Any]]

    def here(self, what: str, threads: int, **options: Any) -> Any:
        """Call a function in this process and return its result."""
        torch.set_num_threads(threads)
        return self.functions[what](**options)

    def alone(self, malloc: dict[str, str], **options: Any) -> Any:
        """Call a function in a fresh process and return its result.

        Raises:
            RuntimeError: if it fails.
        """
        command = [sys.executable, self.script, "--part", json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **malloc})
        if done.returncode:
            raise RuntimeError(f"This part failed: {options}\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def run(self, malloc: dict[str, str], quick: bool, **options: Any) -> Any:
        """Call a function: in this process for a quick look, otherwise in a fresh one."""
        return self.here(**options) if quick else self.alone(malloc, **options)
