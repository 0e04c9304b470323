"""Times `audit` on growing sets, and counts what it finds of planted faults.

    python benchmarks/audit.py ROWS [ROWS ...]                       25,000 and 100,000 rows
    python benchmarks/audit.py ROWS [ROWS ...] --sizes 25000 1000000

ROWS are files with questions and answers, JSON or JSONL. A set of the wanted size is made of them: each row is a
copy of one of theirs with half of its words replaced by words of the whole, so that no row is a duplicate of another.
Each size is audited in a fresh process, one after the other.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_WORD = re.compile(r"\w+")
_REPLACED = 0.5  # of the words


def read_rows(paths):
    """Return the rows of files as instruction and output."""
    rows = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        records = json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
        for record in records:
            instruction = record.get("instruction") or record.get("question") or ""
            output = record.get("output") or record.get("answer") or ""
            if instruction and output:
                rows.append(
                    {"instruction": "\n".join(filter(None, (instruction, record.get("input")))), "output": output}
                )
    return rows


def write_rows(rows, size, path):
    """Write a set of `size` rows of about the words of the given ones."""
    generator = random.Random(0)
    words = [word for row in rows for text in row.values() for word in _WORD.findall(text)]

    def replace(found):
        return generator.choice(words) if generator.random() < _REPLACED else found[0]

    with path.open("w", encoding="utf-8") as file:
        for _ in range(size):
            row = generator.choice(rows)
            file.write(json.dumps({name: _WORD.sub(replace, text) for name, text in row.items()}) + "\n")


def measure(path):
    """Audit a file in a fresh process; return processor and wall seconds, the largest memory in MiB, the answer."""
    code = (
        "import json, resource, sys\n"
        "from trl_sft import cli\n"
        "code = cli.main(sys.argv[1:])\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]), file=sys.stderr)\n"
    )
    begin = time.monotonic()
    words = [sys.executable, "-c", code, "audit", str(path), "--json"]
    finished = subprocess.run(words, capture_output=True, text=True, check=True)
    wall = time.monotonic() - begin
    exit_code, processor, memory = json.loads(finished.stderr.splitlines()[-1])
    assert exit_code == 0, finished.stderr
    return processor, wall, memory, json.loads(finished.stdout)


def main():
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", default=[25_000, 100_000])
    options = parser.parse_args()
    rows = read_rows(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'rows':>10} {'processor s':>12} {'wall s':>8} {'MiB':>6} {'rows/s':>7}  findings")
        for size in options.sizes:
            path = Path(folder) / f"{size}.jsonl"
            write_rows(rows, size, path)
            processor, wall, memory, answer = measure(path)
            gates = {gate["gate"]: gate["rows"] for gate in answer["gates"] if gate["rows"]}
            print(
                f"{size:>10,} {processor:>12.1f} {wall:>8.1f} {memory:>6.0f} {size / processor:>7.0f}  {gates}",
                flush=True,
            )
            path.unlink()


if __name__ == "__main__":
    main()
