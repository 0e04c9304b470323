"""The win rate that would be expected if both answers of each pair were equally long.

Inputs: a preference for the tuned answer for each prompt, and by how many characters it is longer. Outputs: a
`LengthControl`. The method is the length term of AlpacaEval's (Dubois et al. 2024, arXiv 2404.04475) without its term
for difficulty: a binomial GLM of the preference on `tanh(difference / its standard deviation)`, with robust (HC1)
errors; the rate is the model's at a difference of 0. It corrects too much where longer answers are truly better, so it
stands beside the raw rate, and never alone. Not here: what follows from it (`judge_result`).
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

from trl_sft.evaluation import statistics
from trl_sft.evaluation.statistics import Interval

FAR, ONE_SIDED, FEW, SEPARATED = "far_from_raw", "never_changes_sign", "few_pairs", "separated"  # warnings
LEAST_PAIRS = 50
_FAR = 0.10  # of a rate
_WIDEST = 10.0  # standard error of the intercept in log odds; more means that the fit has no maximum
_QUANTILE = 1.959964  # of the normal distribution, for 95%


class LengthControl(NamedTuple):
    """The rate at equal length, and what speaks against it."""

    rate: Interval | None  # None = the preferences do not determine it
    slope: float | None  # of the log odds on tanh(difference / sd); above 0 = longer answers win
    warnings: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Return the result as a mapping that JSON can write."""
        rate = None if self.rate is None else statistics.describe_interval(self.rate)
        return {"win_rate": rate, "length_slope": self.slope, "warnings": list(self.warnings)}


def control_length(preferences: np.ndarray, differences: np.ndarray) -> LengthControl:
    """Return the win rate at equal length.

    Args:
        preferences: (prompts,), from 0 to 1; a tie is 0.5.
        differences: (prompts,), characters of the tuned answer less those of the base answer.

    """
    found: list[str] = []
    spread = float(differences.std())
    raw = float(preferences.mean())
    if not (differences.min() < 0 < differences.max()):
        found.append(ONE_SIDED)
    if len(preferences) < LEAST_PAIRS:
        found.append(FEW)
    if spread == 0:
        if not differences.any():  # every pair is equally long already
            return LengthControl(
                statistics.bootstrap_mean(preferences), 0.0, tuple(word for word in found if word != ONE_SIDED)
            )
        return LengthControl(None, None, (*found, SEPARATED))
    fitted = _fit(preferences, np.tanh(differences / spread))
    if fitted is None:
        return LengthControl(None, None, (*found, SEPARATED))
    intercept, error, slope = fitted
    rate = Interval(*(_expit(intercept + factor * error) for factor in (0.0, -_QUANTILE, _QUANTILE)))
    if abs(rate.value - raw) > _FAR:
        found.append(FAR)
    return LengthControl(rate, slope, tuple(found))


def _fit(preferences: np.ndarray, lengths: np.ndarray) -> tuple[float, float, float] | None:
    """Return intercept, its standard error, and slope; None where the likelihood has no maximum."""
    import statsmodels.api
    from statsmodels.tools.sm_exceptions import PerfectSeparationError

    if float(np.ptp(preferences)) == 0:
        if preferences[0] in (0.0, 1.0):  # one side wins always: no length explains less or more
            return None
        return float(np.log(preferences[0] / (1 - preferences[0]))), 0.0, 0.0
    design = np.column_stack([np.ones(len(lengths)), lengths])
    model = statsmodels.api.GLM(preferences, design, family=statsmodels.api.families.Binomial())
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of separation, which the size of the error shows too
        try:
            result = model.fit(cov_type="HC1")
        except (PerfectSeparationError, np.linalg.LinAlgError, ValueError):
            return None
    values = [float(result.params[0]), float(result.bse[0]), float(result.params[1])]
    fitted = np.asarray(result.fittedvalues)
    is_separated = float(np.abs(fitted - preferences).max()) < 1e-4
    if not all(map(np.isfinite, values)) or is_separated or values[1] > _WIDEST or not result.converged:
        return None
    return values[0], values[1], values[2]


def _expit(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))
