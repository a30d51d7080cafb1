"""Exporting a module with torch.export: its example inputs, and errors that name the layer and the line."""

import linecache
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from lightning_compress.nn.example_inputs import check_example

Call = tuple[tuple[Any, ...], dict[str, Any]]
TORCH, NOT_THE_USERS = Path(torch.__file__).parent, (Path(__file__).parent, Path(traceback.__file__).parent)
# What a node knows of the machine it was made on: paths of files, and the graphs that it was in before.
ORIGINS = ("stack_trace", "from_node", "custom")


def as_arguments(example_input: Any) -> Call:
    """Arguments and keywords of a call: of a tuple, a dict, or else one argument.

    Raises:
        ValueError: if there is no tensor in them.
    """
    check_example(example_input)
    if isinstance(example_input, dict):
        return (), example_input
    return (example_input, {}) if isinstance(example_input, tuple) else ((example_input,), {})


def resize_rows(call: Call, rows: int | None) -> Call:
    """The call with copies of its tensors, of another number of rows in the batch if it is given."""
    size = arguments_batch_size(call)

    def chosen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if rows is None or not _has_batch(leaf, size):
            return leaf.detach().clone()
        return leaf.detach()[torch.arange(rows, device=leaf.device) % max(size, 1)].clone()

    return pytree.tree_map(chosen, call)  # type: ignore[no-any-return]


def arguments_batch_size(call: Call) -> int:
    """The first size of the first tensor that has one; 0 if there is none."""
    leaves = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim]
    return leaves[0].shape[0] if leaves else 0


def export_program(module: nn.Module, call: Call, dynamic_batch: bool) -> ExportedProgram:
    """The program of a module in eval mode.

    Args:
        module: where an error comes from, its layer is named.
        call: of two rows or more, if the batch is dynamic: torch.export takes a size of 1 for a constant.
        dynamic_batch: whether the first size of all tensors that share it is left open.

    Raises:
        ValueError: if the module does what no program can.
    """
    args, kwargs = call = resize_rows(call, None)  # torch.export marks the tensors that it is given
    try:
        shapes = _open_batch(module, call) if dynamic_batch else None
        with warnings.catch_warnings():
            # Recurrent layers assign their weights anew; whether it matters is seen when the file is run.
            warnings.filterwarnings("ignore", message="The tensor attributes? .* assigned during export")
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise ValueError(_reason(error, module, call, dynamic_batch)) from error


def strip_origins(program: ExportedProgram) -> ExportedProgram:
    """The program without its example inputs, and without paths of the machine on which it was made."""
    program.example_inputs = None
    for graph_module in program.graph_module.modules():
        for node in graph_module.graph.nodes if isinstance(graph_module, torch.fx.GraphModule) else ():
            for origin in ORIGINS:
                node.meta.pop(origin, None)
    return program


@contextmanager
def in_deployed_mode() -> Iterator[None]:
    """No gradients, the same random numbers each time, and attention step by step, as programs compute it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def run_program(called: Callable[..., Any], call: Call) -> list[Any]:
    """All that a call returns, in one list."""
    args, kwargs = resize_rows(call, None)  # a model may write into what it is given
    with in_deployed_mode():
        return pytree.tree_leaves(called(*args, **kwargs))


def _has_batch(leaf: Tensor, size: int) -> bool:
    return leaf.ndim > 0 and leaf.shape[0] == size


def _open_batch(module: nn.Module, call: Call) -> dict[str, Any]:
    size, shapes = arguments_batch_size(call), ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in pytree.tree_leaves(call):
        if isinstance(leaf, Tensor) and _has_batch(leaf, size):
            shapes[leaf] = {0: Dim.DYNAMIC}
    return shapes.dynamic_shapes(module, *call)  # type: ignore[no-any-return, no-untyped-call]


def _reason(error: Exception, module: nn.Module, call: Call, dynamic_batch: bool) -> str:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"{type(module).__name__} cannot be exported: {_where(error, module)}{type(error).__name__}: "
        f"{' '.join(said[:2])[:500]} {_mend(error, module, call, dynamic_batch)}"
    )


def _where(error: Exception, module: nn.Module) -> str:
    """The layer, and the line of the user's code, that an error came from."""
    names = {id(one): name for name, one in module.named_modules()}
    found: dict[str, str] = {}
    for frame, number in traceback.walk_tb(error.__traceback__):
        path, name = Path(frame.f_code.co_filename), names.get(id(frame.f_locals.get("self")))
        if name is not None:
            found["layer"] = f"in '{name}'"
        if found and path.is_file() and not (TORCH in path.parents or path.parent in NOT_THE_USERS):
            found["line"] = f"{path.name} line {number}, `{linecache.getline(str(path), number).strip()[:120]}`"
    return ", ".join(found.values()) + (": " if found else "")


def _mend(error: Exception, module: nn.Module, call: Call, dynamic_batch: bool) -> str:
    if "data-dependent" in str(error):
        return "What is computed must not depend on values: use torch.where or torch.cond in place of `if`."
    if dynamic_batch:
        try:
            torch.export.export(module, *resize_rows(call, None))
        except Exception:
            return "Use operators that torch.export knows."
        return "With a fixed batch it can be: give dynamic_batch=False, or write it for any number of rows."
    return "Use operators that torch.export knows."
