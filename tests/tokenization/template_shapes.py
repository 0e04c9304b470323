"""Chat templates of our own making, each with one habit of real ones, and the tokens that end their answers.

A shape is (template, tokens that end an answer, settings). No tokens = the template ends no answer, so that nothing
can be trained. Settings: `bos` and `eos` of the tokenizer.
"""

THOUGHT = "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + ' ' + call.function.arguments | tojson "
    "+ '</call>' }}{% endfor %}"
)
TOOLS = "{% if tools %}<|sys|>tools: {{ tools | tojson }}<|fin|>{% endif %}"


def loop(user, assistant, *, before="", tool="<|obs|>{{ m.content }}<|fin|>", system="<|sys|>{{ m.content }}<|fin|>",
         after="{% if add_generation_prompt %}<|bot|>{% endif %}"):  # fmt: skip
    """Return a template that writes each turn by its role."""
    return (
        f"{before}{{% for m in messages %}}"
        f"{{% if m.role == 'system' %}}{system}{{% elif m.role == 'user' %}}{user}"
        f"{{% elif m.role == 'tool' %}}{tool}{{% else %}}{assistant}{{% endif %}}{{% endfor %}}{after}"
    )


USER = "<|usr|>{{ m.content }}<|fin|>"
ANSWER = "<|bot|>{{ m.content }}" + CALLS + "<|fin|>"
PLAIN_ANSWER = "<|bot|>{{ m.content }}<|fin|>"
CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML_CALLS = "<|im_start|>assistant\n{{ m.content }}" + CALLS + "<|im_end|>\n"
GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# parts with names between tokens, in turns and in answers, as Kimi-K3's
NAMED_USER = "<|open|>message user<|sep|>{{ m.content }}<|close|>message<|sep|><|fin|>"
NAMED_CALLS = (
    "{% for call in m.tool_calls or [] %}<|open|>call {{ call.function.name }}<|sep|>{% for key, value in "
    "call.function.arguments.items() %}<|open|>{{ key }}<|sep|>{{ value }}<|close|>{{ key }}<|sep|>{% endfor %}"
    "<|close|>call<|sep|>{% endfor %}"
)
NAMED_ANSWER = (
    "<|open|>response<|sep|>{{ m.content or '' }}<|close|>response<|sep|>"
    + NAMED_CALLS
    + "<|close|>message<|sep|><|fin|>"
)
NAMED_TOOL = "<|open|>message tool<|sep|>{{ m.content }}<|close|>message<|sep|><|fin|>"
NAMED_SYSTEM = "<|open|>message system<|sep|>{{ m.content }}<|close|>message<|sep|><|fin|>"
NAMED_BOT = "<|open|>message assistant<|sep|>"
NAMED_TOOLS = "{% if tools %}<|open|>message tools<|sep|>{{ tools | tojson }}<|close|>message<|sep|><|fin|>{% endif %}"
LLAMA = "<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
FIN, IM_END, EOT, EOS = ("<|fin|>",), ("<|im_end|>",), ("<|eot|>",), ("</s>",)

