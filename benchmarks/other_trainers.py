"""Writes the work of a recipe for axolotl, LLaMA-Factory and plain `trl sft`.

    python benchmarks/other_trainers.py RECIPE [FOLDER]

Reads the recipe, loads and formats its rows as a run does, and writes into FOLDER (`others` by default): the training
rows and the evaluation set, the tokenizer with its template, one configuration for each trainer, and the
`dataset_info.json` of LLaMA-Factory. The rows thus carry everything that the recipe says of them (formats, wordings,
weights, the evaluation set). Keys that the recipe leaves open are written too, with the value of a run, because the
defaults of the trainers differ. Prints the commands, every key without an equivalent, and what differs all the same.
`other_trainer_keys` names the releases that the names were checked against.

Refused, not dropped: streams, and rows with tools, calls, thoughts, or turns that the row itself leaves without loss.
"""

import enum
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from other_trainer_keys import DOUBLE_QUANT, QUANT_TYPE, TRAINERS
from other_trainer_rules import translate

COMMANDS = {
    "axolotl": "AXOLOTL_DO_NOT_TRACK=1 axolotl train {}/axolotl.yaml --launcher python",
    "llamafactory": "llamafactory-cli train {}/llamafactory.yaml",
    "trl": "trl sft --config {}/trl.yaml",
}
DIFFERENCES = {
    "axolotl": (
        "axolotl packs rows anew in each epoch, in its own way and order",
        "with flash or flex attention a packed batch is one long pack of all its tokens",
        "a share of warm-up is rounded down, and one step of it becomes two",
    ),
    "llamafactory": (
        "LLaMA-Factory packs rows in its own way, which leaves one token of each pack empty",
        "a row that is too long is cut in its question and its answer, in proportion",
        "the template is guessed from the tokenizer's, or is its own of that name; what follows an end is trained",
        "rows whose turns do not alternate are skipped with a warning",
    ),
    "trl": ("the newline that some templates write after the end of an answer is trained",),
}
# values of a run where the owner has none: TRL's default for a model id, trl_sft's, and those of BitsAndBytesConfig
DEFAULTS = {"model.dtype": "float32", "data.overlong": "truncate", QUANT_TYPE: "fp4", DOUBLE_QUANT: False}


class PreparedRun(NamedTuple):
    """A recipe, and everything that a run makes of it before the weights."""

    run: Any
    args: Any  # the live SFTConfig
    chat: Any
    rows: Any
    lora: Any  # the live LoraConfig, or None
    folder: Path
    has_several_answers: bool  # some chat holds more than one answer
    has_single_completions: bool  # every completion holds exactly one answer

    @property
    def is_chat(self):
        """Whether the rows are chats."""
        return self.rows.row_type == "a chat"

    @property
    def evaluates(self):
        """Whether a trainer evaluates during training."""
        return bool(self.rows.eval) and self.args.eval_strategy != "no"

    def get_value(self, key):
        """Return the value of a key in a run, as YAML can write it."""
        section, _, name = key.partition(".")
        if key == "model.name_or_path":
            return self.run.model_location.name
        if key == "data.loss_on":
            return self.rows.loss_on
        owners = {"train": self.args, "lora": self.lora}
        value = getattr(owners[section], name) if section in owners else self.run.section(section).get(name)
        if value is None:
            value = DEFAULTS.get(key)
        if isinstance(value, enum.Enum):
            value = value.value
        if isinstance(value, set):
            value = sorted(value)
        return "none" if key == "train.report_to" and not value else value


def prepare(path, folder, overrides=()):
    """Return a recipe with its tokenizer and rows; no weights are read."""
    from trl_sft import load_recipe, upstream_warnings

    run = load_recipe(path, overrides)
    with upstream_warnings.quiet():
        from trl_sft.model import load as model_load
        from trl_sft.training import stages

        settings, _, chat, rows = stages.read_rows(run)
    if rows.streaming:
        raise SystemExit("A streamed source cannot be written. Remove `streaming` and set `max_rows`.")
    answers = [(0, 0)]  # in the prompt and in the completion of each chat
    if rows.row_type == "a chat":
        splits = [rows.train, *rows.eval.values()]
        answers = [
            (count_answers(row["prompt"]), count_answers(row["completion"])) for split in splits for row in split.rows
        ]
    return PreparedRun(
        run=run,
        args=settings.args,
        chat=chat,
        rows=rows,
        lora=model_load.make_lora_config(run),
        folder=folder,
        has_several_answers=any(prompt + completion > 1 for prompt, completion in answers),
        has_single_completions=all(completion == 1 for _, completion in answers),
    )


def count_answers(turns):
    """Return how many turns are the assistant's."""
    return sum(turn["role"] == "assistant" for turn in turns)


