"""Keeps `python -m trl_sft` from importing files of the current folder as modules.

`python -m` puts the current folder first on the import path: a `yaml.py` or `random.py` beside a recipe would run in
place of the real module (https://docs.python.org/3/using/cmdline.html#cmdoption-m). Input and output: `sys.path` and
`sys.modules`. This module imports only what Python itself has always imported before it. Not here: folders that
PYTHONPATH names, which the user sets, and the file of `FILE.py:FUNCTION`, which the recipe names.
"""

import os
import sys


def exclude_current_folder() -> None:
    """Remove the current folder from the import path if `python -m` put it there.

    The modules that `python -m` itself imports (`runpy` and what it needs) are imported before this package. If one of
    them came from the current folder, the process ends with exit code 2.
    """
    if sys.argv[:1] != ["-m"] or sys.flags.safe_path or not sys.path:
        return  # while `python -m` imports the package, sys.argv begins with -m
    folder = sys.path[0] or os.getcwd()  # noqa: PTH109 (pathlib is not imported yet)
    del sys.path[0]
    if folder in sys.path:
        if not _is_empty_entry_of_pythonpath(folder):
            return  # the user names it
        sys.path.remove(folder)
    foreign = [name for name, module in list(sys.modules.items()) if _lies_in(module, folder, name)]
    if not foreign:
        return
    names = ", ".join(f"{name}.py" for name in sorted(foreign))
    sys.stderr.write(
        f"trl_sft: 1 problem to fix\n\n{folder}\n    Python ran {names} of this folder in place of its own module\n"
        "    -> Rename the file, or start trl_sft from another folder.\n"
    )
    sys.exit(2)


def _is_empty_entry_of_pythonpath(folder: str) -> bool:
    """Tell whether PYTHONPATH has the current folder by an empty entry alone.

    Python reads an empty entry as the current folder. It is nearly always an accident: `PYTHONPATH=$PYTHONPATH:/lib`
    has one where the variable was not set.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return "" in entries and folder not in [os.path.abspath(entry) for entry in entries if entry]  # noqa: PTH100


def _lies_in(module: object, folder: str, name: str) -> bool:
    """Tell whether a module was read from a file or a package of the folder; this package may stand there."""
    file = getattr(module, "__file__", None)
    if not file or name.partition(".")[0] in ("trl_sft", "__main__"):
        return False
    return os.path.dirname(file) in (folder, os.path.join(folder, name))  # noqa: PTH118, PTH120
