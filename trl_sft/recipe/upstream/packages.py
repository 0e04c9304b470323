"""The installed packages whose keys a recipe takes: their versions, their source files, and errors about them.

Inputs: names of packages and modules. Outputs: versions, files, source text, and the errors to raise.
Not here: what the source text says (`source`). Nothing is imported.
"""

from __future__ import annotations

import functools
import importlib.util
from importlib import metadata
from pathlib import Path

from trl_sft.errors import Fault, MissingPackage, UpstreamChanged

PACKAGES = ("accelerate", "datasets", "peft", "torch", "transformers", "trl")


@functools.cache
def get_version(package: str) -> str:
    """Return the installed version of a package. Raises MissingPackage."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise missing_package(package) from None


@functools.cache
def find_file(module: str) -> Path | None:
    """Return the source file of a module.

    Args:
        module: `package.module`, as an import statement names it.

    Returns:
        The file; a stub (`.pyi`) where a module is compiled; None if the module has neither, or belongs to a
        package that is not installed and that no recipe needs.

    Raises:
        MissingPackage: one of `PACKAGES` is not installed.

    """
    package, *inner = module.split(".")
    folder = _find_folder(package) if package else None
    if folder is None:
        return None
    path = folder.joinpath(*inner)
    candidates = (path.with_suffix(".py"), path / "__init__.py", path / "__init__.pyi")
    return next((file for file in candidates if file.is_file()), None)


@functools.cache
def read_text(module: str) -> str:
    """Return the source text of a module; "" if it has no source file. Raises MissingPackage."""
    file = find_file(module)
    return file.read_text(encoding="utf-8") if file else ""


@functools.cache
def _find_folder(package: str) -> Path | None:
    """Return the folder of an installed package; None if it is a single module or not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        if package in PACKAGES:
            raise missing_package(package)
        return None
    return Path(spec.submodule_search_locations[0])


def missing_package(package: str) -> MissingPackage:
    """Return the error for a package that is not installed."""
    return MissingPackage(
        Fault(
            package,
            "the package is not installed",
            "Run `pip install trl-sft` in this Python environment.",
            code="package.missing",
        )
    )


def changed_source(module: str, problem: str) -> UpstreamChanged:
    """Return the error for an installed version that no longer declares something where trl_sft reads it.

    Args:
        module: the module in which trl_sft looked.
        problem: what trl_sft did not find there. A check that finds no words must never accept every word.

    """
    package = module.partition(".")[0]
    file = module.replace(".", "/") + ".py"
    fix = (
        f"Install a version of {package} that trl_sft was tested with (constraints.txt), "
        "or report this version to the authors of trl_sft."
    )
    return UpstreamChanged(Fault(f"{package} {get_version(package)}, {file}", problem, fix, code="package.changed"))
