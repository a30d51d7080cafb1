"""The command line and the JSON file of every benchmark, with the machine that the figures were measured on."""

import argparse
import json
import logging
import os
import platform
import re
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[1] / "results"


def arguments(name: str, description: str | None, **extra: Any) -> argparse.Namespace:
    """Parse `--quick`, `--output` and `extra`: option name to keywords of `add_argument`."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works; proves nothing")
    parser.add_argument("--output", type=Path, help=f"JSON file to write (default: benchmarks/results/{name}.json)")
    for option, keywords in extra.items():
        parser.add_argument(f"--{option}", **keywords)
    read = parser.parse_args()
    if read.output is None:
        # A quick look must not take the place of figures that mean something.
        read.output = (Path(tempfile.mkdtemp()) if read.quick else FOLDER) / f"{name}.json"
    return read


def be_quiet() -> None:
    """Silence warnings and logs: a benchmark builds many Trainers that would repeat the same messages."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def environment() -> dict[str, Any]:
    """Versions, the instruction sets of the CPU, and its load: other work makes times longer and their spread wider."""
    names = ("torch", "pytorch-lightning", "lightning-compress")
    return {
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "instructions": sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True),
        "threads": torch.get_num_threads(),
        "load_average_1_minute": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def processor() -> str:
    """Name, family and model of the CPU on Linux: instruction sets alone do not tell the width of its units."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    found = dict(re.findall(r"^(.+?)\s*: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    return ", ".join(f"{name} {found[name]}" for name in ("model name", "cpu family", "model") if name in found)


def write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