def convert_rows(prepared, split):
    """Yield each row of a split twice, in the order of training: for axolotl and LLaMA-Factory, and for TRL."""
    for number in split.order:
        row = split.rows[int(number)]
        yield convert_chat(prepared, row) if prepared.is_chat else convert_text(prepared, row)


def convert_text(prepared, row):
    """Return a row of one text, or of prompt and completion, in both forms."""
    trl_row = {name: row[name] for name in ("prompt", "completion", "text") if row.get(name) is not None}
    if "text" in trl_row:
        return trl_row, trl_row
    prompt, completion = trl_row["prompt"], trl_row["completion"] + prepared.chat.tokenizer.eos_token
    segments = [{"label": prepared.rows.loss_on == "all", "text": prompt}, {"label": True, "text": completion}]
    return {"segments": segments, "prompt": prompt, "completion": completion}, trl_row


def convert_chat(prepared, row):
    """Return a chat in both forms: with a loss mask for each turn, and as TRL masks it."""
    loss_on = prepared.rows.loss_on
    turns = row["prompt"] + row["completion"]
    unknown = sorted({key for turn in turns for key in turn} - {"role", "content"})
    if unknown or row.get("tools") or row.get("untrained"):
        raise SystemExit(f"A row with {', '.join(unknown) or 'tools, or turns without loss'} cannot be written.")
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    last = answers[-1] if answers else 0
    first = {"completion": len(row["prompt"]), "last_turn": last}.get(loss_on, 0)
    masked = [
        turn | {"train": number >= first and (loss_on == "all" or number in answers)}
        for number, turn in enumerate(turns)
    ]
    if loss_on == "all" or (loss_on == "assistant" and prepared.has_several_answers):
        trl_row = {"messages": turns}
    else:
        trl_row = {"prompt": turns[:last], "completion": turns[last:]}
    if prepared.run.chat_template_kwargs:
        trl_row["chat_template_kwargs"] = prepared.run.chat_template_kwargs
    return {"messages": masked}, trl_row


def write_rows(prepared):
    """Write the rows for all trainers; return LLaMA-Factory's description of them."""
    folder = prepared.folder
    (folder / "trl").mkdir(parents=True, exist_ok=True)
    splits = {("rows", "train"): [prepared.rows.train], ("held_out", "test"): list(prepared.rows.eval.values())}
    for (name, trl_name), parts in splits.items():
        pairs = [pair for split in parts for pair in convert_rows(prepared, split)]
        write_lines(folder / f"{name}.jsonl", [row for row, _ in pairs])
        write_lines(folder / "trl" / f"{trl_name}.jsonl", [trl_row for _, trl_row in pairs])
    if prepared.is_chat:
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        tags["system_tag"] = "system"
        description = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    elif prepared.rows.row_type == "plain text":
        description = {"columns": {"prompt": "text"}}
    else:
        description = {"columns": {"prompt": "prompt", "response": "completion"}}
    names = ("rows", "held_out") if prepared.rows.eval else ("rows",)
    return {name: {"file_name": f"{name}.jsonl"} | description for name in names}


def write_lines(path, rows):
    """Write rows as JSON lines; without rows, delete the file."""
    if rows:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def write(prepared):
    """Write everything into the folder; return the Translation of each trainer."""
    folder = prepared.folder
    folder.mkdir(parents=True, exist_ok=True)
    info = write_rows(prepared)
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    prepared.chat.tokenizer.save_pretrained(folder / "tokenizer")
    if prepared.is_chat:
        (folder / "template.jinja").write_text(prepared.chat.tokenizer.chat_template, encoding="utf-8")
    translations = {trainer: translate(trainer, prepared) for trainer in TRAINERS}
    for trainer, translation in translations.items():
        config = json.loads(json.dumps(translation.config))  # plain lists and mappings
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (folder / f"{trainer}.yaml").write_text(text, encoding="utf-8")
    return translations


def main(recipe, folder):
    from trl_sft.errors import UserError

    try:
        prepared = prepare(recipe, Path(folder).absolute())
    except UserError as error:
        raise SystemExit(str(error)) from None
    for trainer, translation in write(prepared).items():
        cpu = "CUDA_VISIBLE_DEVICES= " if prepared.args.use_cpu and trainer == "axolotl" else ""
        print(f"{trainer}\n  {cpu}{COMMANDS[trainer].format(folder)}")
        print(f"  {len(translation.carried)} keys carried, {len(translation.missing)} without equivalent")
        for key, value in translation.missing.items():
            print(f"    no equivalent: {key} ({value})")
        for line in DIFFERENCES[trainer]:
            print(f"    difference: {line}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("skipped: name a recipe, python benchmarks/other_trainers.py RECIPE [FOLDER]")
    else:
        main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "others")
