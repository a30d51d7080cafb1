"""Where: which parameters of a module a callback works on, and why the others are left out."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.swa_utils import AveragedModel

from lightning_compress.core.registry import near_miss

Predicate = Callable[[str, nn.Parameter], bool]
Pattern = str | type[nn.Module] | Predicate
Patterns = Pattern | Sequence[Pattern] | None

# A zero in what these store is a zero in the weight they make: each scales whole filters, or the whole weight.
ZERO_KEEPING = {"_WeightNorm": "original1", "_SpectralNorm": "original"}

STANDS_FOR_OLD = "_replaces_a_module"  # attribute of a module that was put in the place of one that patterns may name

_PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\.(\w+)\.(original\d*)$")


@dataclass(frozen=True)
class Candidate:
    """One parameter, under each of its names if it is tied, with the module that owns it first.

    `stands_for` names the modules that were replaced by one that it is in: patterns that mean these mean it too.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    owner: nn.Module
    stands_for: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Selection:
    """The chosen parameters, and for each other one of two or more dimensions why it is left out."""

    chosen: tuple[Candidate, ...]
    left_out: dict[str, str]
    covered: float

    def __str__(self) -> str:
        lines = [f"{len(self.chosen)} weights, {self.covered:.1%} of the model's parameters"]
        return "; ".join([*lines, *(f"left out: {name} ({why})" for name, why in self.left_out.items())])


def canonical_name(name: str) -> str:
    """A parameter's name without what `torch.compile` and wrappers of it put in.

    >>> canonical_name("net._orig_mod.0.weight")
    'net.0.weight'
    """
    return re.sub(r"(^|\.)_orig_mod(?=\.)", "", name).removeprefix(".")


def candidates(model: nn.Module) -> list[Candidate]:
    """Every parameter once, with all names it has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = [name for name, module in modules.items() if STANDS_FOR_OLD in vars(module)]
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [
        Candidate(
            tuple(dict.fromkeys(map(canonical_name, all_))), parameter, modules[_owner_of(all_[0])],
            tuple(name for one in all_ for name in replaced if one.startswith(f"{name}.")),
        )
        for parameter, all_ in names.items()
    ]  # fmt: skip


def _owner_of(name: str) -> str:
    match = _PARAMETRIZED.search(name)
    return name[: match.start()] if match else name.rpartition(".")[0]


def select(model: nn.Module, targets: Patterns = None, ignore: Patterns = (), frozen: bool = False) -> Selection:
    """Choose parameters of `model`.

    Args:
        model: the module to look through; nothing in it is changed.
        targets: one pattern or several; None means all trainable weights of two or more dimensions but embeddings.
        ignore: patterns of what to leave out, stronger than `targets`.
        frozen: whether what is not trained is chosen too.

    A pattern is a string, matched with `*` wildcards against the parameter's name, the owning module's name and the
    owning module's class name ("net.0.weight", "backbone.*", "Conv*"); a string after "re:", a regular expression for
    the same; a module class; or a function of the parameter's name and the parameter.

    Raises:
        ValueError: if a pattern matches nothing, or if a parameter that is asked for cannot be worked on.
    """
    found = candidates(model)
    averages = _inside_averages(model)
    asked, ignored = as_patterns(targets), as_patterns(ignore)
    _refuse_dead_patterns(found, {"targets": asked, "ignore": ignored})
    chosen, left_out = [], {}
    for candidate in found:
        if any(pattern_matches(pattern, candidate) for pattern in ignored):
            why: str | None = "ignored"
        elif asked and not any(pattern_matches(pattern, candidate) for pattern in asked):
            why = "not among the targets"
        else:
            why = _obstacle(candidate, candidate.parameter in averages, by_default=not asked, frozen=frozen)
        if why is None:
            chosen.append(candidate)
        elif isinstance(candidate.parameter, UninitializedParameter) or candidate.parameter.ndim >= 2:
            left_out[candidate.name] = why
    if not chosen:
        raise ValueError(f"No weight is left to work on: {_listed(left_out) or 'the module has none'}.")
    everything = sum(_count(candidate.parameter) for candidate in found)
    covered = sum(_count(candidate.parameter) for candidate in chosen) / everything
    return Selection(tuple(chosen), left_out, covered)


def select_matching(model: nn.Module, patterns: Patterns, argument: str) -> list[Candidate]:
    """Every parameter that one of `patterns` means, of whatever shape and kind, in the order of the model.

    Args:
        model: the module to look through.
        patterns: as `select` takes them.
        argument: whose they are, for the words of an error.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    found, several = candidates(model), as_patterns(patterns)
    _refuse_dead_patterns(found, {argument: several})
    return [candidate for candidate in found if any(pattern_matches(pattern, candidate) for pattern in several)]


