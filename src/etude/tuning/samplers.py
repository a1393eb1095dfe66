"""What proposes the next trial. A sampler is made anew for each trial, with a seed of the trial's own: so a search that was
stopped does not draw again what it began with, and with one trial at a time goes on as if it had not been stopped.

A function here takes (seed, space, tried) and returns an Optuna sampler, or None where nothing is left to try; `tried` are
the parameters of the trials that ran, run, or wait. Its keyword arguments are what a YAML beside
conf/hydra/sweeper/sampler/tpe.yaml sets."""

import warnings
from typing import TYPE_CHECKING, Any

from etude.errors import Refusal
from etude.tuning.space import Space, combinations

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Tried = list[dict[str, Any]]


def tpe(
    seed: int,
    space: Space,
    tried: Tried,
    *,
    n_startup_trials: int,
    n_ei_candidates: int,
    multivariate: bool,
    constant_liar: bool,
) -> "BaseSampler | None":
    from optuna.samplers import TPESampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that multivariate is experimental
        return TPESampler(
            seed=seed,
            n_startup_trials=n_startup_trials,
            n_ei_candidates=n_ei_candidates,
            multivariate=multivariate,
            constant_liar=constant_liar,
        )


def random(seed: int, space: Space, tried: Tried) -> "BaseSampler | None":
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def grid(seed: int, space: Space, tried: Tried) -> "BaseSampler | None":
    """The first combination that was not tried. Optuna's GridSampler counts failed trials as visited, and its order is
    that of its seed."""
    from optuna.samplers import PartialFixedSampler, RandomSampler

    left = next((point for point in combinations(space) if point not in tried), None)
    if left is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        return PartialFixedSampler(left, RandomSampler(seed=seed))


def cmaes(
    seed: int,
    space: Space,
    tried: Tried,
    *,
    n_startup_trials: int,
    sigma0: float | None,
    popsize: int | None,
    with_margin: bool,
) -> "BaseSampler | None":
    """Raises Refusal without cmaes, or where there are not two numbers."""
    from optuna.distributions import CategoricalDistribution
    from optuna.samplers import CmaEsSampler

    if sum(not isinstance(d, CategoricalDistribution) for d in space.values()) < 2:
        raise Refusal("hydra/sweeper/sampler=cmaes needs two numbers to search over; use hydra/sweeper/sampler=tpe")
    try:
        import cmaes  # noqa: F401
    except ImportError:
        raise Refusal("hydra/sweeper/sampler=cmaes needs cmaes: pip install cmaes") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that with_margin is experimental
        return CmaEsSampler(
            seed=seed,
            n_startup_trials=n_startup_trials,
            sigma0=sigma0,
            popsize=popsize,
            with_margin=with_margin,
            warn_independent_sampling=False,
        )
