"""`python -m trl_sft RECIPE`: trains. Without a word it shows the help of all commands.

Inputs: a recipe and overrides. Outputs: the run's folder, and the exit code. Not here: the run (`training.run`).
"""

from __future__ import annotations

from collections.abc import Sequence

from trl_sft import __version__, console, errors, json_output, ranks
from trl_sft.cli import arguments

_DESCRIPTION = "Fine-tune a language model: one YAML recipe becomes a run of TRL's SFTTrainer."
_EPILOG = """\
commands (a first word that is not a command is a recipe):
  python -m trl_sft RECIPE [section.key=value ...]           train
  python -m trl_sft check RECIPE [--on MACHINE] [--fast] [--probe]
                                                             find every problem before the weights load
  python -m trl_sft launch RECIPE [--processes N]            train with several processes, on one host or several
  python -m trl_sft preview RECIPE [--rows N] [--html FILE]  show rows as the model sees them
  python -m trl_sft prepare RECIPE [section.key=value ...]   tokenize the rows ahead of time
  python -m trl_sft chat RUN [--against base] [--at STEP]    talk to the tuned model, beside its base
  python -m trl_sft evaluate RUN_OR_RECIPE                   compare base and tuned model, with intervals and tests
  python -m trl_sft build SPEC [--dry-run]                   build an instruction set by a model, with gates and a card
  python -m trl_sft bisect RUN CHECK                         find the checkpoint at which a check turns, and its rows
  python -m trl_sft suspects RUN [--fix FILE]                say which training rows hurt, after reruns without them
  python -m trl_sft audit DATA [-o PAGE] [--fix FILE]        say what is in a set of rows, and write a cleaned one
  python -m trl_sft explain KEY [RECIPE]                     explain a key; show its value in a recipe
  python -m trl_sft explain RECIPE [section.key=value ...]   show every value of a run and who set it
  python -m trl_sft fix RECIPE [-o FILE | --write] [--fast]  correct what is certain; list what is left to decide
  python -m trl_sft schema [-o FILE]                         write the JSON Schema of a recipe, for editors
  python -m trl_sft init MODEL DATA [-o RECIPE]              write a recipe for a model and a file of rows
  python -m trl_sft import TOOL FILE [-o RECIPE]             convert another trainer's settings to a recipe
  python -m trl_sft merge RUN -o DIR                         merge the adapter of a run into its base model, with proof
  python -m trl_sft export RUN --to gguf,ollama,vllm         write the model for other programs, with proof
  python -m trl_sft serve RUN [--host HOST] [--port PORT]    serve the tuned model at an OpenAI-compatible endpoint
  python -m trl_sft report RUN [RUN ...] [-o FILE]           write an HTML page about a run, or compare runs
  python -m trl_sft judge RUN -o PAGE                        write a page on which people judge the answers, blind
  python -m trl_sft judge RUN --model NAME [--endpoint URL]  let another model judge the answers, in both orders
  python -m trl_sft votes KEY VOTES [VOTES ...]              read their votes: win rate, agreement, checks of raters
  python -m trl_sft runs [FOLDER]                            list the runs below a folder

`python -m trl_sft COMMAND --help` shows the arguments of a command. With --json every command answers with one JSON
object. Overrides are checked as strictly as the recipe: train.max_steps=10, lora='{r: 8}', lora=null

exit codes: 0 done, 1 an internal error, 2 a problem that you can fix, 3 the training failed (a loss that is not
  finite), 4 out of memory, 75 the time limit (run.max_hours), 129 / 130 / 138 / 143 stopped by SIGHUP / SIGINT /
  SIGUSR1 / SIGTERM. After 75 and those of signals the same command continues from the checkpoint."""


def main(argv: Sequence[str]) -> int:
    """Train; return the exit code."""
    usage, example = "RECIPE [section.key=value ...]", "recipe.yaml train.max_steps=10"
    parser = arguments.create_parser(usage, _DESCRIPTION, example=example, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"trl_sft {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show every logged value")
    if not argv:
        parser.print_help()
        return errors.EXIT_DONE
    run, options = arguments.parse_recipe(parser, argv)
    if ranks.count() == 1:
        from trl_sft.launch import plan

        if plan.needs_processes(run):
            from trl_sft.cli import launch

            return launch.start(run, options)
    from trl_sft import train

    console.set_verbose(options.verbose)
    console.say(f"trl_sft {__version__}   {run.recipe.path.name} -> {run.output_dir}")
    console.say("loading   torch, transformers and trl")
    result = train(run)
    json_output.add_values(output_dir=result.output_dir, steps=result.steps, metrics=result.metrics)
    if result.pushed:
        json_output.add_values(pushed=result.pushed)
    return errors.EXIT_DONE
