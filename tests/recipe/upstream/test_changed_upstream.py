"""An upstream source that is no longer written as the reader expects stops the check; it never accepts everything."""

import pytest

from trl_sft import load_recipe
from trl_sft.errors import UpstreamChanged
from trl_sft.recipe.upstream import fields, keys, nested, packages, source, types

CACHES = [
    *(source.find_statement, source.resolve, source.read_imports, source.read_listed_words, source.read_compared_words),
    *(fields.read_fields, fields.read_arguments, fields.read_popped_keywords, fields._read_entry),
    *(keys.get_fields, keys.get_source_fields, types._read_word_list),
]


@pytest.fixture
def alter(monkeypatch):
    """Return a function that replaces a piece of the source text of a module, as a new version would."""

    def clear():
        for function in CACHES:
            function.cache_clear()

    def replace(module, old, new):
        original = packages.read_text
        assert old in original(module), f"{module} is written in another way already"

        def read_text(name):
            return original(name).replace(old, new) if name == module else original(name)

        monkeypatch.setattr(packages, "read_text", read_text)
        clear()

    yield replace
    monkeypatch.undo()
    clear()


ARGUMENTS, CONFIG = "transformers.training_args", "trl.trainer.sft_config"
OPTIMIZERS, SCHEDULERS = "transformers.trainer_optimizer", "transformers.optimization"
INTEGRATIONS, TORCHRUN = "transformers.integrations.integration_utils", "torch.distributed.run"
GENERATION_CONFIG, QUANTIZATION = (
    "transformers.generation.configuration_utils",
    "transformers.utils.quantization_config",
)
NO_MEMBERS = "class OptimizerNames(ExplicitEnum):\n    pass\nclass Old(ExplicitEnum):"

# (section, key, a word) -> the module that changes, what stands there, what a new version might write instead
CHANGED_LISTS = {
    ("train", "report_to", "wandb"): (
        INTEGRATIONS,
        "INTEGRATION_TO_CALLBACK = {",
        "INTEGRATION_TO_CALLBACK = load() or {",
    ),
    ("train", "optim", "sgd"): (ARGUMENTS, "class OptimizerNames(ExplicitEnum):", NO_MEMBERS),
    ("train", "eval_strategy", "steps"): ("transformers.trainer_utils", "class IntervalStrategy(", "class Interval("),
    ("train", "packing_strategy", "bfd"): (CONFIG, '"choices": ["bfd"', '"choices": list_strategies() or ["bfd"'),
    ("train", "torch_compile_mode", "default"): ("torch._inductor", "def list_mode_options(", "def list_modes("),
    ("train", "include_num_input_tokens_seen", "all"): (ARGUMENTS, "include_num_input_tokens_seen (", "tokens_seen ("),
    ("model", "dtype", "float32"): (
        "trl.trainer.utils",
        'dtype in ["bfloat16"',
        'dtype in list_dtypes() or ["bfloat16"',
    ),
    ("model", "attn_implementation", "sdpa"): ("transformers.modeling_utils", "_global_mapping = {", "_functions = {"),
    ("quantization", "bnb_4bit_compute_dtype", "float32"): ("torch._C", ": dtype = ", ": DataType = "),
    ("launch", "numa_binding", "node"): (TORCHRUN, "[mode.value for mode in _AffinityMode]", "list_modes()"),
    (keys.GENERATION, "early_stopping", "never"): (GENERATION_CONFIG, "def validate(", "def check("),
}


@pytest.mark.parametrize("case", CHANGED_LISTS, ids=lambda case: f"{case[0]}.{case[1]}")
def test_list_of_words_that_upstream_no_longer_yields_stops_the_check(case, alter):
    section, key, value = case
    module, old, new = CHANGED_LISTS[case]
    assert types.accepts(keys.get_fields(section)[key], value)
    alter(module, old, new)
    for word in (value, "no_such_word"):
        with pytest.raises(UpstreamChanged) as caught:
            types.accepts(keys.get_fields(section)[key], word)
    package = module.partition(".")[0]
    (fault,) = caught.value.faults
    assert fault.where == f"{package} {packages.get_version(package)}, {module.replace('.', '/')}.py"
    assert fault.fix.startswith(f"Install a version of {package} that trl_sft was tested with")


