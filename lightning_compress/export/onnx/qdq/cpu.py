"""Whether this CPU may saturate sums of 8-bit products."""

import platform

import torch

WITHOUT_TROUBLE = ("avx512_vnni", "avx_vnni", "amx_int8")


def may_saturate() -> bool:
    """Whether integer kernels of this CPU add two products of uint8 and int8 in 16 bits, where they may not fit.

    Those of x86 do without the instructions VNNI or AMX.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    known = torch.cpu.get_capabilities()
    return not any(known.get(name, False) for name in WITHOUT_TROUBLE)
