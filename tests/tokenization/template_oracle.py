"""What a chat template should train, found apart from the package: by the words that a rendering holds and lacks.

Each text of a chat is replaced by a word of its own, which shows what stands where. Nothing of
`trl_sft.tokenization.loss_mask` or `turn_markers` is used; the tokens that end answers are known beforehand.
"""

import json
import re
from dataclasses import dataclass

WORD = "zq{}qz"  # what stands in place of the text of turn {}; thoughts and contents have words of their own


@dataclass(frozen=True)
class Verdict:
    """What is right for a chat.

    `spans`: the texts that carry loss; None = training is right for nobody (`reason`). `is_mismatch`: the generation
    prompt differs from the chat within or after the answer's own header, so that `run.allow` may accept it;
    `may_be_refused`: or a little before it, so that a refusal is right too.
    `is_unclear`: the template reads what the texts say, so that words do not show what it does.
    """

    spans: tuple[str, ...] | None
    reason: str = ""
    is_mismatch: bool = False
    may_be_refused: bool = False
    is_unclear: bool = False


def render(tokenizer, turns, tools, kwargs, prompt=False):
    """Return a chat as text; None where the template raises an error."""
    try:
        text = tokenizer.apply_chat_template(
            turns, tools=tools or None, tokenize=False, add_generation_prompt=prompt, **kwargs
        )
        # generation writes one thought, so the template's empty one is not trained before that of the row
        return text.replace("<think></think><think>", "<think>")
    except Exception:
        return None


def mark_texts(turns):
    """Return the turns with a word in place of each text, and word -> (text, turn)."""
    words, marked = {}, []
    for number, turn in enumerate(json.loads(json.dumps(turns))):
        for key in ("content", "reasoning_content", "thinking", "reasoning"):
            text = turn.get(key)
            if isinstance(text, str) and text.strip():
                # a thought that stands as text before the answer is a text of its own
                parts = re.fullmatch(r"(<think>\n)(.*)(\n</think>\n\n)(.*)", text, re.DOTALL)
                turn[key] = "".join(mark(part, number, words) for part in (parts.groups() if parts else [text]))
        marked.append(turn)
    return marked, words


def mark(text, number, words):
    """Return a text with a word in place of it, and add the word; tags of thoughts stay."""
    core = text.strip()
    if not core or core in ("<think>", "</think>"):
        return text
    word = WORD.format(len(words))
    words[word] = (core, number)
    return text[: text.index(core)] + word + text[text.index(core) + len(core) :]


def judge(tokenizer, turns, tools, *, ends, kwargs=None, answers=None):
    """Return the verdict on a chat whose answers end in one of the tokens `ends`."""
    kwargs = kwargs or {}
    text = render(tokenizer, turns, tools, kwargs)
    if text is None:
        return Verdict(None, "refused by the template")
    marked, words = mark_texts(turns)
    outline = render(tokenizer, marked, tools, kwargs)
    if outline is None or fill(outline, words)[0] != text:
        return Verdict(None, "the template reads the texts", is_unclear=True)
    numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    numbers = [number for number in numbers if answers is None or number in answers]
    if lost := find_lost(outline, turns, words, tools, numbers):
        return Verdict(None, f"lost: {lost}")
    spans, is_mismatch, may_be_refused, filled = [], False, False, fill(outline, words)[1]
    for number in numbers:
        own = own_words(words, marked[number], number)
        positions = [(outline.find(word), word) for word in own if word in outline]
        begin = min(positions)[0]
        last = max(outline.rfind(word) + len(word) for _, word in positions)
        end = find_end(outline, last, ends, limit=next_word(outline, last, words, number))
        if end is None:
            return Verdict(None, f"no end of turn {number}")
        before = max([m.end() for m in find_foreign(outline, words, number) if m.end() <= begin], default=0)
        if not all(call["function"]["name"] in outline[before:end] for call in turns[number].get("tool_calls") or []):
            return Verdict(None, f"the name of a call of turn {number} is lost")
        prompt = render(tokenizer, marked[:number], tools, kwargs, prompt=True)
        if prompt is None:
            return Verdict(None, f"no prompt before turn {number}")
        if outline.startswith(prompt):
            start = len(prompt)
        else:
            is_mismatch = True
            without = render(tokenizer, marked[:number], tools, kwargs)
            # a chat that ends with the question may end with one more token, or with a header
            alike = without is not None and outline.startswith(re.sub(r"(<[^<>]*>|\s)*$", "", without))
            may_be_refused |= alike and not outline.startswith(without.rstrip())
            squeezed = "".join(outline.split()).startswith("".join(prompt.split()))
            if not (alike or squeezed):
                return Verdict(None, f"the chat before turn {number} is not its prompt")
            start = (before, begin)
        spans.append(text[filled(start) : filled(end)] if isinstance(start, int) else (start, end, filled, text))
    return Verdict(tuple(spans), is_mismatch=is_mismatch, may_be_refused=may_be_refused)


def find_foreign(outline, words, number):
    """Return where the texts of other turns stand, as matches."""
    return [match for word, (_, owner) in words.items() if owner != number for match in re.finditer(word, outline)]


def own_words(words, turn, number):
    """Return the words that show where an answer is: of its texts and of the arguments of its calls."""
    own = [word for word, (_, owner) in words.items() if owner == number]
    for call in turn.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        own += [value for value in arguments.values() if isinstance(value, str)]
    return own


def find_lost(outline, turns, words, tools, numbers):
    """Return a text that the outline lacks; "" = none. Thoughts of answers that are not learned may be lost."""
    for word, (core, number) in words.items():
        if word not in outline and (turns[number]["role"] != "assistant" or number in numbers):
            return f"{turns[number]['role']} {core[:20]!r}"
    for number in numbers:
        for call in turns[number].get("tool_calls") or []:
            arguments = call["function"]["arguments"]
            values = (json.loads(arguments) if isinstance(arguments, str) else arguments).values()
            if not all(value in outline for value in (call["function"]["name"], *values)):
                return "a call"
    for tool in tools or []:
        if tool["function"]["description"] not in outline:
            return "a tool"
    return ""


def next_word(outline, position, words, number):
    """Return where the next text of another turn begins; the length = there is none."""
    others = [outline.find(word, position) for word, (_, owner) in words.items() if owner != number]
    return min((place for place in others if place >= 0), default=len(outline))


def find_end(outline, position, ends, limit):
    """Return where the first end token ends, with those that follow it; None = there is none."""
    pattern = "|".join(map(re.escape, ends)) or r"(?!)"
    first = re.compile(pattern).search(outline, position, limit)
    if first is None:
        return None
    end = first.end()
    while following := re.compile(rf"\s*({pattern})").match(outline, end, limit):
        end = following.end()
    return end


def fill(outline, words):
    """Return the text of an outline, and a function from a position in the outline to one in the text."""
    parts, shifts, position, shift = [], [(0, 0)], 0, 0
    if words:
        for match in re.finditer("|".join(words), outline):
            parts += [outline[position : match.start()], words[match.group()][0]]
            position = match.end()
            shift += len(words[match.group()][0]) - len(match.group())
            shifts.append((position, shift))
    parts.append(outline[position:])
    return "".join(parts), lambda place: place + [by for start, by in shifts if start <= place][-1]


def is_within(span, trained):
    """Tell whether what is trained lies between the turn before and the end that `judge` found for a mismatch."""
    (before, begin), end, filled, text = span
    whole, least = text[filled(before) : filled(end)], text[filled(begin) : filled(end)]
    return trained.endswith(least) and whole.endswith(trained)
