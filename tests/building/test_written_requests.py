"""Requests as SmolLM2-135M-Instruct wrote them: what is taken off, what ends a row, and what is no fault."""

import pytest

from trl_sft.building import templates, written_requests

LABELS = {  # as it was written -> the request
    "Problem: What to know when a child is confused?": "What to know when a child is confused?",
    "Task: Write one task for this task.": "Write one task for this task.",
    "**Question:** How do vaccines work?": "How do vaccines work?",
    "**Task 1**: Sort these words.\n\nsea, tree": "Sort these words.\n\nsea, tree",
    "Sure! Here is a question you can ask:\n\nQuestion: Why is the sky blue?": "Why is the sky blue?",
    "Here's a continuation of the conversation:\n\nAnd at night?": "And at night?",
    "Here is the new version of the message:\n\nWhere is the harbour?": "Where is the harbour?",
    "问题：天空为什么是蓝色的？": "天空为什么是蓝色的？",
    "好的，以下是一个请求：\n请把这段话改短。": "请把这段话改短。",
    # a person may begin so
    "Here is my code:\n\nfor i in range(3): print(i)": None,
    "Here is the problem: my dog eats shoes. What can I do?": None,
    "Subject: our meeting. Can you shorten this mail?": None,
    "Task force or committee, which is better?": None,
    "Question": None,
}
FAULTS = [  # family, the request, the beginning of the reason
    ("basic", "Choose another point of view than the obvious ones.", "the request repeats the prompt"),
    ("basic", "- This is number 1 on this topic: choose another point of view.", "the request repeats the prompt"),
    ("task", "Write an instruction in one or two sentences that deals with cooking.", "the request repeats the prompt"),
    (
        "chain_of_thought",
        "Name the street.\n\nHere's the solution:\n\nThe answer is 1.",
        "the request holds its answer",
    ),
    ("chain_of_thought", "A report has 3 parts.\n\nSolution:\n\nA sentence.", "the request holds its answer"),
    ("basic", "What is 2 + 2?\n**Answer:** 4", "the request holds its answer"),
    ("multi_turn", "The AI is ready to assist! Here’s a question you can ask.", "the request is written as by the"),
    (
        "multi_turn",
        "The subject:\n\nI'm a helpful AI assistant designed to answer.",
        "the request is written as by the",
    ),
    ("basic", "I'm happy to help you with your team meeting. What's the plan?", "the request is written as by the"),
    ("task", "- task: sort\n" + '- task: classification: "100-word task"\n' * 20, "the request repeats itself"),
    # what a person writes
    ("basic", "I'm happy to help my neighbour to move. What do I need?", ""),
    ("basic", "I'm an assistant at a law firm. How do I sort letters?", ""),
    ("basic", "Explain fractions in one or two sentences.", ""),
    ("basic", "Choose the correct answer: is 7 a prime number?", ""),
    ("basic", "Fill in the blank. 3 + 4 = ?\nAnswer: ____", ""),
    ("task", "Is this mail polite?\n\nDear Ms Ray, I'd be happy to help you. Best, Tom", ""),
    ("task", "Correct this solution.\n\nSolution: 2 + 2 = 5", ""),
    ("task", "Count the words.\n\nno, no, no", ""),
]


@pytest.mark.parametrize("text", LABELS)
def test_label_and_announcement_are_taken_off_and_nothing_that_a_person_writes(text):
    assert written_requests.clean_request(text) == (LABELS[text] or text)


@pytest.mark.parametrize(("family", "text", "reason"), FAULTS)
def test_request_that_no_person_would_write_is_named_and_others_are_not(family, text, reason):
    written = [
        turn.write
        for template in templates.read_templates("en", [], axes=[], faults=[])
        for turn in template.turns
        if template.family == family and turn.write
    ]
    problems = [written_requests.find_problem(text, prompt=prompt, family=family, language="en") for prompt in written]
    if reason:
        assert any(problem.startswith(reason) for problem in problems)
    else:
        assert problems == [""] * len(written)


def test_chinese_request_that_repeats_its_prompt_or_speaks_as_the_assistant_is_named():
    prompt = templates.read_templates("zh", [], axes=[], faults=[])[0].turns[0].write
    first = prompt.splitlines()[0]
    for text, reason in ((first, "repeats the prompt"), ("您好，我是您的AI助手，有什么可以帮您？", "by the assistant")):
        assert reason in written_requests.find_problem(text, prompt=prompt, family="basic", language="zh")
    assert not written_requests.find_problem("请解释彩虹是怎么形成的。", prompt=prompt, family="basic", language="zh")
