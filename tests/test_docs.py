"""README and docs/: their examples run, their tables are those of the code, their links lead somewhere."""

import ast
import re
from functools import partial
from importlib import import_module
from inspect import Parameter, isclass, signature
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress
from lightning_compress.core.registry import registered
from lightning_compress.distillation import losses
from lightning_compress.recipe import Recipe
from lightning_compress.recipe.classes import installed_lightning
from lightning_compress.training.callback import CompressionCallback

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs" / "results").glob("*.md"))]
# In a page an import of Lightning shows the reader where `pl` is from; here it would hide the quiet Trainer.
IMPORT_OF_LIGHTNING = re.compile(r"^import (?:pytorch_lightning|lightning) as pl\b.*$", re.MULTILINE)
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
HEAD = re.compile(r"^\| argument of `([\w.]+)` \| default \| what \|\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)
ROW = re.compile(r"^\| `(\w+)` \| (?:`([^`]+)`)? ?\| \S.* \|$")


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def pages_with(language):
    return pytest.mark.parametrize("page", [one for one in PAGES if blocks(one, language)], ids=lambda page: page.stem)


def given():
    """What `docs/index.md` says that every example has at hand, small."""
    lightning = import_module(installed_lightning())

    class MyModel(lightning.LightningModule):
        def __init__(self, width=32):
            super().__init__()
            self.save_hyperparameters()
            self.backbone = nn.Sequential(
                nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
            )
            self.head = nn.Linear(width, 4)

        def forward(self, x):
            return self.head(self.backbone(x))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.training_step(batch, batch_idx))

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 8), torch.randint(0, 4, (64,)))
    return {
        "pl": SimpleNamespace(Trainer=partial(lightning.Trainer, **QUIET), LightningModule=lightning.LightningModule),
        "MyModel": MyModel,
        "model": MyModel(),
        "teacher": MyModel(width=48),
        "loader": DataLoader(data, batch_size=8),
        "example_input": torch.randn(8, 8),
    }


def value_of(cell):
    return Parameter.empty if cell is None else ast.literal_eval(cell)


def arguments_of(name):
    """Name and default of each argument of a public class or function."""
    parameters = signature(attrgetter(name)(lightning_compress)).parameters.values()
    return [(one.name, one.default) for one in parameters if one.kind is not Parameter.VAR_KEYWORD]


def is_callback(one):
    return isclass(one) and issubclass(one, CompressionCallback)


@pages_with("python")
def test_the_examples_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = given()
    for block in blocks(page, "python"):
        exec(compile(IMPORT_OF_LIGHTNING.sub("", block), str(page), "exec"), names)


@pages_with("yaml")
def test_the_recipes_of_a_page_can_be_built(page, tmp_path):
    for block in blocks(page, "yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(block, encoding="utf-8")
        assert Recipe.load(path).callbacks()


def test_every_table_of_arguments_is_that_of_the_code_and_every_callback_has_one():
    texts = [text_of(page) for page in PAGES]
    tables = {name: rows.splitlines() for text in texts for name, rows in HEAD.findall(text)}
    assert len(tables) == sum(text.count("| argument of ") for text in texts)
    for name, rows in tables.items():
        told = [(match[1], value_of(match[2])) if (match := ROW.match(row)) else row for row in rows]
        assert told == arguments_of(name), name
    callbacks = {name for name in lightning_compress.__all__ if is_callback(getattr(lightning_compress, name))}
    assert callbacks <= tables.keys()


def test_every_public_name_is_on_some_page():
    words = set(re.findall(r"\w+", " ".join(map(text_of, PAGES))))
    assert set(lightning_compress.__all__) - words == set()


def test_the_tables_of_losses_have_every_loss():
    tables = re.findall(
        r"^\| loss of .*\n\|[-|]+\|\n((?:\|.*\n)+)", text_of(ROOT / "docs" / "distillation.md"), re.MULTILINE
    )
    names = [name for rows in tables for row in rows.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(names) == sorted(registered(losses))
    assert f"{len(names)} losses" in text_of(ROOT / "README.md")


def test_links_between_files_lead_to_files():
    links = {(page, link) for page in LINKED for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(page))}
    assert {
        (page.name, link) for page, link in links if "://" not in link and not (page.parent / link).exists()
    } == set()


def test_links_to_headings_lead_to_headings():
    missing = set()
    for page in LINKED:
        for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text_of(page)):
            target = page.parent / link if link else page
            if anchor not in {
                anchor_of(heading) for heading in re.findall(r"^#+ (.+)$", text_of(target), re.MULTILINE)
            }:
                missing.add((page.name, f"{link}#{anchor}"))
    assert missing == set()


def anchor_of(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_front_page_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


def test_figures_of_the_front_page_are_in_the_results():
    row = re.compile(r"^\| (.*\d.*) \| `python ((?:experiments|benchmarks)/\w+)\.py` \|$", re.MULTILINE)
    rows = row.findall(text_of(ROOT / "README.md"))
    assert len(rows) == 3
    results = text_of(ROOT / "docs" / "results" / "README.md")
    for told, script in rows:
        assert (ROOT / f"{script}.py").exists()
        table = ROOT / "docs" / "results" / f"{Path(script).name}.md"
        measured = results + (text_of(table) if table.exists() else "")
        figures = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?|\d+,\d{3}(?:,\d{3})?", told)
        assert len(figures) >= 3
        assert [figure for figure in figures if figure not in measured] == []


def test_figures_of_the_page_of_methods_are_in_the_results():
    measured = " ".join(map(text_of, sorted((ROOT / "docs" / "results").glob("*.md"))))
    told = re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+|\d+,\d{3}(?:,\d{3})?", text_of(ROOT / "docs" / "which_method.md"))
    assert len(told) >= 30
    assert [figure for figure in told if figure not in measured] == []


def test_papers_are_those_that_the_code_names():
    code = " ".join(text_of(path) for path in ROOT.glob("lightning_compress/**/*.py"))
    assert {
        paper for page in PAGES for paper in re.findall(r"arxiv\.org/abs/[\d.]+\d", text_of(page)) if paper not in code
    } == set()