CHANGED_OWNERS = {
    "train": (CONFIG, "class SFTConfig(", "class FineTuningConfig("),
    "lora": ("peft.tuners.lora.config", "class LoraConfig(", "class LowRankConfig("),
    "quantization": (QUANTIZATION, "class BitsAndBytesConfig(", "class Quantization("),
    "launch": (TORCHRUN, "def get_args_parser(", "def make_parser("),
    keys.SOURCE: ("datasets.load", "def load_dataset(", "def load("),
    keys.GENERATION: (GENERATION_CONFIG, "class GenerationConfig(", "class Generation("),
}


@pytest.mark.parametrize("section", CHANGED_OWNERS)
def test_owner_that_is_gone_stops_the_check(section, alter):
    assert keys.get_fields(section)
    alter(*CHANGED_OWNERS[section])
    with pytest.raises(UpstreamChanged, match="is no longer in this file"):
        keys.get_fields(section)


def test_owner_that_declares_no_key_stops_the_check(alter):
    alter(GENERATION_CONFIG, "kwargs.pop(", "options.pop(")
    with pytest.raises(UpstreamChanged, match=r"`GenerationConfig.__init__` no longer declares any key"):
        keys.get_fields(keys.GENERATION)


GROKADAMW, SGD = {"optim": "grokadamw"}, {"optim": "sgd"}
CHANGED_CODE = [
    ("optim_args", SGD, OPTIMIZERS, "key in ctx.optim_args", "key in context.optim_args.items()"),
    ("optim_args", GROKADAMW, OPTIMIZERS, 'ctx.optim_args.get("lamb"', 'ctx.optim_args.read("lamb"'),
    ("optim_args", SGD, OPTIMIZERS, "if key in ctx.optim_args:", "for key in ctx.optim_args:"),
    ("optim_args", SGD, OPTIMIZERS, "_OPTIMIZER_HANDLERS:", "_HANDLERS:"),
    ("optim_args", SGD, OPTIMIZERS, "def _get_sgd(", "def _make_sgd("),
    ("optim_args", SGD, OPTIMIZERS, "OptimizerNames.SGD: ", "OptimizerNames.SGD_NESTEROV: "),
    ("optim_args", {}, ARGUMENTS, "default_optim =", "first_optim ="),
    ("lr_scheduler_kwargs", {}, SCHEDULERS, "TYPE_TO_SCHEDULER_FUNCTION =", "SCHEDULERS ="),
    ("lr_scheduler_kwargs", {}, SCHEDULERS, "def get_scheduler(", "def make_scheduler("),
    ("lr_scheduler_kwargs", {}, SCHEDULERS, "def get_linear_schedule_with_warmup(", "def get_linear("),
    ("gradient_checkpointing_kwargs", {}, "transformers.trainer", "gc_kwargs.pop(", "options.pop("),
    ("accelerator_config", {}, "transformers.trainer_pt_utils", "class AcceleratorConfig", "class AcceleratorSettings"),
]


@pytest.mark.parametrize("case", CHANGED_CODE, ids=lambda case: f"{case[0]} {case[3]}")
def test_code_that_takes_the_keys_of_a_mapping_and_is_new_stops_the_check(case, alter):
    name, siblings, module, old, new = case
    assert nested.get_nested_fields("train", name, siblings) is not None
    alter(module, old, new)
    with pytest.raises(UpstreamChanged) as caught:
        nested.get_nested_fields("train", name, siblings)
    assert module.replace(".", "/") in str(caught.value)


def test_recipe_is_refused_with_the_upstream_file_and_what_to_install(alter, here):
    recipe = "model: {name_or_path: trl_sft:tiny}\ndata: {train: trl_sft:skills}\ntrain: {report_to: wandb}\n"
    (here / "r.yaml").write_text(recipe)
    alter(INTEGRATIONS, "INTEGRATION_TO_CALLBACK = {", "INTEGRATIONS = {")
    with pytest.raises(
        UpstreamChanged, match="the words of the key `report_to` are no longer in `INTEGRATION_TO_CALLBACK`"
    ):
        load_recipe("r.yaml")
