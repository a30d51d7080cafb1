"""The steps from a `DeployedModel` to an ONNX graph of integers; `build.py` calls them in order.

Most of these files import onnx, onnxruntime or onnxscript, so they are imported inside the functions that write a file.
"""
