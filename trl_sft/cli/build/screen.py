"""What a build prints: the estimate before a call, a line for each stage, and the set at the end.

Inputs: a spec, an estimate, the content of build.json. Outputs: lines, and values of the JSON answer. Not here: the
build.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from trl_sft import console, errors, json_output, run_folder
from trl_sft.building import data_card, estimate, output, spec_keys
from trl_sft.building.spec import Spec

_ADVICE = {
    "calls": "raise budget.calls and run the same command again: it continues",
    "money": "raise budget.money and run the same command again: it continues",
    "errors": "run the same command again: it continues",
}
_MOST_SHORTFALLS = 5  # that the screen names


def report(name: str, line: str) -> None:
    """Print the line of a stage."""
    console.print_lines([(name, line)])


def print_estimate(spec: Spec) -> int:
    """Print what a build will call; return the exit code."""
    estimates = estimate.estimate_calls(spec)
    calls, most = (sum(getattr(entry, name) for entry in estimates) for name in ("calls", "most_calls"))
    costs = [entry.cost for entry in estimates]
    cost = None if None in costs else sum(filter(None, costs))
    json_output.add_values(
        dry_run=True, estimates=[entry.describe() for entry in estimates], calls=calls, most_calls=most, cost=cost
    )
    for entry in estimates:
        tokens_in, tokens_out = map(console.format_count, (entry.input_tokens, entry.output_tokens))
        tokens = f"about {tokens_in} tokens in, {tokens_out} out"
        price = "" if entry.cost is None else f", {entry.cost:.2f}"
        report(entry.purpose, f"{entry.calls:,} calls, at most {entry.most_calls:,}; {tokens}{price}")
    report("calls", f"{calls:,} if every first attempt passes, at most {most:,}; failed calls are repeated beyond that")
    report("cost", _describe_cost(cost))
    budget = spec.get(spec_keys.BUDGET, "calls")
    if budget is not None and budget < calls:
        report("budget", f"{budget:,} calls: the build will stop before it is whole")
    report("output", run_folder.shorten_path(spec.folder))
    console.say("Nothing was called. The tokens are estimated: a request of 60 tokens, an answer of 300.")
    return errors.EXIT_DONE


def print_set(spec: Spec, content: Mapping[str, Any]) -> None:
    """Print what is in a set and what to type next; put it into the JSON answer."""
    json_output.add_values(output=spec.folder, **{name: value for name, value in content.items() if name != "trl_sft"})
    rejected = [f"{gate['gate']} {gate['rejected']:,}" for gate in content["gates"] if gate["rejected"]]
    report("rejected", ", ".join(rejected) or "none")
    balance = content["balance"]
    numbers = " -> ".join(f"{balance[name]['effective_cells']:.1f}" for name in ("before", "after", "final"))
    axes = ", ".join(balance["before"]["axes"])
    report("cells", f"effective number of cells of {axes}: {numbers} (passed, taken, with children)")
    for entry in content["shortfalls"][:_MOST_SHORTFALLS]:
        report("short", f"{' / '.join(entry['cell'].values())}: {entry['rows']:,} of {entry['planned']:,} planned rows")
    if more := len(content["shortfalls"][_MOST_SHORTFALLS:]):
        report("short", f"{more:,} more cells; README.md of the set lists them")
    calls = content["calls"]
    now = content["generator"]["this_process"]
    failed = f", {now['failed']:,} requests without an answer" if now["failed"] else ""
    report("calls", f"{calls['all']:,} in all, {now['made']:,} of the generator now{failed}")
    if content["partial"]:
        report("PARTIAL", f"{data_card.explain_stop(content['stop'])}; {_ADVICE[content['stop']]}")
    folder = run_folder.shorten_path(spec.folder)
    for name, file in content["files"].items():
        report("wrote", f"{folder}/{name}: {console.format_rows(file['rows'])}")
    report("card", f"{folder}/{output.CARD}; all counts in {output.BUILD}, rejected rows in {output.REJECTS}")
    python = console.get_python_command()
    if "recipe" in content:
        command = f"{python} -m trl_sft {shlex.quote(f'{folder}/{output.RECIPE}')}"
    else:
        train = next(iter(content["files"]), "")
        command = f"{python} -m trl_sft init MODEL {shlex.quote(f'{folder}/{train}')}"
    if content["files"]:
        console.say(f"Next: {command}")


def _describe_cost(cost: float | None) -> str:
    """Return the price in words."""
    if cost is None:
        return "not known: write input_price and output_price of the model"
    return f"about {cost:.2f}, in the currency of the prices"
