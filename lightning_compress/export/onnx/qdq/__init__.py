"""The steps from a deployable to an ONNX graph of integers; `onnx_file` puts them together.

These files import onnx, onnxruntime and onnxscript, and so are imported where a file is written, by nobody before.
"""
