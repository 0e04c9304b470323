"""How many held-out rows a comparison of two models needs.

Deliberately not here: the tests themselves (`training.verdict`). This module imports nothing, since `init` reads it.
"""

LEAST_ROWS = 6  # with five, even if all answers became right, McNemar's exact test gives p = 2 / 2**5 > 0.05
