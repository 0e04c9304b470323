"""The tutorial from a CSV file to a served model does what it shows, from its first command to its last.

The commands of the page run in their order, in one folder, with the embedded model. Each block after a mark
`<!-- screen -->` is what the command before it prints; `<!-- screen: Done -->` begins at the line with that word;
`<!-- file: NAME -->` is a file that the reader makes, `<!-- result: NAME -->` one that a command makes. `pytest
--update` writes screens and results into the English page, and into the Chinese one, whose blocks are the same.
"""

import contextlib
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SHIPPED
from documents import ROOT
from packaging.version import Version
from test_examples import without_numbers

from trl_sft import cli
from trl_sft.recipe import paths

PAGE = ROOT / "docs" / "tutorials" / "csv-to-served-model.md"
CHINESE = ROOT / "docs" / "zh" / "csv-to-served-model.md"
HOME = "/shop"  # the reader's folder, as the page shows it
STEP = re.compile(
    r"(?:<!-- (?P<mark>file|result|screen)(?:: (?P<name>[^>]+?))? -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
# what only a run decides: the answers of the tuned model to questions that it has not seen
MEASURED = re.compile(r"^  (?:Can I return|Who can I call).*$", re.MULTILINE)

pytestmark = [
    pytest.mark.skipif(torch.accelerator.is_available(), reason="the screens are those of a CPU"),
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"), reason="older versions read no prompts from GGUF files"
    ),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The reader's folder, with the models of the package."""
    monkeypatch.setattr(paths, "EMBEDDED", SHIPPED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_line(line, capsys):
    """Run one command line of the page; return what it prints: first the results, then what stands on stderr."""
    words = shlex.split(line, comments=True)
    assert words[:3] == ["python", "-m", "trl_sft"], line
    capsys.readouterr()
    code = cli.main(words[3:])
    out, err = capsys.readouterr()
    screen = err if code else out
    screen = re.sub(r"[^\s`]*python\S* -m trl_sft", "python -m trl_sft", screen)
    return screen.replace(f"{SHIPPED}/tiny", "trl_sft:tiny").replace(str(Path.cwd()), HOME)


@contextlib.contextmanager
def serving():
    """Yield a function that runs `serve` and `curl` lines of the page; the server uses a free port, and ends here."""
    servers, urls = [], []

    def call(line):
        words = shlex.split(line)
        if words[0] == "curl":
            body = words[words.index("-d") + 1].encode()
            request = urllib.request.Request(urls[-1], body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = re.sub(r'"chatcmpl-\w+"', '"chatcmpl-0"', answer.read().decode())
                return re.sub(r'"created":\d+', '"created":0', text) + "\n"
        words = [sys.executable, *words[1:-1], "0"]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        servers.append(server)
        lines = []
        while not lines or not lines[-1].startswith("curl"):
            lines.append(server.stdout.readline())
            assert lines[-1], "".join(lines)
        urls.append(shlex.split(lines[-1])[1])
        port = re.search(r":(\d+)/", urls[-1])[1]
        return "".join(lines).replace(f":{port}/", ":8000/").replace(f"{SHIPPED}/tiny", "trl_sft:tiny")

    try:
        yield call
    finally:
        for server in servers:
            server.terminate()
            server.wait()
            server.stdout.close()


def play(page, folder, capsys):
    """Do what a page says, block by block; return the page with the screens and files that came out."""
    with serving() as serve:
        return play_steps(page, folder, capsys, serve)


def play_steps(page, folder, capsys, serve):
    """Do what a page says; `serve` runs the lines of the server and its clients."""
    text, parts, position, screen = page.read_text(encoding="utf-8"), [], 0, ""
    for step in STEP.finditer(text):
        new = step["text"]
        if step["mark"] == "file":
            (folder / step["name"]).write_text(new, encoding="utf-8")
        elif step["mark"] == "result":
            new = (folder / step["name"]).read_text(encoding="utf-8")
        elif step["mark"] == "screen":
            new = screen[screen.index(f"\n{step['name']}") + 1 :] if step["name"] else screen
        elif step["language"] == "sh":
            is_served = new.startswith("curl") or " serve " in new
            screen = serve(new) if is_served else "".join(run_line(line, capsys) for line in new.splitlines())
        parts += [text[position : step.start("text")], new]
        position = step.end("text")
    return "".join([*parts, text[position:]])


def blocks(text):
    """Return the fenced blocks of a page with their marks."""
    return [step[0] for step in STEP.finditer(text)]


def test_the_tutorial_shows_what_its_commands_print_in_both_languages(folder, capsys, request):
    shown, actual = PAGE.read_text(encoding="utf-8"), play(PAGE, folder, capsys)
    chinese = CHINESE.read_text(encoding="utf-8")
    if request.config.getoption("--update"):
        PAGE.write_text(actual, encoding="utf-8")
        replacements = iter(blocks(actual))
        CHINESE.write_text(STEP.sub(lambda step: next(replacements), chinese), encoding="utf-8")
        return
    assert without_numbers(MEASURED.sub("", actual)) == without_numbers(MEASURED.sub("", shown))
    assert blocks(chinese) == blocks(shown)


def test_the_tutorial_says_what_came_out():
    """Eight rows are learned by heart, and the held-out rows are not answered: the page must not promise more."""
    text = PAGE.read_text(encoding="utf-8")
    screens = "\n".join(step["text"] for step in STEP.finditer(text) if step["mark"] == "screen")
    assert "Verdict: overfitted" in screens
    assert "tuned> Two days." in screens
    assert '"content":"Two days."' in screens
    assert screens.count("    -> ") >= 6
