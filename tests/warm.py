"""Run a script in a process of its own that has imported what takes seconds to import: torch, both Lightnings and us.

A server that has done nothing else forks it, so that it is as a fresh process in all but that, and has one thread. What
is to be seen of imports themselves needs `subprocess`.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
# Not wandb: it makes a folder when it is imported, which the first process to end would remove for all.
FORKS.set_forkserver_preload(["lightning_compress", "lightning_compress.recipes.mnist"])


@dataclass(frozen=True)
class Done:
    """How a script has ended, named as `subprocess` does."""

    returncode: int
    stdout: str
    stderr: str


class Started:
    """A script that runs: a path, or a module's name behind "-m".

    Args:
        script: and what it is called with.
        cwd: folder that it runs in.
        environment: what it finds there beside what is there now.
    """

    def __init__(self, script, *arguments, cwd=ROOT, **environment):
        self.folder = tempfile.TemporaryDirectory()
        self.said = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        command = [str(one) for one in (script, *arguments)]
        everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        everything.pop("LIGHTNING_COMPRESS_RECIPE", None)
        self.process = FORKS.Process(target=_run, args=(command, str(cwd), everything, self.said))
        self.process.start()

    def done(self, timeout=600):
        """Wait for its end."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        texts = [path.read_text(errors="replace") if path.exists() else "" for path in self.said]
        self.folder.cleanup()
        return Done(self.process.exitcode, *texts)


def run(script, *arguments, cwd=ROOT, **environment):
    """Run a script to its end."""
    return Started(script, *arguments, cwd=cwd, **environment).done()


def free_port():
    """A port on which nobody listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(command, cwd, environment, said):
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)  # the variable is read when torch is imported, and that was before
    by_name = command[0] == "-m"
    sys.argv = command[by_name:]
    try:
        if by_name:
            sys.path.insert(0, cwd)
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(sys.argv[0]).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # forked processes end without them
