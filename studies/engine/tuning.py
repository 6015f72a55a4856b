"""Equal tuning for every arm: the same sampler, the same number of trials, the same learning rates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from studies.engine.runner import Run
    from studies.engine.sweep import Found

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Bounds of a hyper-parameter, in the logarithm."""

    low: float
    high: float


def trials(space: Mapping[str, Range], count: int, seed: int = 0) -> list[dict[str, float]]:
    """``count`` points of ``space`` by optuna's scrambled Halton sequence.

    A point does not depend on what others gave, so that all trials run at once; and the values of the first name are
    the same whatever follows it, so that arms with another hyper-parameter are tuned over the same learning rates.

    Args:
        space: Each name's range; ``lr`` first.
        count: Trials.
        seed: Of the scrambling.

    Example:
        >>> points = trials({"lr": Range(1e-4, 1e-1)}, 3)
        >>> [f"{point['lr']:.1e}" for point in points]
        ['4.4e-03', '2.0e-04', '6.3e-03']
        >>> [point["lr"] for point in trials({"lr": Range(1e-4, 1e-1), "clip": Range(1, 100)}, 3)] == [
        ...     point["lr"] for point in points
        ... ]
        True
    """
    import optuna
    from optuna.distributions import FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(
            qmc_type="halton",
            scramble=True,
            seed=seed,
            warn_independent_sampling=False,
            warn_asynchronous_seeding=False,
        )
    study = optuna.create_study(sampler=sampler)
    distributions = {name: FloatDistribution(bound.low, bound.high, log=True) for name, bound in space.items()}
    points = []
    for _ in range(count):
        trial = study.ask(distributions)  # type: ignore[arg-type]
        points.append(dict(trial.params))
        study.tell(trial, 0.0)
    return points


def best_of(candidates: Sequence[T], rows: Sequence[Mapping[str, Any] | None]) -> T | None:
    """The candidate with the smallest mean ``final``; None before all are finished, or where there is none.

    Args:
        candidates: What was tried.
        rows: Of each candidate in turn its runs, as many for each; None for one that is not finished.

    Example:
        >>> best_of((0.1, 0.2), [{"final": 3.0}, {"final": 5.0}, {"final": 1.0}, {"final": 4.0}])
        0.2
        >>> best_of((0.1, 0.2), [{"final": 3.0}, None]) is None
        True
    """
    finals = [row["final"] for row in rows if row is not None]
    if not rows or len(finals) < len(rows):
        return None
    return candidates[int(np.array(finals).reshape(len(candidates), -1).mean(axis=1).argmin())]


@dataclass(frozen=True)
class Search:
    """The search for a method's learning rate: a grid, then the two rates beside its best, a factor of root two away.

    Fixed batches whose best rates lie between those of a coarse grid would look worse than they are, and an arm whose
    rate follows its batch takes rates off any grid: so every method gets the finer ones.

    Attributes:
        rates: The grid, ascending where it climbs.
        runs: Those of a rate, one a seed.
        refined: Whether the two beside the best are tried.
        climbs: Whether the grid goes on, a factor of two at a time, while its best is at one of its ends.
    """

    rates: tuple[float, ...]
    runs: Callable[[float], list[Run]]
    refined: bool = True
    climbs: bool = False

    def grid(self, found: Found) -> tuple[float, ...]:
        """Its rates, as far as it has climbed."""
        rates = self.rates
        while self.climbs and (best := self._best(rates, found)) in (rates[0], rates[-1]):
            rates = (beside(best, 2.0)[0], *rates) if best == rates[0] else (*rates, beside(best, 2.0)[1])
        return rates

    def candidates(self, found: Found) -> tuple[float, ...]:
        """All rates that can be named by now; one of the grid, but for its third digit, is no other."""
        grid, best = self.grid(found), self.first(found) if self.refined else None
        finer = () if best is None else beside(best)
        return (*grid, *(lr for lr in finer if not np.isclose(lr, grid, rtol=0.01).any()))

    def planned(self, found: Found) -> list[Run]:
        """Their runs."""
        return [run for lr in self.candidates(found) for run in self.runs(lr)]

    def first(self, found: Found) -> float | None:
        """The best of the grid; None before all of it is finished."""
        return self._best(self.grid(found), found)

    def best(self, found: Found) -> float | None:
        """The best of all; None before all are finished."""
        return None if self.first(found) is None else self._best(self.candidates(found), found)

    def means(self, found: Found) -> dict[float, float]:
        """The mean ``final`` of every rate, in the order in which they are tried; all of them finished."""
        return {lr: float(np.mean([found[run]["final"] for run in self.runs(lr)])) for lr in self.candidates(found)}

    def _best(self, rates: tuple[float, ...], found: Found) -> float | None:
        return best_of(rates, [found.get(run) for lr in rates for run in self.runs(lr)])


def planned(searches: Iterable[Mapping[float, Search]], found: Found) -> Iterator[Run]:
    """The runs of several methods' searches, of each by what tells them apart, as in :func:`together`."""
    return (run for own in searches for search in own.values() for run in search.planned(found))


def together(searches: Mapping[float, Search], found: Found) -> dict[tuple[float, float], float]:
    """The mean ``final`` by rate and by what tells the searches apart, best first; empty before all are finished."""
    if any(search.best(found) is None for search in searches.values()):
        return {}
    means = {(lr, key): mean for key, search in searches.items() for lr, mean in search.means(found).items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def carried(
    best: tuple[float, float],
    search: Callable[[float, tuple[float, ...]], Search],
    shares: Sequence[float],
    found: Found,
) -> dict[float, Search]:
    """From what is best elsewhere: rates around it, then shorter and longer warm-ups while they are better.

    What is best as a share of one budget, or of one task, is not of another: at the best share the rates beside are
    tried once more.

    Args:
        best: Rate and share elsewhere.
        search: For the rate at a share, over a grid.
        shares: That there are to choose.
        found: What is finished.

    Returns:
        The searches that can be named by now, by share.
    """
    lr, share = best
    low, high = beside(lr)
    searches = {share: replace(search(share, (low, lr, high)), climbs=True)}
    rate, means = searches[share].best(found), together(searches, found)
    if rate is None:
        return searches
    for side in (sorted((s for s in shares if s < share), reverse=True), sorted(s for s in shares if s > share)):
        nearest = means[rate, share]
        for each in side:
            searches[each] = replace(search(each, (rate,)), refined=False)
            one = together({each: searches[each]}, found)
            # Not finished, or no better.
            if not one or one[rate, each] > nearest:
                break
            means, nearest = means | one, one[rate, each]
    if together(searches, found):
        _, chosen = min(means, key=means.__getitem__)
        if chosen != share:
            searches[chosen] = replace(search(chosen, (rate, *beside(rate))), refined=False)
    return searches


def beside(rate: float, factor: float = math.sqrt(2)) -> tuple[float, float]:
    """The two rates that factor away, root two unless told, to three digits.

    Example:
        >>> beside(8e-3), beside(2e-2, 2.0)
        ((0.00566, 0.0113), (0.01, 0.04))
    """
    return float(f"{rate / factor:.3g}"), float(f"{rate * factor:.3g}")
