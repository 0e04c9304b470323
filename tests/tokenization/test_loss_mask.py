"""Which tokens carry loss, token by token, for every layout, wording and loss_on of this version."""

import pytest
from conftest import jsonl

from trl_sft import load_recipe
from trl_sft.tokenization import encode, loss_mask
from trl_sft.training import stages
from trl_sft.training.stages import build_trainer

TURNS = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "good night")]
MESSAGES = [{"role": role, "content": words} for role, words in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": words} for role, words in TURNS]
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def chat(*turns):
    return "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in turns)


ANSWER = "<|im_start|>assistant\n"
# name -> row, keywords of the source, loss_on; the whole text; the trained parts
CASES = {
    "question_answer": (
        *({"question": "q", "answer": "a"}, "", None),
        *(chat(("user", "q"), ("assistant", "a")), ["a<|im_end|>"]),
    ),
    "question_answer_all": (
        *({"question": "q", "answer": "a"}, "", "all"),
        *(chat(("user", "q"), ("assistant", "a")), [chat(("user", "q"), ("assistant", "a"))]),
    ),
    "question_answer_worded": (
        *({"question": "q", "answer": "a"}, ", wording: question_answer", None),
        *("### Question: q\n### Answer: a<|im_end|>", [" a<|im_end|>"]),
    ),
    "alpaca": (
        *({"instruction": "add", "input": "1 2", "output": "3"}, "", None),
        *(chat(("user", "add\n\n1 2"), ("assistant", "3")), ["3<|im_end|>"]),
    ),
    "alpaca_without_input": (
        *({"instruction": "add", "input": "", "output": "3"}, "", None),
        *(chat(("user", "add"), ("assistant", "3")), ["3<|im_end|>"]),
    ),
    "alpaca_worded": (
        *({"instruction": "add", "input": "1 2", "output": "3"}, ", wording: alpaca", None),
        *(ALPACA + "3<|im_end|>", ["3<|im_end|>"]),
    ),
    "prompt_completion": (
        *({"prompt": "q", "completion": "a"}, "", None),
        *(chat(("user", "q"), ("assistant", "a")), ["a<|im_end|>"]),
    ),
    "prompt_completion_messages": (
        *({"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}, "", None),
        *(chat(*TURNS), ["good night<|im_end|>"]),
    ),
    "messages": (
        *({"messages": MESSAGES}, "", None),
        *(chat(*TURNS), ["hello<|im_end|>", "good night<|im_end|>"]),
    ),
    "messages_last_turn": ({"messages": MESSAGES}, "", "last_turn", chat(*TURNS), ["good night<|im_end|>"]),
    "messages_all": ({"messages": MESSAGES}, "", "all", chat(*TURNS), [chat(*TURNS)]),
    "sharegpt": (
        *({"conversations": SHAREGPT}, "", None),
        *(chat(*TURNS), ["hello<|im_end|>", "good night<|im_end|>"]),
    ),
    "conversation": (
        *({"history": [["hi", "hello"]], "human": "bye", "assistant": "good night"}, "", "last_turn"),
        *(chat(*TURNS), ["good night<|im_end|>"]),
    ),
    "conversation_worded": (
        *({"history": [["hi", "hello"]], "human": "bye", "assistant": "good night"}, ", wording: conversation", None),
        *("### Human: hi\n### Assistant: hello\n### Human: bye\n### Assistant: good night<|im_end|>",),
        [" good night<|im_end|>"],
    ),
    "task_worded": (
        *({"task": "summary", "input": "long", "output": "short"}, ", wording: task", None),
        *("### Text:\nlong\n\n### Summary:\nshort<|im_end|>", ["short<|im_end|>"]),
    ),
    "task_of_the_source": (
        *({"input": "long", "output": "short"}, ", format: task, task: translation", None),
        *(chat(("user", "Translate the text.\n\nlong"), ("assistant", "short")), ["short<|im_end|>"]),
    ),
    "chain_of_thought_worded": (
        *({"problem": "2+2", "reasoning": "so", "answer": "4"}, ", wording: chain_of_thought", None),
        *("### Problem:\n2+2\n\n### Reasoning:\nso\n\n### Answer:\n4<|im_end|>", ["so\n\n### Answer:\n4<|im_end|>"]),
    ),
    "chinese": (
        *({"instruction": "加", "input": "", "output": "三"}, ", wording: chinese", None),
        *(
            "以下是一个描述任务的指令，请写一个完成该指令的适当回复。\n\n### 指令:\n加\n\n### 回复:三<|im_end|>",
            ["三<|im_end|>"],
        ),
    ),
    "basic": (
        *({"instruction": "add", "input": "1 2", "output": "3"}, ", wording: basic", None),
        *("### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>", ["3<|im_end|>"]),
    ),
    "vicuna": (
        *({"messages": MESSAGES[2:]}, ", wording: vicuna", None),
        *(VICUNA + "USER: bye ASSISTANT: good night<|im_end|>", [" good night<|im_end|>"]),
    ),
    "vicuna_of_several_turns": (
        *({"messages": MESSAGES}, ", wording: vicuna", None),
        *(VICUNA + "USER: hi ASSISTANT: hello<|im_end|>USER: bye ASSISTANT: good night<|im_end|>",),
        [" good night<|im_end|>"],
    ),
    "text": ({"text": "once upon"}, "", None, "once upon<|im_end|>", ["once upon<|im_end|>"]),
    "own_wording": (
        *({"a": "1", "b": "2"}, ", wording: {prompt: 'Q {a} {{x}}:', completion: ' {b}'}", None),
        *("Q 1 {x}: 2<|im_end|>", [" 2<|im_end|>"]),
    ),
    "own_text": ({"a": "1"}, ", wording: {text: 'see {a}'}", None, "see 1<|im_end|>", ["see 1<|im_end|>"]),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_falls_on_exactly_these_tokens(name, here):
    row, keywords, loss_on, whole, trained = CASES[name]
    jsonl(here / "r.jsonl", [row, row])
    (here / "recipe.yaml").write_text(
        f"model: {{name_or_path: trl_sft:tiny}}\ndata: {{train: {{path: r.jsonl{keywords}}}}}\n"
        "train: {output_dir: out}\n"
    )
    run = load_recipe("recipe.yaml", [f"data.loss_on={loss_on}"] if loss_on else [])
    ready = stages.prepare(run)
    prepared = build_trainer(run, ready).train_dataset
    tokenizer = ready.chat.tokenizer
    for example in prepared:
        assert example["input_ids"] == tokenizer(whole)["input_ids"]
        runs, last = [], None
        for i, (token, label) in enumerate(zip(example["input_ids"], example["labels"], strict=True)):
            assert label in (-100, token)
            if label != -100:
                runs = [*runs, [token]] if last != i - 1 else [*runs[:-1], [*runs[-1], token]]
                last = i
        assert [tokenizer.decode(ids) for ids in runs] == trained


def test_loss_on_every_answer_needs_no_marks_in_the_template(here, go):
    import json
    import shutil

    from trl_sft.recipe import paths

    shutil.copytree(paths.EMBEDDED / "tiny", here / "m")
    plain = (here / "m" / "chat_template.jinja").read_text().replace("{%- generation %}", "{%- if true %}")
    (here / "m" / "chat_template.jinja").write_text(plain.replace("{%- endgeneration %}", "{%- endif %}"))
    jsonl(here / "r.jsonl", [{"messages": MESSAGES}] * 4)
    (here / "recipe.yaml").write_text(
        "model: {name_or_path: ./m}\ndata: {train: r.jsonl}\ntrain: {output_dir: out, max_steps: 1}\n"
    )
    ready = stages.prepare(load_recipe("recipe.yaml"))
    labels = [label for label in ready.datasets.train[0]["labels"] if label != -100]
    assert ready.chat.tokenizer.decode(labels) == "hello<|im_end|>good night<|im_end|>"
    assert go(None)[0] == 0
    assert json.loads((here / "out" / "run.json").read_text())["outcome"] == "done"


def test_base_model_without_template_gets_the_layouts_own_wording(here, go):
    import shutil

    from trl_sft.recipe import paths

    shutil.copytree(paths.EMBEDDED / "tiny", here / "m")
    (here / "m" / "chat_template.jinja").unlink()
    text = "model: {name_or_path: ./m}\ndata: {train: rows.jsonl}\n"
    code, out, _ = go(text, command=["check"])
    assert code == 0
    assert "format question_answer, wording question_answer" in out
    jsonl(here / "r.jsonl", [{"messages": MESSAGES}])
    code, _, err = go(text, "data.train=r.jsonl")
    assert code == 2
    assert "the tokenizer of ./m has no chat template" in err


def odd(monkeypatch, here, rows, number):
    """Write rows of which the search places one wrongly; return the recipe."""
    search = loss_mask.find_spans_by_search

    def wrong(template, text, turns):
        spans = search(template, text, turns)
        return [(start + 1, end) for start, end in spans] if "ODD" in text else spans

    monkeypatch.setattr(loss_mask, "find_spans_by_search", wrong)
    words = [f"word {n}" + " ODD" * (n == number) for n in range(rows)]
    jsonl(here / "r.jsonl", [{"messages": [*MESSAGES[:1], MESSAGES[1] | {"content": one}]} for one in words])
    (here / "recipe.yaml").write_text(
        "model: {name_or_path: trl_sft:tiny}\ndata: {train: r.jsonl, drop_leaked: false}\ntrain: {output_dir: out}\n"
    )
    return load_recipe("recipe.yaml")


def trained(ready, number):
    return ready.chat.tokenizer.decode([label for label in ready.datasets.train[number]["labels"] if label != -100])


def test_search_that_errs_where_every_row_is_checked_is_replaced_by_rendering(here, monkeypatch):
    ready = stages.prepare(odd(monkeypatch, here, 60, 3))
    assert [trained(ready, n) for n in (2, 3, 59)] == [f"word {w}<|im_end|>" for w in ("2", "3 ODD", "59")]


def test_search_that_errs_among_rows_of_which_a_part_is_checked_stops_the_run(here, monkeypatch):
    """Rows before it were believed unchecked: nobody knows what they train."""
    monkeypatch.setattr(encode, "_CHECKED_ROWS", 4)
    monkeypatch.setattr(encode, "CHECKED_SHARE", 0.5)
    wrong = [number for number in range(4, 34) if stopped(monkeypatch, here, number)]
    assert 5 < len(wrong) < 25, "those that are checked"


def stopped(monkeypatch, here, number):
    with monkeypatch.context() as patch:
        run = odd(patch, here, 34, number)
        try:
            stages.prepare(run)
        except AssertionError as error:
            return "two ways to find the loss mask differ" in str(error)
    return False


def test_loss_on_all_refuses_a_turn_that_is_not_to_be_trained(here, go):
    jsonl(here / "r.jsonl", [{"messages": MESSAGES}, {"messages": [*MESSAGES[:3], MESSAGES[3] | {"train": False}]}])
    text = "model: {name_or_path: trl_sft:tiny}\ndata: {train: r.jsonl, loss_on: all}\n"
    code, _, err = go(text, command=["check"])
    assert code == 2
    assert "row 2" in err
    assert "turn 4 is not to be trained, but loss_on: all trains everything" in err
    assert go(text, "data.loss_on=assistant", command=["check"])[0] == 0


def test_markers_are_compared_where_only_the_last_answer_is_learned_too(here, go):
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}{{ eos_token }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    jsonl(here / "r.jsonl", [{"messages": MESSAGES}] * 2)
    (here / "end.jinja").write_text(template)
    text = "model: {name_or_path: trl_sft:tiny}\ntokenizer: {chat_template: end.jinja}\ndata: {train: r.jsonl}\n"
    for loss_on in ("assistant", "last_turn"):
        code, _, err = go(text, f"data.loss_on={loss_on}", command=["check"])
        assert code == 2
        assert "generation markers and the answers that its rendering shows differ" in err
