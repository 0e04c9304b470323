"""Counts our code that the quickstart passes before `trainer.train()`; prints it as JSON.

    python tests/training/quickstart_path.py [-v]

A line counts if its function was called on the main thread after all imports. All lines of a function count, those of
nested functions too, except docstrings, comments and blank lines (`with_docstrings` counts these as well). `-v` lists
the modules in the order of their first calls.
"""

import ast
import io
import json
import os
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trl_sft"


def count():
    """Return modules (in the order of their first calls), functions, lines and the packages as a row passes them."""
    calls, order, pairs = set(), [], set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and code.co_filename.startswith(str(PACKAGE)):
            calls.add((code.co_filename, code.co_firstlineno))
            order.append(code.co_filename)
            caller = frame.f_back.f_code.co_filename if frame.f_back else ""
            if caller.startswith(str(PACKAGE)) and caller != code.co_filename:
                pairs.add((caller, code.co_filename))

    class TrainingBegan(BaseException):
        pass

    def stop(*_, **__):
        sys.setprofile(None)
        raise TrainingBegan

    import trl

    import trl_sft
    from trl_sft.cli import check  # noqa: F401  # whatever a run imports is there before the count begins
    from trl_sft.training import run  # noqa: F401

    trl.SFTTrainer.train = stop
    os.chdir(tempfile.mkdtemp())
    sys.setprofile(note)
    try:
        trl_sft.train(trl_sft.load_recipe(ROOT / "recipes" / "quickstart.yaml", ["train.max_steps=2"]))
    except TrainingBegan:
        pass
    finally:
        sys.setprofile(None)
    lines, functions, statements, code = set(), 0, 0, set()
    for file in sorted({file for file, _ in calls}):
        text = Path(file).read_text(encoding="utf-8")
        code |= {(file, number) for number in lines_of_code(text)}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if (file, first) in calls:
                    functions += 1
                    statements += sum(isinstance(n, ast.stmt) and not is_docstring(n) for n in ast.walk(node)) - 1
                    lines |= {(file, number) for number in range(first, node.end_lineno + 1)}
    counted = {file for file, _ in lines}  # not those of which only the body of a class ran
    modules = [str(Path(file).relative_to(PACKAGE).with_suffix("")) for file in dict.fromkeys(order) if file in counted]
    each = {name: sum(1 for file, _ in lines & code if file == str(PACKAGE / f"{name}.py")) for name in modules}
    counts = {
        "modules": len(modules),
        "calls_between_modules": len(pairs),
        "functions": functions,
        "statements": statements,
        "lines": len(lines & code),
    }
    return counts | {"with_docstrings": len(lines), "each": each}


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def lines_of_code(text):
    """Return the numbers of the lines that hold something else than a docstring or a comment."""
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    numbers = {n for t in tokens if t.type not in ignored for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            numbers -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return numbers


if __name__ == "__main__":
    os.environ |= {"HF_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    counted = count()
    if "-v" not in sys.argv:
        del counted["each"]
    print(json.dumps(counted, indent=1 if "-v" in sys.argv else None))
