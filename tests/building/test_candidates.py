"""A candidate row names its instruction and its answer, whatever turns it has."""

from trl_sft.building.candidates import CandidateRow


def test_instruction_is_the_first_user_turn_and_answer_the_last_assistant_turn():
    turns = [("system", "Be short."), ("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?"), ("assistant", "4")]
    row = CandidateRow("r", tuple({"role": role, "content": content} for role, content in turns))
    assert (row.instruction, row.answer) == ("Hi", "4")


def test_row_without_turns_has_neither_instruction_nor_answer():
    row = CandidateRow("r", ({"role": "user", "content": None},))
    assert (row.instruction, row.answer) == ("", "")