# name -> template, tokens that end an answer, settings
SHAPES = {
    "plain": (loop(USER, ANSWER, before=TOOLS), FIN, {}),
    "chatml": (loop(CHATML, CHATML_CALLS, tool=CHATML, system=CHATML, after=GENERATE), IM_END, {}),
    "own_system_prompt": (
        loop(
            CHATML, CHATML_CALLS, tool=CHATML, system=CHATML, after=GENERATE,
            before="{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}",
        ),
        *(IM_END, {}),
    ),
    "header_always_appended": (
        "<s>" + loop(LLAMA, LLAMA, tool=LLAMA, system=LLAMA, after="<|header|>assistant<|/header|>{{ '\n\n' }}"),
        *(EOT, {"bos": "<s>"}),
    ),
    "header_always_appended_own_system_prompt": (
        loop(
            CHATML, CHATML, tool=CHATML, system=CHATML, after="<|im_start|>assistant{{ '\n' }}",
            before="{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}",
        ),
        *(IM_END, {}),
    ),
    "header_appended_after_answers": (
        loop(
            USER, PLAIN_ANSWER + "{% if loop.last %}<|usr|>{% endif %}"
        ),
        *(FIN, {}),
    ),
    "ends_nothing_appends_header": (
        loop("<|usr|>\n{{ m.content }}", "<|bot|>\n{{ m.content }}", after="<|bot|>"), *((), {}),
    ),
    "ends_nothing": (loop("<|usr|>\n{{ m.content }}", "<|bot|>\n{{ m.content }}"), (), {}),
    "header_of_the_user_ends_an_answer": (
        loop(
            "{% if loop.first or messages[loop.index0 - 1].role != 'assistant' %}<|usr|>{% endif %}\n{{ m.content }}",
            "<|bot|>\n{{ m.content }}<|usr|>",
        ),
        *(("<|usr|>",), {}),
    ),
    "header_of_the_user_follows_every_answer": (
        loop("{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n{{ m.content }}<|im_end|>\n<|im_start|>user\n",
             before="<|im_start|>user\n", after=GENERATE, tool=CHATML, system=""),
        *(IM_END, {}),
    ),
    "header_of_the_assistant_ends_the_question": (
        loop("<|usr|>{{ m.content }}<|bot|>", "{{ m.content }}<|fin|>", after=""), *(FIN, {}),
    ),
    "header_of_the_assistant_in_the_question": (
        loop(
            "<|im_start|>user\n{{ m.content }}<|im_end|>\n<|im_start|>assistant\n", "{{ m.content }}<|im_end|>\n",
            system=CHATML, tool=CHATML, after="",
        ),
        *(IM_END, {}),
    ),
    "identifiers_for_names_of_calls": (
        loop(USER, "<|bot|>{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.id }} "
             "{{ call.function.arguments | tojson }}</call>{% endfor %}<|fin|>",
             tool="<|obs|>{{ m.name }}: {{ m.content }}<|fin|>", before=TOOLS),
        *(FIN, {}),
    ),
    "drops_the_system_prompt": (loop(USER, ANSWER, system=""), FIN, {}),
    "drops_the_system_prompt_after_an_answer": (
        loop(USER, ANSWER, system="{% if messages[-1].role == 'user' %}<|sys|>{{ m.content }}<|fin|>{% endif %}"),
        *(FIN, {}),
    ),
    "system_prompt_in_the_last_question": (
        loop(
            "<|usr|>{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
            "{{ m.content }}<|fin|>",
            *(ANSWER,), system="",
        ),
        *(FIN, {}),
    ),
    "system_prompt_in_the_first_question": (
        loop(
            "<|usr|>{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
            "{{ m.content }}<|fin|>",
            *(ANSWER,), system="",
        ),
        *(FIN, {}),
    ),
    "refuses_the_system_prompt": (loop(USER, ANSWER, system="{{ raise_exception('no system') }}"), FIN, {}),
    "drops_earlier_questions": (
        loop("{% if loop.index0 + 2 >= messages | length %}<|usr|>{{ m.content }}<|fin|>{% endif %}", PLAIN_ANSWER),
        *(FIN, {}),
    ),
    "drops_tool_answers_in_history": (
        loop(USER, ANSWER, before=TOOLS, tool="{% if loop.last %}<|obs|>{{ m.content }}<|fin|>{% endif %}"), *(FIN, {}),
    ),
    "tools_in_the_last_question": (
        loop("<|usr|>{% if tools and loop.last %}{{ tools | tojson }}{% endif %}{{ m.content }}<|fin|>", ANSWER),
        *(FIN, {}),
    ),
    "arguments_as_json_text": (
        loop(USER, "<|bot|>{{ m.content }}{% for call in m.tool_calls or [] %}{{ '<|c|>' + call.function.name + '\n' + "
             "call.function.arguments + '<|/c|>' }}{% endfor %}<|fin|>", before=TOOLS),
        *(FIN, {}),
    ),
    "arguments_printed": (
        loop(USER, "<|bot|>{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} "
             "{{ call.function.arguments }}</call>{% endfor %}<|fin|>", before=TOOLS),
        *(FIN, {}),
    ),
    "arguments_one_by_one": (
        loop(USER, "<|bot|>{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}"
             "{% for k, v in call.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</call>"
             "{% endfor %}<|fin|>", before=TOOLS),
        *(FIN, {}),
    ),
    "calls_before_the_content": (loop(USER, "<|bot|>" + CALLS + "{{ m.content }}<|fin|>", before=TOOLS), FIN, {}),
    "calls_end_in_a_token_of_their_own": (
        loop(USER, "<|bot|>{{ m.content }}" + CALLS + "{{ '<|eom|>' if m.tool_calls else '<|fin|>' }}", before=TOOLS),
        *(("<|fin|>", "<|eom|>"), {}),
    ),
    "calls_have_no_end": (
        loop(USER, "<|bot|>{{ m.content }}{% if m.tool_calls %}<|calls_begin|>{% for call in m.tool_calls %}"
             "{{ call.function.name + call.function.arguments | tojson }}{% endfor %}<|calls_end|>{% else %}<|fin|>"
             "{% endif %}", before=TOOLS),
        *(FIN, {}),
    ),
    "one_call_at_once": (
        loop(USER, "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
             + ANSWER, before=TOOLS),
        *(FIN, {}),
    ),
    "tool_answers_as_json": (loop(USER, ANSWER, before=TOOLS, tool="<|obs|>{{ m.content | tojson }}<|fin|>"), FIN, {}),
    "newline_after_a_tool_that_a_turn_follows": (
        loop(USER, ANSWER, before=TOOLS, tool="<|obs|>{{ m.content }}{{ '' if loop.last else '\n' }}<|fin|>"),
        *(FIN, {}),
    ),
    "strips_thoughts_from_history": (
        loop(USER, THOUGHT + "<|bot|>{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ m.content }}"
             + CALLS + "<|fin|>", before=TOOLS),
        *(FIN, {}),
    ),
    "strips_all_thoughts": (loop(USER, "<|bot|>{{ m.content.split('</think>')[-1] }}<|fin|>"), FIN, {}),
    "writes_an_empty_thought": (loop(USER, "<|bot|><think></think>{{ m.content }}<|fin|>"), FIN, {}),
    "thoughts_before_calls_alone": (
        loop(USER, "<|bot|><think>{% if m.tool_calls %}{{ m.reasoning_content }}{% endif %}</think>{{ m.content }}"
             + CALLS + "<|fin|>", before=TOOLS),
        *(FIN, {}),
    ),
    "writes_thoughts": (
        loop(USER, THOUGHT + "<|bot|><think>{{ thought }}</think>{{ m.content }}" + CALLS + "<|fin|>", before=TOOLS),
        *(FIN, {}),
    ),
    "prompt_opens_a_thought": (
        loop(USER, PLAIN_ANSWER, after="{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"), *(FIN, {}),
    ),
    "prompt_opens_a_thought_as_the_text_does": (
        loop(USER, THOUGHT + "<|bot|><think>\n{{ thought }}\n</think>\n{{ m.content }}<|fin|>",
             after="{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"),
        *(FIN, {}),
    ),
    "prompt_closes_a_thought": (
        loop(USER, PLAIN_ANSWER, after="{% if add_generation_prompt %}<|bot|></think>{% endif %}"), *(FIN, {}),
    ),
    "last_answer_ends_in_another_token": (
        loop(
            "<|start|>user<|msg|>{{ m.content }}<|end|>",
            THOUGHT + "{% if thought and loop.last %}<|start|>assistant<|ch|>think<|msg|>{{ thought }}<|end|>"
            "{% endif %}"
            "<|start|>assistant<|ch|>final<|msg|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}",
            after="{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ),
        *(("<|return|>", "<|end|>"), {}),
    ),
    "two_end_tokens": (
        loop(
            "<|usr|>\n{{ m.content }}<|end|>\n", "<|bot|>\n{{ m.content }}<|end|>\n",
            after="{% if add_generation_prompt %}<|bot|>\n{% else %}{{ eos_token }}{% endif %}",
        ),
        *(("<|end|>", "</s>"), {"eos": "</s>"}),
    ),
    "text_begins_with_the_end_token": (
        "{{ bos_token }}" + loop("<|usr|>\n{{ m.content }}\n", "<|bot|>\n{{ m.content }}{{ eos_token }}\n",
                                 after="{% if add_generation_prompt %}<|bot|>\n{% endif %}"),
        *(EOS, {"bos": "</s>", "eos": "</s>"}),
    ),
    "inst": (
        "{{ bos_token }}" + loop("[INST] {{ m.content }} [/INST]", " {{ m.content | trim }}{{ eos_token }}", after=""),
        *(EOS, {"bos": "<s>", "eos": "</s>"}),
    ),
    "first_token_before_every_question": (
        loop("{{ bos_token }}[INST] {{ m.content }} [/INST]", " {{ m.content | trim }} {{ eos_token }}", after=""),
        *(EOS, {"bos": "<s>", "eos": "</s>"}),
    ),
    "header_of_two_tokens": (
        "<s>" + loop("<|turn|><|usr|>{{ m.content }}<|/turn|>", "<|turn|><|bot|>{{ m.content }}<|/turn|>",
                     after="{% if add_generation_prompt %}<|turn|><|bot|>{% endif %}"),
        *(("<|/turn|>",), {"bos": "<s>"}),
    ),
    "no_generation_prompt": (loop(CHATML, CHATML_CALLS, tool=CHATML, system=CHATML, after=""), IM_END, {}),
    "strips_spaces": (loop("<|usr|>{{ m.content | trim }}<|fin|>", "<|bot|>{{ m.content | trim }}<|fin|>"), FIN, {}),
    "joins_lines": (loop(USER, "<|bot|>{{ m.content | replace('\n', ' ') }}<|fin|>"), FIN, {}),
    "roles_alternate": (
        loop(
            "{% if (loop.index0 % 2 == 1) %}{{ raise_exception('roles must alternate') }}{% endif %}" + USER,
            *(PLAIN_ANSWER,), tool="{{ raise_exception('no tools') }}", system="{{ raise_exception('no system') }}",
        ),
        *(FIN, {}),
    ),
    "needs_a_question": (
        "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
        "{{ raise_exception('No user query found in messages.') }}{% endif %}" + loop(USER, ANSWER, before=TOOLS),
        *(FIN, {}),
    ),
    "words_around_turns": (
        loop("USER: {{ m.content }} ", "ASSISTANT: {{ m.content }}{{ eos_token }}", system="{{ m.content }} ",
             after="{% if add_generation_prompt %}ASSISTANT: {% endif %}"),
        *(EOS, {"eos": "</s>"}),
    ),
    "words_end_an_answer": (
        loop("USER: {{ m.content }}\n", "ASSISTANT: {{ m.content }}\n###\n",
             after="{% if add_generation_prompt %}ASSISTANT: {% endif %}"),
        *((), {}),
    ),
    "markers": (
        loop(USER, "<|bot|>{% generation %}{{ m.content }}" + CALLS + "<|fin|>{% endgeneration %}", before=TOOLS),
        *(FIN, {}),
    ),
    "named_parts": (
        loop(
            NAMED_USER, THOUGHT + NAMED_BOT + "<|open|>think<|sep|>{{ thought }}<|close|>think<|sep|>" + NAMED_ANSWER,
            before=NAMED_TOOLS, tool=NAMED_TOOL, system=NAMED_SYSTEM,
            after="{% if add_generation_prompt %}" + NAMED_BOT + "<|open|>think<|sep|>{% endif %}",
        ),
        *(FIN, {"eos": "<|eos|>"}),
    ),
    "named_parts_without_thoughts": (
        loop(
            *(NAMED_USER, NAMED_BOT + NAMED_ANSWER), before=NAMED_TOOLS, tool=NAMED_TOOL, system=NAMED_SYSTEM,
            after="{% if add_generation_prompt %}" + NAMED_BOT + "<|open|>response<|sep|>{% endif %}",
        ),
        *(FIN, {"eos": "<|eos|>"}),
    ),
    "reasoning_key": (
        loop(
            USER, "<|bot|>{% if m.reasoning is string %}<|think|>{{ m.reasoning }}<|/think|>{% endif %}"
            "{{ m.content }}" + CALLS + "<|fin|>", before=TOOLS,
        ),
        *(FIN, {}),
    ),
    "two_named_templates": (
        {"default": loop(USER, PLAIN_ANSWER), "tool_use": loop(USER, ANSWER, before=TOOLS)}, *(FIN, {}),
    ),
}  # fmt: skip
