"""The same work for other programs: a recipe becomes configurations of axolotl, LLaMA-Factory and plain `trl sft`.

    python benchmarks/others.py RECIPE [FOLDER]

Reads the recipe, loads and formats its rows as a run does, and writes into FOLDER (`others` if none): the rows to
train and those held out, the tokenizer with its template, one configuration for each program and the
`dataset_info.json` of LLaMA-Factory. So what a recipe says of rows (formats, wordings, weights, what is held out)
is in the rows already. What the recipe leaves open is written too, as a run would set it: the programs' defaults
differ. Printed are the command lines, every key of the recipe that a program has no equivalent for, and what differs
all the same. `other_names` says against which versions the names were checked.

Refused, not dropped: streams, and rows with tools, calls, thoughts, or turns of their own without loss.
"""

import enum
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from other_names import BITS, PROGRAMS
from other_rules import translate

COMMANDS = {
    "axolotl": "AXOLOTL_DO_NOT_TRACK=1 axolotl train {}/axolotl.yaml --launcher python",
    "llamafactory": "llamafactory-cli train {}/llamafactory.yaml",
    "trl": "trl sft --config {}/trl.yaml",
}
DIFFERS = {
    "axolotl": (
        "rows are packed anew each epoch by axolotl's own packing, and drawn in its order",
        "where attention takes borders (flash, flex) a packed batch is one long pack of all its tokens",
        "a share of warm-up is rounded down, and one step of it becomes two",
    ),
    "llamafactory": (
        "rows are packed by its own packing, which leaves a token of each pack empty",
        "a row that is too long is cut in its question and its answer, in proportion",
        "the template is read off the tokenizer's by trial, or its own of that name; what follows an end is trained",
        "rows whose turns do not alternate are left out, with a warning",
    ),
    "trl": ("the newline that some templates write after the end of an answer is trained",),
}


class Work(NamedTuple):
    """A recipe, and what a run makes of it before the weights."""

    run: Any
    args: Any  # the live SFTConfig
    chat: Any
    rows: Any
    lora: Any  # the live LoraConfig, or None
    folder: Path
    several: bool  # whether some chat holds more than one answer
    single: bool  # whether every completion holds one

    @property
    def chats(self):
        return self.rows.row_type == "a chat"

    def value(self, key):
        """Return the value that a run takes for a key, as YAML can write it."""
        section, _, name = key.partition(".")
        owners = {"train": self.args, "lora": self.lora}
        if key in ("model.name_or_path", "data.loss_on"):
            return self.run.model_location.name if section == "model" else self.rows.loss_on
        # TRL's default for an id, ours, and those of BitsAndBytesConfig
        defaults = {"model.dtype": "float32", "data.overlong": "truncate", BITS[0]: "fp4", BITS[1]: False}
        found = getattr(owners[section], name) if section in owners else self.run.section(section).get(name)
        found = defaults.get(key) if found is None else found
        found = found.value if isinstance(found, enum.Enum) else found
        found = sorted(found) if isinstance(found, set) else found
        return "none" if key == "train.report_to" and not found else found


def load(path, folder, overrides=()):
    """Return a recipe with its tokenizer and rows; no weights are read."""
    from trl_sft import console, load_recipe

    run = load_recipe(path, overrides)
    with console.quiet():
        from trl_sft.model import load as model_load
        from trl_sft.training import stages

        settings, chat, rows = stages.read_rows(run)
    if rows.streaming:
        raise SystemExit("a streamed source is not written: take streaming out, and set max_rows")
    answers = [[0, 0]]
    if rows.row_type == "a chat":
        sides = [rows.train, *rows.eval.values()]
        answers = [[said(row["prompt"]), said(row["completion"])] for side in sides for row in side.rows]
    several, single = any(sum(pair) > 1 for pair in answers), all(last == 1 for _, last in answers)
    return Work(run, settings.args, chat, rows, model_load.make_lora_config(run), folder, several, single)


def said(turns):
    return sum(turn["role"] == "assistant" for turn in turns)


