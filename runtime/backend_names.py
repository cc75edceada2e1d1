"""What tensors are called in compiled files."""

from ..engine.spec import GraphSpec


def output_names(spec: GraphSpec) -> list[str]:
    """The names of a graph's outputs in a file: the spec's, and `NAME_out` where an input has the name already.

    A cache goes in and comes out under one name, but in a file a name stands for one value.
    """
    taken = {tensor.name for tensor in spec.inputs}
    return [f"{tensor.name}_out" if tensor.name in taken else tensor.name for tensor in spec.outputs]
