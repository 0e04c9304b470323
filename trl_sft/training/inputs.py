"""What a run has before its weights load, as data.

`stages` makes it, step by step; `run`, `check`, the probe and the memory estimate read it. No work is done here.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import BitsAndBytesConfig
from trl import SFTConfig

from trl_sft.data.rows import RunRows
from trl_sft.model.load import ModelSource
from trl_sft.recipe.checked import Setting
from trl_sft.recipe.yaml_reader import Key
from trl_sft.tokenization.build import TokenizedRows
from trl_sft.tokenization.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class RunSettings:
    """The live settings of a run."""

    args: SFTConfig
    quantization: BitsAndBytesConfig | None
    chosen: dict[Key, Setting]  # values that the recipe leaves open and this package sets, each with the reason


@dataclass(frozen=True)
class TrainingInputs:
    """All that SFTTrainer needs but the weights."""

    settings: RunSettings
    model: ModelSource
    chat: ChatTokenizer
    rows: RunRows
    datasets: TokenizedRows

    @property
    def args(self) -> SFTConfig:
        """The live settings of SFTTrainer."""
        return self.settings.args

    @property
    def quantization(self) -> BitsAndBytesConfig | None:
        """How bitsandbytes quantizes the weights; None = it does not."""
        return self.settings.quantization