def rows_of(work, side):
    """Yield each row twice: for axolotl and LLaMA-Factory, and for TRL; in the order of training."""
    on, end = work.rows.loss_on, work.chat.tokenizer.eos_token
    extra = {"chat_template_kwargs": work.run.chat_template_kwargs} if work.run.chat_template_kwargs else {}
    for number in side.order:
        row = side.rows[int(number)]
        if not work.chats:
            both = {name: row[name] for name in ("prompt", "completion", "text") if row.get(name) is not None}
            if "text" in both:
                yield both, both
                continue
            asked, answer = both["prompt"], both["completion"] + end
            parts = [{"label": on == "all", "text": asked}, {"label": True, "text": answer}]
            yield {"segments": parts, "prompt": asked, "completion": answer}, both
            continue
        turns = row["prompt"] + row["completion"]
        strange = {key for turn in turns for key in turn} - {"role", "content"}
        if strange or row.get("tools") or row.get("untrained"):
            raise SystemExit(f"a row with {', '.join(sorted(strange)) or 'tools, or turns without loss'}: not written")
        answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
        first = {"completion": len(row["prompt"]), "last_turn": answers[-1] if answers else 0}.get(on, 0)
        marked = [turn | {"train": n >= first and (on == "all" or n in answers)} for n, turn in enumerate(turns)]
        whole = on == "all" or (on == "assistant" and work.several)
        theirs = {"messages": turns} if whole else {"prompt": turns[: answers[-1]], "completion": turns[answers[-1] :]}
        yield {"messages": marked}, theirs | extra


def write_rows(work):
    """Write `rows.jsonl` and `held_out.jsonl`, and the same for TRL; return LLaMA-Factory's description of them."""
    (work.folder / "trl").mkdir(parents=True, exist_ok=True)
    for name, theirs, sides in (("rows", "train", [work.rows.train]), ("held_out", "test", work.rows.eval.values())):
        both = [pair for side in sides for pair in rows_of(work, side)]
        for path, at in ((work.folder / f"{name}.jsonl", 0), (work.folder / "trl" / f"{theirs}.jsonl", 1)):
            lines = "".join(json.dumps(pair[at], ensure_ascii=False) + "\n" for pair in both)
            path.write_text(lines, encoding="utf-8") if both else path.unlink(missing_ok=True)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    about = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags | {"system_tag": "system"}}
    if not work.chats:
        text = work.rows.row_type == "plain text"
        about = {"columns": {"prompt": "text"} if text else {"prompt": "prompt", "response": "completion"}}
    return {name: {"file_name": f"{name}.jsonl"} | about for name in ("rows", "held_out")[: 2 if work.rows.eval else 1]}


def write(work):
    """Write everything into the folder; return what each program gets."""
    work.folder.mkdir(parents=True, exist_ok=True)
    info = write_rows(work)
    (work.folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    work.chat.tokenizer.save_pretrained(work.folder / "tokenizer")
    if work.chats:
        (work.folder / "template.jinja").write_text(work.chat.tokenizer.chat_template, encoding="utf-8")
    written = {program: translate(program, work) for program in PROGRAMS}
    for program, one in written.items():
        text = yaml.safe_dump(json.loads(json.dumps(one.config)), sort_keys=False, allow_unicode=True)
        (work.folder / f"{program}.yaml").write_text(text, encoding="utf-8")
    return written


def main(recipe, folder):
    from trl_sft.errors import UserError

    try:
        work = load(recipe, Path(folder).absolute())
    except UserError as error:
        raise SystemExit(str(error)) from None
    written = write(work)
    for program, one in written.items():
        cpu = "CUDA_VISIBLE_DEVICES= " if work.args.use_cpu and program == "axolotl" else ""
        print(f"{program}\n  {cpu}{COMMANDS[program].format(folder)}")
        print(f"  {len(one.carried)} keys carried, {len(one.left)} without equivalent")
        for key, value in one.left.items():
            print(f"    no equivalent: {key} ({value})")
        for line in DIFFERS[program]:
            print(f"    differs: {line}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("skipped: needs a recipe, python benchmarks/others.py RECIPE [FOLDER]")
    else:
        main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "others")
