"""Runs the command line in one of several CPU processes, with FSDP2 or DeepSpeed where accelerate 1.15 would not.

accelerate makes FSDP plain DDP on a CPU, and gives DeepSpeed no backend there, so that each process trains alone.
FSDP2 and DeepSpeed themselves work with gloo. Two of accelerate's constructors are wrapped here, for the
tests alone, and transformers takes bfloat16 without a GPU.
"""

import os
import sys

from accelerate import state
from accelerate.utils import DistributedType
from transformers import training_args

from trl_sft import cli
from trl_sft.training import save_trial

_make_accelerator_state, _make_partial_state = state.AcceleratorState.__init__, state.PartialState.__init__


def make_accelerator_state(self, *arguments, fsdp_plugin=None, **keywords):
    _make_accelerator_state(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = self.distributed_type
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


def make_partial_state(self, cpu=False, **keywords):
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        keywords["backend"] = "gloo"
    _make_partial_state(self, cpu=cpu, **keywords)


if os.environ.get("DS_ACCELERATOR") == "cpu":
    training_args.is_torch_bf16_gpu_available = lambda: True  # gloo and DeepSpeed compute in bfloat16 on a CPU too
if "WHOLE_BYTES" in os.environ:
    save_trial.WHOLE_BYTES = int(os.environ["WHOLE_BYTES"])
state.AcceleratorState.__init__ = make_accelerator_state
state.PartialState.__init__ = make_partial_state
if "MEMORY_FILE" in os.environ:
    import live_memory  # beside this file

exit_code = cli.main(sys.argv[1:])
if "MEMORY_FILE" in os.environ:
    live_memory.write()
sys.exit(exit_code)
