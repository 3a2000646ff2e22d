"""A process that compiles the set for a target that it does not have: ``target all|some``.

Prints a JSON list: for each compiled form its name, constants, registers, bytes of stack, spills, and instructions.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anyep.kernels.gpu import target
from anyep.kernels.gpu.kernels import GpuKernels
from anyep.kernels.gpu.launch import options_of
from anyep.kernels.gpu.variants import call_every_variant

TARGETS = {
    "sm_80": (target.SM_80, GPUTarget("cuda", 80, 32)),
    "sm_90": (target.SM_90, GPUTarget("cuda", 90, 32)),
    "sm_100": (target.SM_100, GPUTarget("cuda", 100, 32)),
    "gfx942": (target.GFX942, GPUTarget("hip", "gfx942", 64)),
}


def main(name, how_many):
    ours, theirs = TARGETS[name]
    forms = {}

    def note(kernel, grid, numbers, constants, threads):
        if how_many == "all" or _is_usual(**constants):
            forms[kernel.__name__, tuple(constants.items()), threads] = kernel

    call_every_variant(GpuKernels(torch.device("cpu"), ours, note))
    facts = [
        _facts(kernel, dict(constants), options_of(kernel, ours, threads), theirs)
        for (_, constants, threads), kernel in forms.items()
    ]
    print(json.dumps(facts))


def _is_usual(IDX_BYTES=8, ELEMENT=0, SCALES=0, **_):
    return IDX_BYTES == 8 and ELEMENT != 1 and SCALES <= 0


def _facts(kernel, constants, options, theirs):
    annotations = {name: str(one) for name, one in kernel.fn.__annotations__.items()}
    widths = {"tl.int64": "i64", "tl.int32": "i32"}
    signature = {name: "constexpr" if name in constants else widths[annotations[name]] for name in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=theirs, options=options)
    facts = {"kernel": kernel.__name__, "constants": constants}
    if "ptx" in compiled.asm:
        return facts | _nvidia(compiled.asm["ptx"], compiled.asm["cubin"])
    return facts | _amd(compiled.asm["amdgcn"])


def _nvidia(ptx, cubin):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "memory": numbers["STACK"] + numbers["LOCAL"],
        "instructions": sorted(
            set(re.findall(r"\b(?:ld|st|atom|red|fence|fma|div|cvt|mul|add|sub|rcp|ex2|lg2|sqrt)\.[\w.:]+", ptx))
        ),
    }


_NUMBERS = "v_fma|v_fmac|v_mac|v_pk_fma|v_div|v_rcp|v_rsq|v_sqrt|v_exp|v_log"


def _amd(assembly):
    names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    numbers = {name: int(number) for name, number in re.findall(rf"\.({names}):\s*(\d+)", assembly)}
    return {
        "registers": numbers["vgpr_count"],
        "memory": numbers["private_segment_fixed_size"] + numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"],
        "instructions": sorted(set(re.findall(rf"\b(?:global|buffer|flat|{_NUMBERS})_\w+", assembly))),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
