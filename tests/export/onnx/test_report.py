from lightning_compress.export.onnx.qdq.output_agreement import OutputAgreement
from lightning_compress.export.onnx.report import OnnxReport


def test_a_report_reads_as_a_few_lines():
    report = OnnxReport(
        size_bytes=250,
        float_size_bytes=1000,
        integer_kernels={"QLinearConv": 2, "QGemm": 1},
        float_layers=["up.weight"],
        largest_difference={"input": 0.0, "conv": 0.0123},
        output_difference=0.001,
        agreement=OutputAgreement(samples=40, range_difference=0.004, equal_top1=39),
        opset=21,
        unsigned_layers=["conv.weight"],
        float_macs={"up": 0.25, "attention": 0.0312},
    )
    assert str(report).splitlines() == [
        "250 bytes, 25.0 % of 1000 in float32; opset 21",
        "integer kernels: 2 QLinearConv, 1 QGemm",
        "in floating point: up.weight; 28.1 % of the multiply-accumulates: 'up' 25.0 %, 'attention' 3.1 %",
        "over the 40 samples of the example input: outputs differ by at most 0.4 % of their range, 39 of 40 top-1 are "
        "equal; farthest is 'conv' with 0.012 steps beyond rounding",
        "uint8 weights, as int8 may saturate without VNNI: conv.weight",
    ]


def test_what_is_not_there_is_said_too():
    lines = str(OnnxReport(250, 1000, {}, [], {}, 0.0, 21)).splitlines()
    assert lines[1:] == [
        "integer kernels: none",
        "in floating point: no quantized layer",
        "outputs were not compared",
    ]
