"""One engine, in a process of its own: ONNX file -> strongly typed network without plugins -> engine and its layers.

`trt` is the package tensorrt (10 or 11) or tensorrt_rtx: what both have is used as it is, what one has is asked for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import EnvironmentMismatch
from ..engine.manifest import Precision, write_text
from ..engine.plain import to_plain
from ..runtime.backend_tensorrt import make_logger, require_tensorrt
from .failure import CompileError
from .tensorrt_layers import NODE, Wanted, find_faults, read_layers, read_scratch, summarise

LARGEST_HEAD = 256  # fused attention has no kernels for wider ones, nor for fp32, nor for one head of a batch of one
DTYPES = {"BF16": "bf16", "HALF": "fp16", "FLOAT": "fp32"}  # TensorRT's dtypes by ours


@dataclass(frozen=True)
class EngineJob:
    """What one process builds: `onnx` to `engine`, with the layers in `layers`; all paths.

    `precision` is what products and attention must be computed in: with fp8, those products that are quantised, and
    bf16 the others. `timing` is a file kept between builds.
    """

    package: str
    name: str
    onnx: str
    engine: str
    layers: str
    archs: tuple[str, ...]
    precision: Precision
    timing: str


def build_engine(job: EngineJob) -> None:
    """Write the engine and its layers. CompileError for what TensorRT refuses or does not compile as it should."""
    trt = require_tensorrt(job.package)
    messages: list[str] = []
    errors: list[str] = []
    logger = make_logger(
        trt, lambda severity, text: (errors if severity <= trt.ILogger.ERROR else messages).append(text)
    )
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        said = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise _refused(job, said)
    wanted = list(_prepare(trt, network))
    narrow = ("fp8", "bf16") if job.precision == "fp8" else (job.precision,)
    wide = sorted({f"{want.node} in {want.dtype}" for want in wanted if want.dtype not in narrow})
    if wide:
        raise CompileError(f"{job.name}: got {', '.join(wide[:3])} in the network, want {job.precision}; report it")
    config = _configure(trt, builder, job)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused(job, errors[0] if errors else "nothing said")
    layers = read_layers(messages)
    faults = find_faults(layers, wanted)
    if faults:
        raise CompileError(
            f"{job.name}: {faults[0]} ({len(faults)} of {len(wanted)} nodes are not as they should be); "
            f"use a version of {job.package} that is known to do it, or report it"
        )
    Path(job.engine).write_bytes(plan)
    lines = ",\n".join(json.dumps(to_plain(layer)) for layer in layers)
    head = json.dumps({"scratch": read_scratch(messages), "summary": summarise(layers)})[:-1]
    write_text(Path(job.layers), f'{head}, "layers": [\n{lines}\n]}}\n')
    _keep_timing(config, job)


def _prepare(trt: Any, network: Any) -> Iterator[Wanted]:
    """What the engine must have as one kernel. Sets attention so that TensorRT can build it."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(at).name: layer for layer in layers for at in range(layer.num_outputs)}
    for layer in layers:
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # layers come as their base class
            fused = _has_kernel(layer.get_input(0))
            layer.attention.decomposable = not fused
            kind = "attention" if fused else None
        elif layer.type == trt.LayerType.MATRIX_MULTIPLY:
            kind = "matmul"
        elif layer.type == trt.LayerType.CONVOLUTION:
            layer.__class__ = trt.IConvolutionLayer
            kind = "convolution" if len(layer.kernel_size_nd) == 3 and layer.kernel_size_nd[0] > 1 else None
        else:
            kind = None
        if kind is not None:
            narrow = kind == "matmul" and all(_was_fp8(trt, makers, layer.get_input(at)) for at in range(2))
            for node in NODE.findall(layer.metadata):
                yield Wanted(node, kind, "fp8" if narrow else DTYPES[layer.get_input(0).dtype.name])
    _unshare_queries(trt, network, layers, makers)


def _was_fp8(trt: Any, makers: Mapping[str, Any], tensor: Any) -> bool:
    """Whether a tensor is the wide form of an FP8 one, perhaps transposed."""
    maker = makers.get(tensor.name)
    while maker is not None and maker.type == trt.LayerType.SHUFFLE:
        maker = makers.get(maker.get_input(0).name)
    return maker is not None and maker.type == trt.LayerType.DEQUANTIZE and maker.get_input(0).dtype.name == "FP8"


def _unshare_queries(trt: Any, network: Any, layers: Sequence[Any], makers: Mapping[str, Any]) -> None:
    """Scale the keys alone where two attentions ask with one query, as those to the text and to image tokens do.

    The parser multiplies queries and keys by the root of the scale each. TensorRT-RTX 1.7 crashes on two attentions
    whose queries are the same product.
    """
    asked: set[str] = set()
    for layer in layers:
        if layer.type != trt.LayerType.ATTENTION_INPUT:
            continue
        scaling = makers.get(layer.get_input(0).name)
        if scaling is None or scaling.type != trt.LayerType.ELEMENTWISE:
            continue
        query, root = scaling.get_input(0), scaling.get_input(1)
        if query.name in asked:
            keys = network.add_elementwise(layer.get_input(1), root, trt.ElementWiseOperation.PROD)
            layer.set_input(0, query)
            layer.set_input(1, keys.get_output(0))
        asked.add(query.name)


def _has_kernel(query: Any) -> bool:
    """Whether fused attention has a kernel for queries [B, heads, L, D]."""
    batch, heads, _, width = query.shape
    return DTYPES[query.dtype.name] != "fp32" and width <= LARGEST_HEAD and batch * heads > 1


def _configure(trt: Any, builder: Any, job: EngineJob) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the log has no layers
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # or a CUDA graph cannot be captured from it
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = len(job.archs)
        for index, arch in enumerate(job.archs):
            member = getattr(trt.ComputeCapability, arch.upper(), None)
            if member is None or not config.set_compute_capability(member, index):
                raise EnvironmentMismatch(
                    f"arch: got {arch}, want one that {job.package} {trt.__version__} builds for; pass another --arch"
                )
    if job.timing:
        path = Path(job.timing)
        known = path.read_bytes() if path.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return config


def _keep_timing(config: Any, job: EngineJob) -> None:
    if job.timing:
        path = Path(job.timing)
        part = path.with_name(f"{path.name}.{job.name}.part")  # others may be writing theirs
        part.write_bytes(config.get_timing_cache().serialize())
        part.replace(path)


def _refused(job: EngineJob, said: str) -> CompileError:
    text = " ".join(said.split())[:400]
    return CompileError(f"{job.name}: got '{text}' from {job.package}, want an engine; report it")
