"""Whether a step of a build fits into the memory that is free."""

from pathlib import Path

from ..engine.errors import EnvironmentMismatch

MEMORY = Path("/proc/meminfo")


def check_memory(name: str, wanted: int, file: Path = MEMORY) -> None:
    """Refuse what would need more bytes than are free, where the system says how many are."""
    free = free_memory(file)
    if free is not None and wanted > free:
        raise EnvironmentMismatch(
            f"memory for {name}: got {free / 1e9:.1f} GB free, want about {wanted / 1e9:.1f} GB; "
            "close other programs, lower --jobs, or build on a larger machine"
        )


def free_memory(file: Path = MEMORY) -> int | None:
    """Bytes that programs could still take; None where the system has no such file."""
    if not file.is_file():
        return None
    for line in file.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
