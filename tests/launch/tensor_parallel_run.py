"""Runs the command line in one of several CPU processes that accelerate 1.15 would refuse to divide layers among.

`Accelerator.multi_device` knows kinds of cards alone. It also is true for CPU processes here, for the tests alone.
"""

import sys

from accelerate import Accelerator
from accelerate.utils import DistributedType

from trl_sft import cli

_is_multi_device = Accelerator.multi_device.fget


def is_multi_device(accelerator):
    return accelerator.distributed_type == DistributedType.MULTI_CPU or _is_multi_device(accelerator)


Accelerator.multi_device = property(is_multi_device)
sys.exit(cli.main(sys.argv[1:]))
