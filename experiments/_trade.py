"""The trade of steps and examples, fitted to runs over batch sizes, learning rates and seeds."""

import math
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats


class Best(NamedTuple):
    """The best learning rate of each size, between those tried; arrays (num_sizes,)."""

    log_steps: np.ndarray
    """The mean over seeds of log S there."""
    log_rate: np.ndarray
    is_edge: np.ndarray
    """Whether a learning rate next to the best one tried is missing: nothing is interpolated."""


class Fit(NamedTuple):
    """S = S_min + E_min/m fitted to log S; each with the ends of its 95 % interval."""

    least_steps: tuple[float, float, float]
    least_examples: tuple[float, float, float]
    critical: tuple[float, float, float]
    """B_crit = E_min/S_min."""


def find_best(log_steps: np.ndarray, log_rates: np.ndarray) -> Best:
    """Returns the least steps by a parabola in log η through the best rate and its neighbours.

    The minimum of a grid of a factor of √2 is up to 4 % above that between its points, where steps
    go as 1/(2x − x²), x = η/η_best, and the parabola's within 1 %; of a factor of 2 it is 12 %, and
    the upper neighbour, beyond twice the best rate, often never arrives.

    Args:
      log_steps: the mean over seeds of log S, infinite if a run did not arrive, (num_sizes,
        num_rates).
      log_rates: log η at equal distances, (num_rates,).
    """
    spacing = log_rates[1] - log_rates[0]
    found = []
    for row in log_steps:
        k = int(np.argmin(row))
        ends = row[max(k - 1, 0) : k + 2]
        if len(ends) < 3 or not np.isfinite(ends).all():
            found.append((row[k], log_rates[k], True))
            continue
        below, least, above = ends
        bend = below - 2 * least + above
        shift = (below - above) / (2 * bend) if bend > 0 else 0.0
        value = least - (below - above) ** 2 / (8 * bend) if bend > 0 else least
        found.append((value, log_rates[k] + shift * spacing, False))
    return Best(*(np.array(column) for column in zip(*found, strict=True)))


def fit_trade(sizes: np.ndarray, steps: np.ndarray, rates: np.ndarray) -> Fit:
    """Returns S_min, E_min and B_crit of S = S_min (1 + B_crit/m) with 95 % intervals.

    Least squares in log S at the best learning rate of each size, from the mean over seeds of log
    S. An interval is the wider of two: that from the residuals, by the t distribution with two
    degrees of freedom less than sizes, which knows a misfit of the law; and that from leaving out a
    seed at a time (all sizes, rates and the choice among them anew), by the t distribution with one
    degree of freedom less than seeds. Simulated with known truth, three or eight seeds that differ
    by 5 %, noise of 0 to 15 % a run: they held B_crit in 0.98 to 1.00 of data sets, where a factor
    of 2 between rates and residuals alone gave 0.58 to 0.88. The best of many noisy rates is too
    good: S_min and E_min come out low, by up to 9 % for noise of 15 %; their ratio B_crit does not.

    Args:
      sizes: m, three or more, (num_sizes,).
      steps: S, infinite if a run did not arrive, (num_seeds, num_sizes, num_rates).
      rates: η at equal ratios, (num_rates,).
    """
    log_steps, log_rates = np.log(steps), np.log(rates)
    values, covariance = _fit_law(sizes, find_best(log_steps.mean(axis=0), log_rates).log_steps)
    num_seeds = len(steps)
    leaving_out = np.array(
        [
            _fit_law(
                sizes,
                find_best(np.delete(log_steps, seed, axis=0).mean(axis=0), log_rates).log_steps,
            )[0]
            for seed in range(num_seeds if num_seeds > 1 else 0)
        ]
    )
    by_sizes = scipy.stats.t.ppf(0.975, len(sizes) - 2)
    by_seeds = scipy.stats.t.ppf(0.975, max(num_seeds - 1, 1))

    def interval(weights: np.ndarray) -> tuple[float, float, float]:
        half = by_sizes * math.sqrt(weights @ covariance @ weights)
        if len(leaving_out):
            spread = np.var(leaving_out @ weights) * (num_seeds - 1)
            half = max(half, by_seeds * math.sqrt(spread))
        middle = weights @ values
        return math.exp(middle), math.exp(middle - half), math.exp(middle + half)

    return Fit(*(interval(np.array(w)) for w in ([1.0, 0.0], [0.0, 1.0], [-1.0, 1.0])))


def _fit_law(sizes: np.ndarray, log_steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log S_min, log E_min) and their covariance from the residuals."""

    def law(m: np.ndarray, log_least: float, log_examples: float) -> np.ndarray:
        return np.logaddexp(log_least, log_examples - np.log(m))

    first = (log_steps.min(), float(np.min(log_steps + np.log(sizes))))
    values, covariance = scipy.optimize.curve_fit(law, sizes, log_steps, p0=first)
    return values, covariance


def progress_weighted(scales: np.ndarray, batch_size: int) -> float:
    """Returns the mean of a noise scale over the noiseless progress of a run.

    A step at mini-batch size m does as much as 1/(1 + B/m) steps without noise, so that
    S_min = Σ 1/(1 + B/m), E_min = Σ B/(1 + B/m), and the critical batch size of the whole run,
    E_min/S_min, is the mean of B with these weights.

    Args:
      scales: B at points equally many steps apart; those that are not finite and above 0 are left
        out.
      batch_size: m of the run.

    Source: derived here from dS = (1 + B(s)/m) ds; McCandlish, Kaplan and Amodei 2018, appendix D,
    average over training likewise.
    """
    known = scales[np.isfinite(scales) & (scales > 0)]
    if not known.size:
        return math.nan
    return float(np.average(known, weights=1 / (1 + known / batch_size)))
