"""Plain values with their places; anything else in the text is refused in words."""

import math

import pytest
import yaml

from lightning_compress.recipe.safe_yaml import MAX_BYTES, parse_yaml, read_yaml


def at(line):
    return f"r.yaml:{line}"


def value_of(text):
    return parse_yaml(f"[{text}]", at).plain()[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-3", -3), ("1_000", 1000), ("0.5", 0.5), (".5", 0.5), ("1e-3", 1e-3), ("-1.5E+2", -150.0),
        ("true", True), ("no", False), ("On", True), ("null", None), ("~", None),
        (".inf", math.inf), ("-.Inf", -math.inf),
        ("2:4", "2:4"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("010", "010"), ("10%", "10%"),
        ("3 epochs", "3 epochs"), ("'3'", "3"), ("1_0", "1_0"), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_plain_words_are_numbers_truth_values_null_or_text(text, value):
    assert value_of(text) == value
    assert type(value_of(text)) is type(value)


def test_nan_is_a_number():
    assert math.isnan(value_of(".nan"))


def test_what_is_no_pattern_of_ours_reads_as_in_pyyaml():
    text = "{a: [1, 2.5, x], b: {c: 'y', d: null, e: [true, off]}}\n"
    assert parse_yaml(text, at).plain() == yaml.safe_load(text)
    text = "a: |\n  two\n  lines\nb: >-\n  one\n  line\n3: four\n"
    assert parse_yaml(text, at).plain() == yaml.safe_load(text)


def test_every_value_knows_its_line():
    root = parse_yaml("a:\n  - 1\n  - b: 2\nc: 3\n", at)
    assert root.value["a"].where == "r.yaml:1"
    assert root.value["a"].value[1].value["b"].where == "r.yaml:3"
    assert root.value["c"].where == "r.yaml:4"


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/object/new:os.system", "!mine", "!!binary",
     "!!set", "!!str"],
)  # fmt: skip
def test_a_tag_is_refused_with_its_line(tag):
    with pytest.raises(ValueError, match=rf"^r\.yaml:2: the tag '{tag}' is refused"):
        parse_yaml(f"a: 1\nb: {tag} [echo]\n", at)


def test_a_key_that_stands_twice_is_refused_with_both_places():
    with pytest.raises(ValueError, match=r"^r\.yaml:3: 'a' stands here twice; the first is at r\.yaml:1"):
        parse_yaml("a: 1\nb: 2\na: 3\n", at)


def test_aliases_and_merges_are_written_out():
    text = "base: &base {a: 1, b: 2}\ncopy: *base\nmerged: {<<: *base, b: 3}\nboth: {<<: [{a: 5}, *base]}\n"
    values = parse_yaml(text, at).plain()
    assert values["copy"] == {"a": 1, "b": 2}
    assert values["merged"] == {"a": 1, "b": 3}
    assert values["both"] == yaml.safe_load(text)["both"] == {"a": 5, "b": 2}


def test_an_alias_of_itself_is_refused():
    with pytest.raises(ValueError, match=r"r\.yaml:1: this value contains an alias of itself"):
        parse_yaml("a: &a [*a]", at)
    with pytest.raises(ValueError, match="alias of itself"):
        parse_yaml("a: &a {<<: *a}", at)


def test_an_alias_bomb_is_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    with pytest.raises(ValueError, match=r"more than 10,000 values once every alias is written out"):
        parse_yaml("\n".join(lines), at)


def test_a_merge_bomb_is_refused():
    lines = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))]
    with pytest.raises(ValueError, match=r"more than 10,000 values"):
        parse_yaml("\n".join(lines), at)


@pytest.mark.parametrize("text", ["[" * 5000, "- " * 5000, "{a: " * 5000])
def test_values_too_deep_inside_each_other_are_refused(text):
    with pytest.raises(ValueError, match="more than 100 values inside each other"):
        parse_yaml(text, at)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing is written"),
        ("# only a comment\n", "nothing is written"),
        ("a: [1\nb: 2", "r.yaml:2: not valid YAML"),
        ("a: *b", "undefined alias"),
        ("a: 1\n---\nb: 2", "r.yaml:2: .*another document"),
        ("? [1, 2]\n: 3", "a key is a word or a number"),
        ("true: 1", "a key is a word or a number"),
        ("a: \x01", "special characters"),
        ("a: {<<: 3}", "'<<' takes a mapping"),
    ],
)
def test_what_is_not_yaml_is_refused_in_words(text, words):
    with pytest.raises(ValueError, match=words):
        parse_yaml(text, at)


def test_a_file_must_be_there_small_and_text(tmp_path):
    path = tmp_path / "r.yaml"
    with pytest.raises(FileNotFoundError, match=r"r\.yaml does not exist"):
        read_yaml(path)
    with pytest.raises(ValueError, match="is not a file"):
        read_yaml(tmp_path)
    path.write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match="not UTF-8 text: byte 3 is 0xff"):
        read_yaml(path)
    path.write_text("# " + "x" * MAX_BYTES)
    with pytest.raises(ValueError, match=r"has 1,048,578 bytes, but a recipe has at most 1,048,576"):
        read_yaml(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(path).plain() == {"a": 1}
