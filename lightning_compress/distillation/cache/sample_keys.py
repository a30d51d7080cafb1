"""What makes two samples, or two teachers, the same: 64-bit keys of contents, and SHA-256 of weights and code."""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_WORDS = 1 << 20  # words hashed at once: what is needed beside the inputs is twice their 8 MB
# Odd 64-bit constants of SplitMix64, as torch's signed integers.
STEP, FIRST, SECOND = (
    odd - (1 << 64) for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # fmt: skip
PLAIN = (type(None), bool, int, float, complex, str, bytes)


def sample_keys(inputs: object) -> Tensor:
    """Hash what each sample of a batch consists of, so that it can be found again wherever it turns up.

    Args:
        inputs: a tensor, or tuples, lists and dicts of them, nested at will, all of the same first dimension. Whatever
            else is in there does not count. Padding does: pad to a fixed length, not to the longest of a batch.

    Returns:
        int64 `(batch,)`, on the device of the first tensor: the same on every device and in every batch. Samples that
        differ within one aligned word of 64 bits never share a key, others by chance of about 2 ** -64.

    Raises:
        ValueError: if there is no tensor, one is not dense or without a batch dimension, or the batch sizes differ.

    Reference: Steele et al., 2014, https://doi.org/10.1145/2660193.2660195 (SplitMix64, for weights and final mix)

    >>> one, other = sample_keys(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    >>> bool(one == other), bool(one == sample_keys(torch.tensor([[1.0, 2.0]])))
    (False, True)
    """
    tensors = list(_tensors(inputs))
    _check(tensors)
    first = tensors[0][1]
    keys, position = torch.zeros(len(first), dtype=torch.int64, device=first.device), 0
    for name, tensor in tensors:
        words = _words(tensor)
        until = position + words.shape[1]
        keys += (
            _weighted_sum(words, _weights(until, tensor.device)[position:])
            + _salt(name, tensor.dtype, tensor.shape[1:])
        ).to(keys.device)
        position = until
    return _mix(keys)


def teacher_fingerprint(teacher: nn.Module | Callable[..., object]) -> str:
    """SHA-256 of a module or a plain function, in hexadecimal; the device does not matter.

    Of a module: the classes of it and of its parts, and the names, types, shapes and bytes in its `state_dict`. Of a
    function: its name and code, and the modules, tensors and plain values that it closes over or reads from its file.
    Functions that it calls are seen by name only, and another Python version compiles other code.

    Raises:
        ValueError: if the callable has no code to be seen, as a `functools.partial`.
    """
    digest = hashlib.sha256()
    if isinstance(teacher, nn.Module):
        classes = [(name, type(part).__qualname__) for name, part in teacher.named_modules()]
        digest.update(repr(classes).encode())
        _add_values(digest, teacher.state_dict())
    elif hasattr(teacher, "__code__"):
        digest.update(repr((teacher.__qualname__, _code(teacher.__code__))).encode())
        _add_values(digest, _seen_by(teacher))
    else:
        raise ValueError(f"A teacher is a module or a plain function, but is {teacher!r}. Write a function around it.")
    return digest.hexdigest()


def _tensors(inputs: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors and where they lie; the order in which a dict was filled does not matter."""
    if isinstance(inputs, Tensor):
        yield name, inputs
    elif isinstance(inputs, Mapping):
        for key in sorted(inputs, key=str):
            yield from _tensors(inputs[key], f"{name}/{key}")
    elif isinstance(inputs, tuple | list):
        for index, value in enumerate(inputs):
            yield from _tensors(value, f"{name}/{index}")


def _check(tensors: list[tuple[str, Tensor]]) -> None:
    if not tensors:
        raise ValueError(
            "Inputs have no tensor that a sample could be known by. Give tensors, or tuples or dicts of them."
        )
    for name, tensor in tensors:
        if tensor.layout != torch.strided or tensor.ndim == 0:
            raise ValueError(
                f"Inputs are dense tensors whose first dimension is the batch, but {name or 'the tensor'!r} has shape "
                f"{tuple(tensor.shape)} and layout {tensor.layout}. Leave it out, or give it one row per sample."
            )
    sizes = {name: len(tensor) for name, tensor in tensors}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"Inputs share their first dimension, the batch, but theirs are {sizes}. Give one row per sample."
        )


def _words(tensor: Tensor) -> Tensor:
    """The bytes of each row, as int64 `(batch, words)`; zeros fill the last word."""
    batch, row_bytes = len(tensor), math.prod(tensor.shape[1:]) * tensor.element_size()
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    if row_bytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0:
        return flat.view(torch.int64).view(batch, row_bytes // 8)
    filled = torch.zeros(batch, -(-row_bytes // 8) * 8, dtype=torch.uint8, device=flat.device)
    filled[:, :row_bytes] = flat.view(torch.uint8).view(batch, row_bytes)
    return filled.view(torch.int64)


def _weighted_sum(words: Tensor, weights: Tensor) -> Tensor:
    """Wrap-around sum over each row of a one-to-one function of every word, another one at each position.

    A product alone would not do: flipped signs are multiples of 2 ** 63, which cancel in pairs whatever the weights.
    So the high bits of the product come down, and are multiplied once more.
    """
    sums = []
    for part in torch.split(words, max(1, CHUNK_WORDS // max(1, words.shape[1]))):
        product = part * weights
        product ^= _shifted(product, 47)
        product *= weights
        sums.append(product.sum(1))
    return torch.cat(sums)


def _weights(count: int, device: torch.device) -> Tensor:
    """The first `count` of a fixed row of odd numbers; lengths of many sizes share a few cached tensors."""
    return _cached_weights(max(1, 1 << (count - 1).bit_length()), device)[:count]


@lru_cache(maxsize=8)
def _cached_weights(count: int, device: torch.device) -> Tensor:
    return (_mix(torch.arange(1, count + 1, device="cpu") * STEP) | 1).to(device)


def _mix(numbers: Tensor) -> Tensor:
    """The finalizer of SplitMix64: one-to-one, and each bit of the outcome depends on all bits."""
    numbers = (numbers ^ _shifted(numbers, 30)) * FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift right with zeros coming in, where torch would bring in the sign."""
    return (numbers >> bits).bitwise_and_((1 << (64 - bits)) - 1)


@lru_cache(maxsize=64)
def _salt(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    described = repr((name, str(dtype), tuple(shape)))
    return int.from_bytes(hashlib.sha256(described.encode()).digest()[:8], "little", signed=True)


def _add_values(digest: Any, values: Mapping[str, object]) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor):
            digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, nn.Module):
            digest.update(repr((name, teacher_fingerprint(value))).encode())
        else:
            digest.update(repr((name, value if isinstance(value, PLAIN) else type(value).__qualname__)).encode())


def _code(code: CodeType) -> tuple[object, ...]:
    """What a code object does, without the addresses and line numbers in its own repr."""
    constants = [_code(one) if isinstance(one, CodeType) else _constant(one) for one in code.co_consts]
    return code.co_code.hex(), code.co_names, constants


def _constant(value: object) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)  # sets have no fixed order


def _seen_by(function: Any) -> dict[str, object]:
    """Values that a function reads from outside of it: its object, defaults, closure and globals."""
    outside = inspect.getclosurevars(function)
    defaults = {str(index): value for index, value in enumerate(function.__defaults__ or ())}
    own = {"self": getattr(function, "__self__", None)}
    return {**own, **defaults, **(function.__kwdefaults__ or {}), **outside.nonlocals, **outside.globals}
