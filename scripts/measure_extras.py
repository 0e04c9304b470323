"""Print what each extra adds to an installation: distributions and MiB on disk, beside those of the core.

    python scripts/measure_extras.py

Reads the metadata of the environment that it runs in, where all extras are installed. An extra counts the
distributions that it needs and the core does not; what two extras share counts for both. Deliberately not here: what
pip downloads, which is about a third of it.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"
_MIB = 2**20
_SHARED = "eval"  # whose packages other extras have too


def list_needed(requirements: Iterable[str]) -> set[str]:
    """Return the names of the distributions that requirements need, at any depth; what is not installed is left out."""
    found: set[str] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, wanted = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": wanted}):
            continue
        try:
            inner = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        is_new = name not in found
        found.add(name)
        for option in ["", *requirement.extras] if is_new else list(requirement.extras):
            waiting += [(Requirement(text), option) for text in inner]
    return found


def measure(name: str) -> int:
    """Return the bytes of an installed distribution on disk."""
    files = importlib.metadata.files(name) or []
    paths = (Path(str(file.locate())) for file in files)
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    """Print the table."""
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    core = list_needed(project["dependencies"])
    print(f"{'core':<14}{len(core):>4} distributions {sum(map(measure, core)) / _MIB:>6.0f} MiB")
    needed = {extra: list_needed(texts) - core for extra, texts in project["optional-dependencies"].items()}
    for extra, added in needed.items():
        if not added:
            print(f"{extra:<14} not installed")
            continue
        size, rest = (sum(map(measure, names)) / _MIB for names in (added, added - needed[_SHARED]))
        largest = ", ".join(sorted(added, key=measure, reverse=True)[:4])
        beside = f"{rest:.0f} beside {_SHARED}" if extra != _SHARED and rest < size else ""
        print(f"{extra:<14}{len(added):>4} distributions {size:>6.0f} MiB  {beside:<17} {largest}")


if __name__ == "__main__":
    main()
