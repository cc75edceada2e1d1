"""Is a bundle what it says: files whole, right machine and weights, every graph still computing what eager does."""

from collections.abc import Iterator

from ..engine.graphs import profile_graphs
from ..engine.manifest import Bundle, check_artifacts
from ..runtime.backend_fit import check_machine, check_profile, check_weights
from ..runtime.backend_registry import find_backend
from ..runtime.backend_weights import Source
from .parity import parity_error


def verify_graphs(bundle: Bundle, source: Source) -> Iterator[tuple[str, float]]:
    """Name and relative error against eager, graph by graph. Raises at the first thing that is not right.

    A bundle of some graphs only is not wrong: those that are there are looked at.
    """
    manifest = bundle.manifest
    check_machine(bundle, source.device)
    check_weights(bundle, source.record)
    check_profile(bundle, source.profile, tuple(manifest.graphs))
    check_artifacts(bundle)
    backend = find_backend(manifest.backend)
    for name, graph in profile_graphs(source.profile, manifest.dtype).items():
        if name not in manifest.graphs:
            continue
        module = source.modules[graph.weights]
        executable = backend.open_graph(graph, module, bundle.files(name), source.device)
        try:
            error = parity_error(executable, graph, module, manifest.precision, source.device)
        finally:
            executable.close()
        yield name, error
