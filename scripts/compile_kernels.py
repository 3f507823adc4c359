"""Compiles the Triton kernels as the layers of networks launch them, without a GPU, and reads what came out.

    python scripts/compile_kernels.py                                # sm_90
    python scripts/compile_kernels.py --targets sm_80 sm_90 gfx942 --dtypes bfloat16 float16 float32
    python scripts/compile_kernels.py --clocks                       # and what a step of its innermost loop takes

A line for each kernel and set of compile-time numbers: registers, spilled bytes, shared memory, tensor-core
instructions, loads of 16 bytes. Exits with 1 where a kernel spills, where shared memory exceeds the chip's, where a
matrix product has no tensor-core instruction, or where it reads images of many channels number by number. The launches
are those of the backend itself, with the tiles of its table for the chip, recorded instead of run.

With ``--clocks``, the innermost loop that multiplies (or reads, where no loop multiplies) is disassembled on NVIDIA's
chips. Of its instructions it says how many each warp has by kind, and how long an SM is busy with the step at least:
``issue`` at 4 warp instructions a clock, ``L1`` at 128 bytes a clock to and from memory and shared memory (a copy from
the one to the other counts once), and ``MMA`` at the peak of its tensor cores. ``bound`` is the largest of them for
2^20 multiply-adds. Cache misses, latencies and gaps come on top: only a GPU tells these.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lightning_acu.geometry import ConvGeometry
from lightning_acu.ops.triton import backend as triton_backend
from lightning_acu.ops.triton import tiles as triton_tiles

#: (C_in, C_out, size, kernel, stride, groups, position groups)
LAYERS = [
    (64, 64, 56, 3, 1, 1, 1),
    (256, 512, 14, 3, 2, 1, 1),
    (48, 64, 28, 5, 1, 1, 1),
    (128, 128, 28, 3, 1, 32, 1),
    (64, 96, 28, 3, 1, 1, 3),
    (144, 144, 56, 3, 1, 144, 1),
    (240, 240, 28, 5, 2, 240, 240),
    (512, 256, 7, 3, 1, 1, 1),
    (128, 128, 28, 3, 1, 1, 1),
    (128, 256, 14, 3, 1, 1, 1),
    (256, 256, 14, 3, 1, 1, 1),
    (256, 512, 14, 3, 1, 1, 2),
]
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 160 * 1024),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), 64 * 1024),
}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
PRODUCTS = {"_product_kernel", "cells._input_kernel", "cells._weight_kernel"}
IMAGES = PRODUCTS | {"_forward_kernel", "channelwise._input_kernel", "channelwise._weight_kernel"}


def launches(target, dtype, layers):
    """(kernel, name, what it is compiled for, options) of forward and backward of the layers, by the target's table."""
    found = {}
    triton_tiles.tile_for.cache_clear()  # by device, which is the same for all targets

    def record(kernel, *given, grid, warmup, **named):
        arguments = dict(zip(kernel.arg_names, given, strict=False))
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        arguments |= named
        name = kernel.fn.__name__
        name = (
            f"{kernel.fn.__module__.rpartition('.')[2]}.{name}" if name in ("_input_kernel", "_weight_kernel") else name
        )
        signature, constants, attributes = specialise(kernel, arguments, TARGETS[target][0].backend)
        key = name, str(signature), str(constants), str(options)
        found.setdefault(key, (kernel, name, signature, constants, attributes, options))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(triton_tiles, "arch_of", return_value=target),
    ):
        for c_in, c_out, size, kernel, stride, groups, positions in layers:
            geometry = ConvGeometry((kernel, kernel), (stride, stride), (kernel // 2,) * 4, (1, 1), groups)
            input = torch.empty(16, c_in, size, size, dtype=dtype, memory_format=torch.channels_last)
            weight = torch.empty(c_out, c_in // groups, kernel, kernel, dtype=dtype)
            offsets = torch.zeros(positions, kernel * kernel, 2)
            bias = torch.empty(c_out, dtype=dtype) if groups == 1 else None
            output = triton_backend.forward(input, weight, offsets, bias, geometry)
            triton_backend.backward(output, input, weight, offsets, geometry, [True] * 3)
    return list(found.values())


def specialise(kernel, arguments, backend):
    """What Triton's launcher makes of the arguments: types, constants, and what is known of the others."""
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)
        ):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]  # torch aligns to more than 16 bytes
            if backend == "hip":
                attributes[(index,)].append(["tt.pointer_range", 32])  # below 2 GB
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def resources(cubin):
    """Registers and spilled bytes, by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {"registers": int(numbers["REG"]), "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"])}


#: Kinds of SASS instructions; what is none of them is "integer", with branches and predicates.
KINDS = {
    "MMA": r"HGMMA|HMMA",
    "loads": r"LDG\.",
    "async copies": r"LDGSTS",
    "shared": r"LDS|STS|LDSM|STSM",
    "float": r"F(?:FMA|MUL|ADD)|H(?:FMA|MUL|ADD)2",
    "conversions": r"F2F|PRMT|HADD2\.F32|I2F|IMAD\.U32",
}
#: Multiply-adds of 16 bits, and of TF32, that an SM's tensor cores do in a clock.
PEAK = {80: {16: 1024, 32: 512}, 90: {16: 2048, 32: 1024}}


def loop(cubin):
    """The instructions of the innermost loop that multiplies matrices, or else of the one that reads images."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(re.sub(r"^@!?U?P\w+\s+", "", code[1].strip()))
            target = re.search(r"\bBRA\b.*?`?\((\.L_\w+)\)", code[1])
            if target and target[1] in labels:
                loops.append(lines[labels[target[1]] :])
    for wanted in ("HGMMA|HMMA", "LDG"):
        found = [body for body in loops if any(re.match(wanted, code) for code in body)]
        if found:
            return min(found, key=len)
    return []


