"""Which kernels a profile's models run with: each is measured once on the GPU at hand, and used where no slower."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..engine.errors import EnvironmentMismatch, MediaError
from ..engine.graphs import profile_graphs
from ..engine.profile import Profile
from ..engine.vae_layers import Up
from ..kernels.dispatch import Shape, device_name, installed, measure
from ..kernels.kernel_set import KernelSet, chosen, fused, shape_of
from ..kernels.kernel_table import KernelTable, choose
from ..kernels.measure_ops import Call, measure_op, recorder
from .acceleration import Acceleration, KernelChoice, can_fuse, check_acceleration
from .backend_cache import keep_folder
from .models import Loaded
from .sidecar import write_json

TABLE = "kernels.json"
Say = Callable[[str], object]


def accelerate(
    loaded: Loaded,
    kernels: KernelChoice = "auto",
    cuda_graphs: bool = False,
    cache: Path | None = None,
    say: Say = lambda _: None,
) -> Loaded:
    """The same models, to be run with the kernels that are fastest here, and with captured steps if asked for.

    auto: on a CUDA device with Triton, every kernel is measured once for a GPU, and the fused one used where it is no
    slower; elsewhere eager. fused: as auto, and refused elsewhere. The figures are kept in kernels.json beside the
    bundle, else in the folder `cache`, else nowhere. `say` hears of what is about to be measured.
    EnvironmentMismatch for what cannot be had on the models' device.
    """
    check_acceleration(kernels, cuda_graphs, loaded.device)
    if kernels == "fused" and loaded.bundle is not None and not loaded.modules:
        raise EnvironmentMismatch(
            f"fused kernels: got a bundle of {loaded.backend}, which has its own, want PyTorch's modules; "
            "leave out the bundle, or run with kernels auto"
        )
    found = Acceleration()
    if kernels != "eager" and can_fuse(loaded.device):
        folder = cache if loaded.bundle is None else keep_folder(loaded.bundle.folder)
        found = measure_kernels(loaded.profile, loaded.modules, loaded.dtype, loaded.device, folder, say)
    give_kernels(loaded.modules, found.kernels)
    return replace(loaded, acceleration=replace(found, cuda_graphs=cuda_graphs))


def measure_kernels(
    profile: Profile,
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    folder: Path | None,
    say: Say = lambda _: None,
) -> Acceleration:
    """The kernels for these modules, and for their frames' bytes. `say` hears of what is about to be measured.

    What `folder`/kernels.json does not have of this GPU is measured, seconds for an attention at 2K, and kept there.
    """
    gpu, versions = device_name(device), installed()
    calls = (*graph_calls(profile, modules, dtype), *frame_calls(profile, dtype))
    shapes = tuple(dict.fromkeys(_shape(call) for call in calls if call.op == "attend"))
    ops = [call for call in calls if call.op != "attend"]
    table = (KernelTable() if folder is None else read_table(folder / TABLE)).without_stale(gpu, versions)
    new_shapes = [shape for shape in shapes if table.attention.find(shape, gpu) is None]
    new_calls = [call for call in ops if table.find(call.op, call.text, gpu) is None]
    if new_shapes or new_calls:
        say(f"measuring {len(new_shapes)} attentions and {len(new_calls)} other kernels on {gpu}, once")
        for shape in new_shapes:
            table = replace(table, attention=table.attention.add(measure(shape, device)))
        every = fused(table.attention, gpu)
        table = table.add(*(measure_op(call, every, device) for call in new_calls))
        if folder is not None:  # another process may have measured meanwhile: its figures count for all
            there = read_table(folder / TABLE).without_stale(gpu, versions)
            table = table.add(*there.ops)
            for choice in there.attention.choices:
                table = replace(table, attention=table.attention.add(choice))
        _keep(table, folder, say)
    found = [timing for call in ops if (timing := table.find(call.op, call.text, gpu)) is not None]
    backends = tuple((shape, table.attention.backend(shape, gpu)) for shape in shapes)
    return Acceleration(chosen(table.attention, gpu, found), choose(found), backends)


def _keep(table: KernelTable, folder: Path | None, say: Say) -> None:
    """Write the table where there is a folder for it; on a read-only disk the next start measures again."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TABLE, table.lasting().to_plain())
    except (OSError, MediaError) as error:
        say(f"what was measured is not kept: {error}")


def give_kernels(modules: Mapping[str, nn.Module], kernels: KernelSet) -> None:
    """Set the kernels of every layer that runs by them, and make the weights that these want once."""
    for module in modules.values():
        for layer in module.modules():
            if isinstance(getattr(layer, "kernels", None), KernelSet):
                setattr(layer, "kernels", kernels)  # noqa: B010  (a type checker takes a module's attributes for modules)
            if isinstance(layer, Up):
                layer.fold()


def read_table(path: Path) -> KernelTable:
    """What was measured before; nothing where the file is missing or damaged: it is measured anew then."""
    try:
        return KernelTable.from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return KernelTable()


def graph_calls(profile: Profile, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> tuple[Call, ...]:
    """Every kernel call of the modules' graphs that is unlike the others, written down on the meta device.

    Not those of the graphs that make text keys: a clip calls them once, and norms a few hundred tokens there.
    """
    calls: dict[tuple[str, str], Call] = {}
    for graph in profile_graphs(profile, dtype).values():
        if graph.spec.name.endswith(("_time", "_text")) or graph.weights not in modules:
            continue
        bare = twin(modules[graph.weights], lambda tensor: tensor.to("meta"))
        give_kernels({graph.weights: bare}, recorder(calls))
        feed = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in graph.spec.inputs]
        with torch.inference_mode():
            graph.build(bare, False)(*feed)
    return tuple(calls.values())


def frame_calls(profile: Profile, dtype: torch.dtype) -> tuple[Call, ...]:
    """The calls that make bytes of a segment's pixels."""
    later = profile.noisy * profile.block_frames
    shapes = [(1, 3, frames, profile.height, profile.width) for frames in (1 + later, later)]
    return tuple(Call("to_bytes", (torch.empty(shape, dtype=dtype, device="meta"), 1)) for shape in shapes)


def twin(module: nn.Module, place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """A module of the same structure whose tensors are `place` of this one's: by default the same, not copies."""
    made: dict[int, object] = {id(buffer): place(buffer) for buffer in module.buffers()}
    for parameter in module.parameters():
        made[id(parameter)] = nn.Parameter(place(parameter.detach()), requires_grad=False)
    return copy.deepcopy(module, made)


def _shape(call: Call) -> Shape:
    """The shape of a call of attend: q, k, v and, where there is one, the context's k and v."""
    q, k, _, *context = call.arguments
    return shape_of(q, k, context[0] if context else None)
