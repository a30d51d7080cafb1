"""The command `lightning-compress`: run, list, copy, preview and sweep recipes, report on checkpoints, compare runs."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from lightning_compress._version import __version__

if TYPE_CHECKING:
    from lightning_compress.recipe import Recipe

PROGRAM = "lightning-compress"
USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Its exit code: 0; 2 after one line about what was wrong in what it was given; that of a program that it started.
    """
    arguments = _parsed(list(sys.argv[1:] if argv is None else argv))
    try:
        return arguments.command(arguments) or 0
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"{PROGRAM}: error: {' '.join(str(error).split())} (--debug shows the traceback)", file=sys.stderr)
        return USER_ERROR


class _Parser(argparse.ArgumentParser):
    """Says an error in one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def _parsed(argv: list[str]) -> argparse.Namespace:
    """Arguments before `--`; what follows it is the program of those commands that start one."""
    place = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv[:place])
    if arguments.command is _join:
        arguments.settings = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.program = argv[place + 1 :]
    if arguments.program and arguments.command not in (_join, _sweep):
        parser.error(f"-- stands before a program, and this command starts none: {' '.join(arguments.program)}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_run, _add_recipes, _add_report, _add_compare, _add_timeline, _add_sweep, _add_join):
        add(commands)
    return parser


Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def _add_run(commands: Commands) -> None:
    parser = commands.add_parser("run", help="run a complete recipe: model, data, trainer and callbacks")
    _add_recipe(parser)
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where data modules look for their files")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="where logs and checkpoints go")
    parser.add_argument("--ckpt-path", type=Path, metavar="FILE", help="go on with the run that wrote this checkpoint")
    _finish(parser, _run)


def _add_recipes(commands: Commands) -> None:
    parser = commands.add_parser("recipes", help="list the ready recipes, or copy one")
    _finish(parser, _list_recipes)
    inner = parser.add_subparsers(metavar="copy")
    copy = inner.add_parser("copy", help="copy a ready recipe, to change it")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("target", metavar="DEST", nargs="?", default=Path(), type=Path, help="a file or a folder")
    copy.add_argument("--force", action="store_true", help="replace DEST if it is there")
    _finish(copy, _copy_recipe)


def _add_report(commands: Commands) -> None:
    parser = commands.add_parser("report", help="what a checkpoint holds: parameters, zeros and bytes of each tensor")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the report as one web page too")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report as JSON too")
    _finish(parser, _report)


def _add_compare(commands: Commands) -> None:
    parser = commands.add_parser(
        "compare", help="reports of several runs beside each other, and as shares of the first"
    )
    parser.add_argument("reports", metavar="REPORT", type=Path, nargs="+", help=".json files of CompressionReport")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the table as Markdown too")
    _finish(parser, _compare)


def _add_timeline(commands: Commands) -> None:
    parser = commands.add_parser("timeline", help="when everything in a recipe happens, before anything runs")
    _add_recipe(parser)
    parser.add_argument("--steps", type=_count, metavar="N", help="optimizer steps of the run")
    parser.add_argument("--epochs", type=_count, metavar="N", help="epochs of the run")
    parser.add_argument("--batches", type=_count, metavar="N", help="training batches of an epoch")
    _finish(parser, _timeline)


def _add_sweep(commands: Commands) -> None:
    parser = commands.add_parser("sweep", help="run a program under a recipe once for each combination of settings")
    parser.usage = "%(prog)s SWEEP --recipe RECIPE [options] -- PROGRAM [ARGUMENT ...]"
    parser.add_argument("sweep", metavar="SWEEP", help="a YAML file in W&B's format, or the name of a ready sweep")
    _add_recipe(parser, "--recipe", required=True)
    parser.add_argument("--count", type=_count, metavar="N", help="how many runs, for random and bayes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parser.add_argument("--resume", action="store_true", help="go on with a sweep that was stopped")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="where each run's report and output go")
    _finish(parser, _sweep)


def _add_join(commands: Commands) -> None:
    parser = commands.add_parser("join", help="run a program with a recipe in its environment: for wandb agent")
    parser.usage = "%(prog)s RECIPE [--KEY=VALUE ...] -- PROGRAM [ARGUMENT ...]"
    _add_recipe(parser)
    _finish(parser, _join)


def _add_recipe(parser: argparse.ArgumentParser, name: str = "recipe", **options: Any) -> None:
    parser.add_argument(name, metavar="RECIPE", help="a YAML file, or the name of a ready recipe", **options)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="pruning.final_sparsity=0.95")
    parser.add_argument("--allow", action="append", default=[], metavar="NAME", help="your own classes: my_package.*")


def _finish(parser: argparse.ArgumentParser, command: object) -> None:
    parser.set_defaults(command=command)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


# Each command imports what it needs, so that listing recipes does not wait for what running them takes.


def _run(arguments: argparse.Namespace) -> None:
    from lightning_compress.recipe.environment import VARIABLE
    from lightning_compress.recipe.run import run_recipe

    if also := os.environ.get(VARIABLE):
        raise ValueError(
            f"{VARIABLE}={also} would add its callbacks to this recipe's. Unset it: it is for your scripts."
        )
    recipe = _load(arguments)
    run_recipe(recipe, data_dir=arguments.data_dir, output_dir=arguments.output_dir, ckpt_path=arguments.ckpt_path)


def _timeline(arguments: argparse.Namespace) -> None:
    from lightning_compress.core.phases import Run

    if arguments.steps is not None and arguments.epochs is not None:
        raise ValueError("--steps and --epochs both say how long the run is. Give one of them.")
    if arguments.batches is not None and arguments.epochs is None:
        raise ValueError("--batches counts those of an epoch: give --epochs too.")
    recipe = _load(arguments)
    if arguments.steps is None and arguments.epochs is None:
        if "trainer" not in recipe.to_dict():
            raise ValueError(f"{arguments.recipe} does not say how long the run is: give --steps N, or --epochs N.")
        recipe.timeline()
        return
    recipe.timeline(Run(arguments.epochs, arguments.steps, arguments.batches))


def _list_recipes(arguments: argparse.Namespace) -> None:
    from lightning_compress.recipe.builtin import builtin_recipes, recipe_purpose

    for name, path in builtin_recipes().items():
        print(f"{name:<16} {recipe_purpose(path)}")


def _copy_recipe(arguments: argparse.Namespace) -> None:
    from lightning_compress.recipe.builtin import copy_recipe

    print(f"Copied to {copy_recipe(arguments.name, arguments.target, force=arguments.force)}.")


def _report(arguments: argparse.Namespace) -> None:
    from lightning_compress.reporting.checkpoint_report import report_checkpoint

    targets = {".html": arguments.html, ".json": arguments.json}
    for suffix, target in targets.items():
        if target is not None and target.suffix != suffix:
            raise ValueError(f"--{suffix[1:]} writes a file that ends in {suffix}, but is {target}.")
    report = report_checkpoint(arguments.checkpoint)
    report.print()
    for target in filter(None, targets.values()):
        print(f"Written to {report.save(target)}.")


def _compare(arguments: argparse.Namespace) -> None:
    from lightning_compress.reporting.compare import compare, load_reports

    if arguments.output is not None and arguments.output.suffix != ".md":
        raise ValueError(f"--output writes a file that ends in .md, but is {arguments.output}.")
    comparison = compare(load_reports(arguments.reports))
    comparison.print()
    if arguments.output is not None:
        arguments.output.write_text(comparison.to_markdown(), encoding="utf-8")
        print(f"Written to {arguments.output}.")


def _sweep(arguments: argparse.Namespace) -> int:
    from lightning_compress.recipe.builtin import find_recipe
    from lightning_compress.recipe.run_sweep import print_outcomes, run_sweep
    from lightning_compress.recipe.sweep import read_sweep

    _look_where_the_command_is_typed(arguments)
    sweep = read_sweep(find_recipe(arguments.sweep, "sweeps"))
    if sweep.unused:
        print(f"Left to W&B, and not done here: {', '.join(sweep.unused)}.")
    folder = arguments.output_dir or Path(f"sweep_{sweep.path.stem}")
    outcomes = run_sweep(
        sweep, arguments.recipe, folder, arguments.program, count=arguments.count, seed=arguments.seed,
        resume=arguments.resume, overrides=arguments.set, allow=arguments.allow,
    )  # fmt: skip
    print_outcomes(outcomes, sweep, folder)
    return int(any(outcome.code for outcome in outcomes))


def _join(arguments: argparse.Namespace) -> int:
    from lightning_compress.recipe.subprocess_env import (
        overrides_from_arguments,
        run_program_with_recipe,
        subprocess_environment,
    )

    _look_where_the_command_is_typed(arguments)
    overrides = [*arguments.set, *overrides_from_arguments(arguments.settings)]
    return run_program_with_recipe(
        arguments.program, subprocess_environment(arguments.recipe, overrides, arguments.allow, os.environ)
    )


def _load(arguments: argparse.Namespace) -> "Recipe":
    from lightning_compress.recipe import Recipe
    from lightning_compress.recipe.builtin import find_recipe

    _look_where_the_command_is_typed(arguments)
    return Recipe.load(find_recipe(arguments.recipe), overrides=arguments.set, allow=arguments.allow)


def _look_where_the_command_is_typed(arguments: argparse.Namespace) -> None:
    """As `python -m` does, for what the user allows."""
    if arguments.allow and "" not in sys.path:
        sys.path.insert(0, "")