def clocks(cubin, numbers, arch, warps, bits):
    """A step of the loop: instructions of a warp by kind, and the clocks that it keeps an SM busy; None without one."""
    body = loop(cubin)
    if not body:
        return None
    counts = {kind: sum(bool(re.match(code, line)) for line in body) for kind, code in KINDS.items()}
    counts["integer"] = len(body) - sum(counts.values())
    moved = 0  # bytes of a warp
    for line in body:
        operation = line.split()[0]
        if re.match(r"LDG|LDS|STS|STG", operation) and not operation.startswith("LDGDEPBAR"):
            quads = re.search(r"\.M88\.(\d)", operation)
            bits_each = re.search(r"\.(64|128)\b", operation)
            moved += 32 * 4 * int(quads[1]) if quads else 4 * int(bits_each[1] if bits_each else 32)
    m, n, k = (numbers.get(f"BLOCK_{axis}", 1) for axis in "MNK")
    n *= numbers.get("AT_ONCE", 1)
    read = 0
    if any(line.startswith("HGMMA") for line in body):  # which reads its operands from shared memory
        down = max(1, min(m // 64, warps // 4))  # groups of four warps, each with the rows and columns of its block
        read = warps // 4 * k * (m // down + n * 4 * down // warps) * bits // 8
    multiplies = any(re.match("HGMMA|HMMA", line) for line in body)
    mma = m * n * k / PEAK[arch][bits] if multiplies else 0
    busy = {"issue": len(body) * warps / 4, "L1": (moved * warps + read) / 128, "MMA": mma}
    bound = max(busy.values()) * 2**20 / (m * n * k)
    return counts | {name: round(value) for name, value in busy.items()} | {"bound": round(bound)}


def inspect(compiled, chip):
    """What the compiled kernel uses of the chip."""
    if chip.backend == "cuda":  # (the assembler keeps the instructions that are counted, and disassembling is slow)
        text, used = compiled.asm["ptx"], resources(compiled.asm["cubin"])
        product = r"\bmma\.sync|\bwgmma\.mma_async"
        load = r"\bld\.global\S*\.(?:v4\.b32|v2\.b64)|\bcp\.async\.cg\.shared\.global"  # the latter is LDGSTS
    else:
        text = compiled.asm["amdgcn"]
        used = {"spilled": sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)))}
        product, load = r"v_mfma|v_wmma", r"(?:global|buffer)_load_(?:dwordx4|b128|lds_dwordx4)"
    counts = {what: len(re.findall(code, text)) for what, code in (("tensor-core", product), ("wide loads", load))}
    return {"shared": compiled.metadata.shared} | used | counts


def faults(name, found, most, numbers):
    """What is wrong with a kernel that uses ``found`` where ``most`` bytes of shared memory are there."""
    if found["shared"] > most:
        yield f"more than {most} bytes of shared memory"
    if found["spilled"]:
        yield "spills"
    if name in PRODUCTS and not found["tensor-core"]:
        yield "no tensor-core instruction"
    blocks = [value for number, value in numbers.items() if number.startswith("BLOCK")]
    together = numbers.get("UNIFORM", True)  # channels at positions of their own cannot be read together
    if name in IMAGES and together and min(blocks) >= 32 and not found["wide loads"]:
        yield "reads images number by number"


def main():
    """Compile, print, and exit with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["sm_90"], choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int, nargs="+", default=range(len(LAYERS)), help="indices into LAYERS")
    parser.add_argument("--interpolation", default="float32", choices=["float32", "half"])
    parser.add_argument("--clocks", action="store_true", help="count the instructions of loops; for sm_80 and sm_90")
    options = parser.parse_args()
    triton_tiles.set_interpolation(options.interpolation)
    torch.backends.cudnn.allow_tf32 = True  # otherwise float32 products have no tensor cores
    failures = 0
    for target, dtype in itertools.product(options.targets, options.dtypes):
        chip, most = TARGETS[target]
        layers = [LAYERS[i] for i in options.layers]
        for kernel, name, signature, constants, attributes, choice in launches(target, getattr(torch, dtype), layers):
            compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=chip, options=choice)
            found = inspect(compiled, chip)
            numbers = {kernel.arg_names[index]: value for (index,), value in constants.items()}
            wrong = list(faults(name, found, most, numbers))
            blocks = {n: value for n, value in numbers.items() if n.startswith("BLOCK")}
            uses = ", ".join(f"{what} {number}" for what, number in found.items())
            print(f"{target} {dtype} {name}: {uses}", blocks, *(f"<-- {what}" for what in wrong), flush=True)
            failures += len(wrong)
            if options.clocks and chip.backend == "cuda" and name in IMAGES:
                bits = 32 if dtype == "float32" else 16
                step = clocks(compiled.asm["cubin"], numbers, chip.arch, choice["num_warps"], bits)
                if step is not None:
                    print("    a step:", ", ".join(f"{what} {number}" for what, number in step.items()), flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
