import functools

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_list_of_operators():
    """The exporter reads the sources of all its operators anew at each export; once is enough for tests."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    original = ONNXRegistry.__dict__["from_torchlib"]
    read = functools.cache(lambda *args, **kwargs: original.__get__(None, ONNXRegistry)(*args, **kwargs))
    ONNXRegistry.from_torchlib = staticmethod(read)
    yield
    ONNXRegistry.from_torchlib = original
