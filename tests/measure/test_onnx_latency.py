import pytest
import torch
from torch import nn

from lightning_compress.measure.onnx_latency import measure_onnx_latency

onnxruntime = pytest.importorskip("onnxruntime")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def forward(self, first, second):
        return self.net(first) - second


def session(monkeypatch, seen):
    """Notes what every call of a session gives."""
    call = onnxruntime.InferenceSession.run

    def run(self, names, fed, *options):
        seen.append((fed, call(self, names, fed, *options)))
        return seen[-1][1]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", run)


@pytest.mark.parametrize("as_words", [False, True])
def test_what_is_timed_computes_what_the_module_does(as_words, monkeypatch):
    model, seen = Two().train(), []
    given = {"second": torch.randn(2, 3), "first": torch.randn(2, 4)}
    state, stream = {name: one.clone() for name, one in model.state_dict().items()}, torch.get_rng_state()
    session(monkeypatch, seen)
    found = measure_onnx_latency(model, given if as_words else (given["first"], given["second"]), 2, runs=10)
    assert (found.batch, found.runs, found.warmup_runs, found.threads) == (2, 10, 1, 1)
    assert found.median_ms > 0
    assert len(seen) == 11
    assert model.training
    assert model.net[2].training
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(state[name], one) for name, one in model.state_dict().items())
    with torch.no_grad():
        expected = model.eval()(**given)
    torch.testing.assert_close(torch.from_numpy(seen[-1][1][0]), expected)
