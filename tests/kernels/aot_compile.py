"""Compile a Triton launch for an architecture without a GPU, and read what the assembler says of it."""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import mhc_layers.kernels.triton

_POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its grid and its bound arguments."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Resources:
    """What the assembler reports for a kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    assembly: str


@contextlib.contextmanager
def pretended(capability: int) -> Iterator[None]:
    """Let the launchers of ``mhc_layers`` see a device like an H100 of this capability, and forget it afterwards."""
    modules = [
        importlib.import_module(f"{mhc_layers.kernels.triton.__name__}.{info.name}")
        for info in pkgutil.iter_modules(mhc_layers.kernels.triton.__path__)
    ]

    def forget() -> None:
        for module in modules:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, fact in (("num_sms", 132), ("capability", capability)):
                if hasattr(module, name):
                    patch.setattr(module, name, lambda device, fact=fact: fact)
        forget()
        try:
            yield
        finally:
            forget()


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Replace every Triton launch by a record of it; the tensors may live anywhere."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = list(self.arg_names)
        options = {
            key: kwargs.pop(key)
            for key in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")
            if key in kwargs
        }
        if self.fn.__module__.startswith("mhc_layers.") and list(kwargs) != names[len(args) :]:
            # mhc_layers.kernels.triton.launch hands a remembered kernel its constants in the order they came in
            raise TypeError(f"{self.fn.__name__}: constants {list(kwargs)}, parameters {names[len(args) :]}")
        bound = dict(zip(names, args, strict=False)) | kwargs
        launches.append(Launch(self, tuple(grid), {name: bound[name] for name in names}, options))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile a recorded launch for ``sm_<capability>``."""
    signature: dict[str, str | tuple[str, ...]] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTER[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):
            signature[name] = tuple(_POINTER[item.dtype] for item in value)
            attributes.update({(index, place): [["tt.divisibility", 16]] for place in range(len(value))})
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and name not in (launch.kernel.do_not_specialize or ()):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    return Resources(
        *resource_usage(compiled.asm["cubin"]), shared_bytes=compiled.metadata.shared, assembly=compiled.asm["ptx"]
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of spills (local memory and stack), of the kernel in a cubin."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]
