"""A public name means one thing, changes on purpose only, and Lightning's private attributes have one home."""

import ast

import pytest

from tests.tools import api_snapshot, names
from tests.tools.import_graph import read_trees
from tests.tools.layers import PACKAGE


@pytest.fixture(scope="module")
def trees():
    return read_trees(PACKAGE)


def parsed(**files):
    return {name.replace("__", "/") + ".py": ast.parse(text) for name, text in files.items()}


def test_a_public_name_is_defined_once(trees):
    assert names.duplicates(trees) == {}


def test_a_name_of_two_files_is_found_unless_both_are_registries():
    trees = parsed(
        pruning__masks="class Mask: ...\ndef _own(): ...\ndef random(): ...",
        export__api="def Mask(): ...\ndef _own(): ...",
        pruning__functional__criteria="def random(): ...\ndef taylor(): ...",
        channel_pruning__functional__criteria="def taylor(): ...",
    )
    assert names.duplicates(trees) == {
        "Mask": ["pruning/masks.py", "export/api.py"],
        "random": ["pruning/masks.py", "pruning/functional/criteria.py"],
    }


def test_docstrings_describe_what_their_code_has(trees):
    assert names.strangers_in_docstrings(trees) == []


def test_a_docstring_of_what_was_renamed_is_found():
    described = '"""X.\n\n    Args:\n        low, high: a.\n        rest: b.\n        more: c.\n    """'
    function = f"def f(low, *rest, **more):\n    {described}"
    kind = 'class C:\n    """X.\n\n    Attributes:\n        held: a.\n        kept: b.\n    """\n    kept: int'
    assert names.strangers_in_docstrings(parsed(a=function, b=kind)) == [
        "a.py:1: f has no 'high'", "b.py:1: C has no 'held'",
    ]  # fmt: skip


def test_names_are_the_fields_words():
    assert names.project_words(PACKAGE) == {}


def test_a_name_of_the_project_alone_is_found_in_code_and_not_in_prose(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""How it is held."""\nkept = (held, self._whole, Gone, thawed, "told")  # moment\n'
    )
    assert names.project_words(tmp_path) == {"Gone": ["a.py"], "_whole": ["a.py"], "held": ["a.py"]}


def test_private_attributes_of_lightning_are_used_in_one_file(trees):
    assert names.private_uses(trees) == []


@pytest.mark.parametrize("text", [
    "trainer.fit_loop._skip_backward", "x._setup_model(y)", "getattr(one, '_average_model', None)",
    "trainer._anything", "self.trainer.strategy._other = 1", "trainer.loggers[0]._id", "hasattr(callback, '_x')",
    "kept = '_wandb_init'", "name.startswith('_ForwardRedirection.')", "import m\nm._ForwardRedirection",
])  # fmt: skip
def test_a_private_attribute_of_lightning_is_found(text):
    line, *_ = names.private_uses(parsed(training__callback=text))
    assert line.startswith(f"training/callback.py:{text.count(chr(10)) + 1} uses _")
    assert names.private_uses(parsed(_lightning=text)) == []


@pytest.mark.parametrize(
    "text", ["self._skipped", "module._parameters", "trainer.__class__", "trainer.callbacks", "x = '_'"]
)
def test_other_attributes_are_left_alone(text):
    assert names.private_uses(parsed(nn__surgery=text)) == []


def test_public_names_and_signatures_are_those_of_the_snapshot():
    found = api_snapshot.differences()
    assert not found, f"If this is meant to change, say so in CHANGELOG.md and run: {api_snapshot.RENEW}\n{found}"


def test_a_changed_signature_is_seen(monkeypatch):
    import lightning_compress

    monkeypatch.setattr(lightning_compress, "quantize", lambda model, *, bits=9: None)
    monkeypatch.setattr(
        lightning_compress, "__all__", [name for name in lightning_compress.__all__ if name != "Report"]
    )
    found = api_snapshot.differences()
    assert '+  "quantize": "(model, *, bits=9)",' in found
    assert '-  "Report": {' in found
    assert api_snapshot.main([]) == 1


def test_a_class_is_described_by_what_the_package_defines():
    from lightning_compress import Pruning

    described = api_snapshot.describe(Pruning)
    assert described["()"].startswith("(final_sparsity=0.9, *, ")
    assert described["timeline"] == "(self, run)"
    assert "on_before_zero_grad" not in described
