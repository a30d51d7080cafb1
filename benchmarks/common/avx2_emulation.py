"""Run ONNX Runtime and torch with their AVX2 kernels on a CPU that has AVX-512 and VNNI.

torch and oneDNN have environment variables for that. ONNX Runtime has none: it asks the CPU which registers are in use
(instruction `xgetbv`) and decides about AVX-512 by the answer. So a temporary copy of its package is patched: `mov al,
7`, the answer of a CPU without AVX-512, replaces that instruction. AVX-VNNI, in CPUs since 2021, uses the registers of
AVX2; the instruction `cpuid` tells of it in its leaf 7.1, and is patched there to tell of nothing. `saturates()` checks
that the copy really computes as a CPU with AVX2 alone does, by a sum of products that saturates there and only there.
"""

import os
import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import torch

# `xor ecx, ecx` before both: so this is the instruction, and not a part of a longer one.
ASKED, ANSWERED = bytes.fromhex("31c9 0f01d0"), bytes.fromhex("31c9 b00790")
# `mov eax, 7; mov ecx, 1; cpuid; test al, 16`: the last asks for AVX-VNNI. All four registers are cleared instead.
ASKED_VNNI = bytes.fromhex("b807000000 b901000000 0fa2 a810")
ANSWERED_VNNI = bytes.fromhex("31c0 31db 31c9 31d2 90909090 a810")
TORCHS_OWN = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def is_wider() -> bool:
    """Whether this is Linux on a CPU with AVX-512 VNNI, which this module can hide."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and torch.cpu.get_capabilities()["avx512_vnni"]


def environment_without_avx512(folder: Path) -> dict[str, str]:
    """Environment of a process that computes with AVX2 at most; the patched package is written to the folder.

    Raises:
        RuntimeError: if this build of ONNX Runtime asks in another way.
    """
    found = find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise RuntimeError("onnxruntime is not installed: pip install 'lightning-compress[export]'.")
    copy = shutil.copytree(Path(found.origin).parent, folder / "onnxruntime", ignore=shutil.ignore_patterns("tools"))
    asked = 0
    for library in copy.glob("capi/*.so*"):
        content = library.read_bytes()
        asked += content.count(ASKED)
        library.write_bytes(content.replace(ASKED, ANSWERED).replace(ASKED_VNNI, ANSWERED_VNNI))
    if not asked:
        raise RuntimeError("This build of ONNX Runtime does not ask for AVX-512 in the way that we know.")
    return {**os.environ, **TORCHS_OWN, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def saturates() -> bool:
    """Whether ONNX Runtime adds two products of 8 bits in 16, as it does on a CPU with AVX2 and without VNNI."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    given, made = (
        helper.make_tensor_value_info("given", TensorProto.UINT8, [1, 64]),
        helper.make_tensor_value_info("made", TensorProto.INT32, [1, 16]),
    )
    weight = numpy_helper.from_array(numpy.full((64, 16), 127, numpy.int8), "weight")
    node = helper.make_node("MatMulInteger", ["given", "weight"], ["made"])
    graph = helper.make_graph([node], "largest", [given], [made], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"given": numpy.full((1, 64), 255, numpy.uint8)})
    return bool(found[0, 0] != 64 * 127 * 255)
