"""Machine code of every kernel at 2K sizes, made with no GPU: registers, no spills, shared memory, tensor cores."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from triton._C.libtriton import native_specialize_impl  # type: ignore[reportMissingImports]
from triton.backends.nvidia.compiler import CUDABackend
from triton.tools.tensor_descriptor import TensorDescriptor

from swifti2v.kernels import modulation_triton, pixels_triton, subpixel_triton, vae_norm_triton, window_attention_triton
from swifti2v.kernels.launch import Launch
from swifti2v.kernels.offline import SHARED_LIMIT, compile_launch, describe
from swifti2v.kernels.window_attention_triton import Tile, plan_attention, plan_norm_rope, tiles

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FAST = (89, 90)  # the others are `slow`
MATRIX = {90: "HGMMA", 100: "UTCHMMA"}  # the tensor cores' instruction; HMMA elsewhere
BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor with a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(tile: Tile, dim: int, tokens: int, context: int, dtype: torch.dtype = BF16) -> Launch:
    """The last 10,560 tokens ask; values lie token-major, as a projection leaves them."""
    heads = 3072 // dim
    q, k = meta(1, heads, 10560, dim, dtype=dtype), meta(1, heads, tokens, dim, dtype=dtype)
    v, out = meta(1, tokens, heads, dim, dtype=dtype).transpose(1, 2), meta(1, 10560, heads, dim, dtype=dtype)
    pair = meta(1, heads, context, dim, dtype=dtype) if context else None
    return plan_attention(q, k, v, pair, pair, out, tile)


def other_kernels(arch: int) -> Iterator[tuple[str, Launch]]:
    """All but attention, for the 5B model (width 3072), the 14B (5120) and both ends of the decoder."""
    for width in (3072, 5120):
        x, rows = meta(1, 5, 3520, width), meta(1, 5, 6, width, dtype=FP32).unbind(2)
        yield f"residual_norm-{width}", modulation_triton.plan_modulation(x, (x, rows[0], x), (rows[1], rows[2], x))
        table = meta(17600, 64, dtype=FP32)
        flat, heads = meta(1, 17600, width), meta(1, width // 128, 17600, 128)
        yield f"norm_rope-{width}", plan_norm_rope(flat, meta(width), table, table, heads, width // 128, 1e-6)
    for channels, height, width in ((1024, 88, 160), (256, 704, 1280), (160, 704, 1280)):
        x = meta(1, channels, 1, height, width).contiguous(memory_format=torch.channels_last_3d)
        extended = meta(1, channels, 3, height, width).contiguous(memory_format=torch.channels_last_3d)
        plan = vae_norm_triton.plan_norm_silu(x, meta(channels, 1, 1, 1), extended[:, :, 2:])
        yield f"norm_silu-{channels}", plan
    x = meta(1, 512, 352, 640).contiguous(memory_format=torch.channels_last)
    out = meta(1, 512, 704, 1280).contiguous(memory_format=torch.channels_last)
    for name, dtype in (("subpixel", BF16), ("subpixel-fp32", FP32)):
        weights, tile = meta(2, 2, 2, 2, 512, 512, dtype=dtype), subpixel_triton.conv_tile(arch, dtype)
        given = (x.to(dtype), weights, meta(512, dtype=dtype), out.to(dtype))
        yield name, subpixel_triton.plan_subpixel(*given, tile)
    x = meta(1, 12, 1, 704, 1280).contiguous(memory_format=torch.channels_last_3d)
    frames = meta(1, 1, 1408, 2560, 3, dtype=torch.uint8)
    yield "to_bytes", pixels_triton.plan_bytes(x, 2, frames, meta(1, dtype=torch.int32))


def check(launch: Launch, arch: int, folder: Path) -> str:
    """Compile for an architecture, assert what must hold for any kernel, and return the instructions."""
    compiled = compile_launch(launch, arch)
    assert compiled.shared <= SHARED_LIMIT[arch]
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.cubin)
    usage = subprocess.run([BIN / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(number) for number in re.findall(r"(?:REG|STACK):(\d+)", usage))
    assert stack == 0, f"{stack} bytes of a thread's registers spill"
    assert registers * launch.warps * 32 <= 65536
    code = subprocess.run([BIN / "nvdisasm", path], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"\b(?:LDL|STL)\b", code)
    return code


def arches() -> list:
    return [pytest.param(arch, marks=() if arch in FAST else pytest.mark.slow) for arch in SHARED_LIMIT]


def count(code: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", code))


def check_attention(launch: Launch, arch: int, folder: Path) -> None:
    code = check(launch, arch, folder)
    assert count(code, MATRIX.get(arch, "HMMA"))
    assert bool(count(code, "UTMALDG")) == launch.constants["TMA"], "tensor descriptors load by the copy engine"


@pytest.mark.parametrize("arch", arches())
def test_attention_of_a_2k_window(arch: int, tmp_path: Path):
    check_attention(attention(tiles(arch)[0], 128, 17600, 0), arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("tokens", "context", "dtype"),
    [
        (17600, 0, BF16),
        (18479, 0, torch.float16),
        (18479, 0, BF16),
        (10560, 7040, BF16),
        (10559, 7039, BF16),
    ],
)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_attention_in_every_tile(arch: int, tokens: int, context: int, dtype: torch.dtype, dim: int, tmp_path: Path):
    for tile in tiles(arch):
        check_attention(attention(tile, dim, tokens, context, dtype), arch, tmp_path)


@pytest.mark.parametrize(
    "name", ["residual_norm-3072", "norm_rope-3072", "norm_silu-256", "subpixel", "subpixel-fp32", "to_bytes"]
)
@pytest.mark.parametrize("arch", FAST)
def test_kernels_of_a_2k_clip(arch: int, name: str, tmp_path: Path):
    check_other(name, dict(other_kernels(arch))[name], arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_all_kernels(arch: int, tmp_path: Path):
    for name, launch in other_kernels(arch):
        check_other(name, launch, arch, tmp_path)


def check_other(name: str, launch: Launch, arch: int, folder: Path) -> None:
    code = check(launch, arch, folder)
    if name == "subpixel":
        assert count(code, MATRIX.get(arch, "HMMA"))
    elif name == "subpixel-fp32":
        assert not re.search(r"\b(?:HMMA|\w?GMMA|UTC\w*MMA)\b", code), "exact products"
    elif name != "to_bytes":  # its bytes are 12 channels apart
        assert re.search(r"\b(?:LDG|LDGSTS)\.E[.\w]*\.128\b", code), "reads 16 bytes a thread"
        assert re.search(r"\bSTG\.E[.\w]*\.128\b", code), "writes 16 bytes a thread"


def test_an_unknown_architecture_takes_the_nearest_below():
    assert tiles(103) == window_attention_triton.TILES[100]
    assert tiles(75) == window_attention_triton.TILES[80]
    assert subpixel_triton.conv_tile(121, BF16) == subpixel_triton.TILES[120]


def test_offline_types_are_those_of_a_launch():
    """Triton specialises what it is launched with; offline code must be that very code."""
    rows = torch.empty(4, 64, dtype=BF16)
    values = (
        1,
        16,
        17,
        0,
        2**40,
        1.5,
        None,
        rows,
        rows[:, 8:],
        rows[:, 1:],
        TensorDescriptor.from_tensor(rows, [1, 64]),
    )
    for value in values:
        kind, key = native_specialize_impl(CUDABackend, value, False, True, True)
        assert describe(value) == (kind, key == "D"), value


def test_offline_code_is_for_the_architecture_asked():
    compiled = compile_launch(dict(other_kernels(90))["to_bytes"], 90)
    assert ".target sm_90a" in compiled.ptx
    assert compiled.capability == 90
