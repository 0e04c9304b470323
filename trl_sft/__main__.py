"""`python -m trl_sft`."""

import sys

from trl_sft.cli import main

sys.exit(main())
