"""What earlier code wrote still loads, resumes and computes the numbers that the earlier code got from it."""

import json

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tools import golden

every_scenario = pytest.mark.parametrize("name", golden.SCENARIOS)
every_file = pytest.mark.parametrize(
    ("name", "suffix"), [(name, suffix) for name in golden.EXPORTED for suffix in golden.SUFFIXES]
)
# Another CPU may add in another order; what is rounded or pruned otherwise moves a weight by far more than this.
close = {"rtol": 1e-4, "atol": 1e-5}
TIMELINES = json.loads(golden.TIMELINES.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def timelines():
    return golden.timelines()


def assert_all_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        exact = {} if value.is_floating_point() and value.element_size() > 1 else {"rtol": 0, "atol": 0}
        message = f"{key}: {{}}".format
        torch.testing.assert_close(found[key], value, msg=message, **(close | exact))
        assert torch.equal(found[key] == 0, value == 0), f"{key}: other elements are zero"


@pytest.mark.parametrize("name", golden.RESUMED)
def test_a_checkpoint_resumes_to_the_same_weights(name, tmp_path):
    expected = {key: value for key, value in golden.expected(name).items() if not key.startswith("load_")}
    assert_all_close(golden.numbers_after_resume(name, tmp_path), expected)


@every_scenario
def test_a_checkpoint_loads_to_the_same_outputs(name):
    expected = {key: value for key, value in golden.expected(name).items() if key.startswith("load_")}
    assert_all_close(golden.numbers_loaded(name), expected)


@pytest.mark.parametrize("name", golden.RESUMED)
def test_a_checkpoint_written_today_has_the_same_content(name, tmp_path):
    golden.fit(name, tmp_path, save=tmp_path / "new.ckpt")
    old, new = (torch.load(path, weights_only=True) for path in (golden.checkpoint(name), tmp_path / "new.ckpt"))
    # Weights that lie on grids are saved so since; what the earlier code saved in their place is beside them.
    for entry in new["callbacks"].values():
        new["state_dict"].update(entry.pop("latents", {}))
    assert_same_content(new, old)


def assert_same_content(found, expected, where="checkpoint"):
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same_content(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same_content(*pair, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, msg=lambda message: f"{where}: {message}", **close)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True), where
    elif "'environment'" not in where and "_version" not in where:
        assert found == expected, where


@every_file
def test_an_exported_file_computes_the_same(name, suffix):
    found = golden.numbers_exported(name, suffix, golden.exported(name, suffix))
    assert_all_close(found, golden.expected(f"{name}{suffix}"))


@every_file
def test_a_file_exported_today_computes_the_same(name, suffix, tmp_path):
    path = golden.write_exported(name, suffix, tmp_path / f"model{suffix}")
    assert_all_close(golden.numbers_exported(name, suffix, path), golden.expected(f"{name}{suffix}"))


@pytest.mark.parametrize("name", golden.EXPORTED)
def test_packed_weights_written_today_are_stored_in_the_same_bits(name, tmp_path):
    old, new = (
        golden.exported(name, ".safetensors"),
        golden.write_exported(name, ".safetensors", tmp_path / "m.safetensors"),
    )
    with safe_open(old, "pt") as first, safe_open(new, "pt") as second:
        assert second.metadata() == first.metadata()
    before, after = load_file(old), load_file(new)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize("name", golden.EXPORTED)
def test_an_onnx_file_written_today_has_the_same_nodes_and_weights(name, tmp_path):
    old, new = golden.exported(name, ".onnx"), golden.write_exported(name, ".onnx", tmp_path / "model.onnx")
    first, second = (onnx.load(path).graph for path in (old, new))
    assert sorted(node.op_type for node in second.node) == sorted(node.op_type for node in first.node)
    assert stored(second) == stored(first)


def stored(graph):
    """Type, shape and content of each stored tensor; their names are free to change."""
    tensors = [(t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes()) for t in graph.initializer]
    return sorted(tensors)


@pytest.mark.parametrize("name", golden.LOWERED)
def test_a_quantized_model_is_lowered_to_the_same_codes_and_outputs(name, tmp_path):
    assert_all_close(golden.numbers_lowered(name, tmp_path), golden.expected(f"lowered_{name}"))


@pytest.mark.parametrize("recipe", TIMELINES)
def test_a_ready_recipe_does_the_same_in_the_same_steps(recipe, timelines):
    assert timelines[recipe] == TIMELINES[recipe]


def test_every_scenario_and_file_has_numbers_and_no_number_is_left_over():
    names = {key.rpartition("/")[0] for key in load_file(golden.EXPECTED)}
    assert names == {*golden.SCENARIOS, *(f"{name}{suffix}" for name in golden.EXPORTED for suffix in golden.SUFFIXES)}
    lowered = {key.rpartition("/")[0] for key in load_file(golden.EXPECTED_LOWERED)}
    assert lowered == {f"lowered_{name}" for name in golden.LOWERED}


def test_numbers_of_earlier_code_are_not_replaced(capsys):
    with pytest.raises(SystemExit):
        golden.main(["--expected"])
    assert "not replaced" in capsys.readouterr().err


def test_another_weight_or_another_zero_is_seen():
    weights = torch.tensor([1.0, 0.0])
    with pytest.raises(AssertionError, match="weight: Tensor-likes are not close"):
        assert_all_close({"weight": torch.tensor([1.1, 0.0])}, {"weight": weights})
    with pytest.raises(AssertionError, match="other elements are zero"):
        assert_all_close({"weight": torch.tensor([1.0, 1e-7])}, {"weight": weights})
    with pytest.raises(AssertionError, match="'b'"):
        assert_same_content({"a": {"b": 2}}, {"a": {"b": 1}})