def as_patterns(patterns: Patterns) -> tuple[Pattern, ...]:
    """One pattern or several, as several.

    Raises:
        ValueError: if one is of no kind that can match.
    """
    if patterns is None:
        return ()
    several = patterns if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
    for pattern in several:
        if not ((isinstance(pattern, str) and pattern) or callable(pattern)):
            raise ValueError(
                f"{pattern!r} is no pattern. Write a name with wildcards ('backbone.*'), 're:' and a regular "
                f"expression, a module class (nn.Linear, 'Linear') or a function of name and parameter."
            )
        if isinstance(pattern, str) and pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"'{pattern}' holds no regular expression: {error}.") from error
    return tuple(several)


def pattern_matches(pattern: Pattern, candidate: Candidate) -> bool:
    """Whether `pattern` means this parameter, under any of its names."""
    if isinstance(pattern, type):
        return isinstance(candidate.owner, pattern)
    if callable(pattern):
        return any(pattern(name, candidate.parameter) for name in candidate.names)
    return any(_same(pattern, text) for text in _texts(candidate))


def _texts(candidate: Candidate) -> list[str]:
    owner_names = [_owner_of(name) for name in candidate.names]
    plain = [_PARAMETRIZED.sub(r".\1", name).removeprefix(".") for name in candidate.names]
    classes = type(candidate.owner).__mro__[: type(candidate.owner).__mro__.index(nn.Module)]
    old = [canonical_name(f"{name}.{leaf}").rstrip(".") for name in candidate.stands_for
           for leaf in ("", candidate.name.rpartition(".")[2])]  # fmt: skip
    return [*candidate.names, *plain, *filter(None, owner_names), *old, *(cls.__name__ for cls in classes)]


def _same(pattern: str, text: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], text) is not None
    return fnmatchcase(text, pattern)


def _obstacle(candidate: Candidate, averaged: bool, by_default: bool, frozen: bool) -> str | None:
    """Why this parameter cannot, or by default should not, be worked on."""
    parameter = candidate.parameter
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(
            f"'{candidate.name}' is lazy: its shape is not known before the first batch. Run one batch through the "
            f"module before trainer.fit, or ignore=['{candidate.name}']."
        )
    if not parameter.numel():
        return "without elements"
    if averaged:
        return "a copy that averages other weights; it follows them"
    if parameter.ndim < 2:
        return "fewer than two dimensions"
    if not parameter.requires_grad and not frozen:
        return "frozen"
    if not parameter.is_floating_point():
        return f"of type {parameter.dtype}"
    if by_default and isinstance(candidate.owner, nn.Embedding | nn.EmbeddingBag):
        return "an embedding; name it in targets to include it"
    return _computed(candidate)


def _computed(candidate: Candidate) -> str | None:
    """A weight that is computed from others may be worked on only where zeros survive the computing."""
    match = _PARAMETRIZED.search(candidate.name)
    if match is not None:
        kinds = [type(one).__name__ for one in candidate.owner.parametrizations[match[1]]]  # type: ignore[index]
        if len(kinds) == 1 and ZERO_KEEPING.get(kinds[0]) == match[2]:
            return None
        return f"parametrized by {', '.join(kinds)}, which stores no zeros here that last"
    leaf = candidate.name.rpartition(".")[2]
    if leaf.endswith("_g") and hasattr(candidate.owner, f"{leaf[:-2]}_v"):
        return "the scale of a weight norm"
    return None


def _inside_averages(model: nn.Module) -> set[nn.Parameter]:
    averages = [module for module in model.modules() if isinstance(module, AveragedModel)]
    return {parameter for average in averages for parameter in average.parameters()}


def _refuse_dead_patterns(found: list[Candidate], asked: dict[str, tuple[Pattern, ...]]) -> None:
    for argument, patterns in asked.items():
        for pattern in patterns:
            if argument == "ignore" and not _is_plain_name(pattern):
                continue  # a shared list may well ignore kinds that this model lacks
            if not any(pattern_matches(pattern, candidate) for candidate in found):
                texts = [text for candidate in found for text in _texts(candidate)]
                hint = near_miss(pattern, texts) if isinstance(pattern, str) else ""
                raise ValueError(
                    f"{argument}: {pattern!r} matches no parameter.{hint} There are {_listed(c.name for c in found)}."
                )


def _is_plain_name(pattern: Pattern) -> bool:
    return isinstance(pattern, str) and not pattern.startswith("re:") and not set(pattern) & set("*?[")


def _count(parameter: nn.Parameter) -> int:
    return 0 if isinstance(parameter, UninitializedParameter) else parameter.numel()


def _listed(names: Iterable[str] | dict[str, str], most: int = 12) -> str:
    texts = [f"{name} ({why})" for name, why in names.items()] if isinstance(names, dict) else list(names)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
