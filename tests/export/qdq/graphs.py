"""Small ONNX graphs, and how other implementations compute them."""

import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def model(nodes, constants, inputs=None, outputs=("y",), opset=21):
    """A graph with a float input `x` of two axes, or those that are given as shapes."""
    inputs = {"x": ["batch", None]} if inputs is None else inputs
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    made.opset_import.append(helper.make_opsetid("lightning_compress", 1))
    return made


def session(made, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def computed(made, **values):
    return session(made).run(None, values)


def node(operator, inputs, output, **attributes):
    return helper.make_node(operator, inputs, [output], **attributes)


def marker(source, target, scale, zero_point, quantizer="step", number=0):
    attributes = {"scale": scale, "zero_point": zero_point, "quantizer": quantizer, "number": number}
    attributes |= {"lowest": 0, "highest": 255}
    return helper.make_node("FakeQuantize", [source], [target], domain="lightning_compress", **attributes)
