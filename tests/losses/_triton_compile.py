"""Compile the kernels to machine code for GPUs that need not be here: the interpreter takes code the compiler refuses.

python tests/losses/_triton_compile.py 80 90
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dualenc.losses.blockwise import triton_kernels as ours

CONSTANTS: list[tuple[Any, dict[str, Any]]] = [
    *((ours._stats_kernel, {"OWN": ours.ALONG_ROW[0], "OTHER": ours.ALONG_ROW[1], "SIGMOID": s}) for s in (0, 1)),
    *((ours._stats_kernel, {"OWN": ours.ALONG_COLUMN[1], "OTHER": ours.ALONG_COLUMN[0], "SIGMOID": s}) for s in (0, 1)),
    *((ours._gradient_kernel, {"HEIGHT": ours.GRADIENT[0], "WIDTH": ours.GRADIENT[1], "SIGMOID": s}) for s in (0, 1)),
]
TYPES = {"smooth": "fp32", **dict.fromkeys(["n_own", "n_other", "own_stride", "other_stride", "h", "w"], "i32")}


def main(capabilities: list[int]) -> None:
    for capability in capabilities:
        for kernel, given in CONSTANTS:
            constants = given | {"SIGMOID": bool(given["SIGMOID"])}
            signature = {
                name: "constexpr" if name in constants else TYPES.get(name, "*i64" if name.endswith("IDS") else "*fp32")
                for name in kernel.arg_names
            }
            where = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
            source = ASTSource(fn=kernel, signature=signature, constexprs=where)
            machine_code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
            print(f"sm_{capability} {kernel.__name__} {constants}: {len(machine_code)} bytes")


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]])
