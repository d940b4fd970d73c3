"""Settings of a loss, searched by Optuna: learning rate, weight decay, and the options that the loss declares."""

from collections.abc import Mapping, Sequence
from typing import Any

from ccl_timm import losses
from ccl_timm.losses import Range

__all__ = ['best_params', 'search_space', 'suggest']

_SAMPLER_SEED = 15_800  # the same for every loss
_SEEDS = 100  # apart are the samplers of searches with neighbouring seeds
_RATES = 30.0  # learning rates from 1/30 to 30 times the recipe's
_DECAY = Range(1e-6, 0.3, log=True)
_SMOOTHING = Range(0.0, 0.3)  # of timm's cross-entropy


def search_space(loss: str, lr: float) -> dict[str, Range]:
    """What is searched for a loss by name: ``lr``, ``weight_decay``, ``smoothing`` and options of the loss.

    Args:
        loss: its name.
        lr: the recipe's learning rate.
    """
    shared = {'lr': Range(lr / _RATES, lr * _RATES, log=True), 'weight_decay': _DECAY}
    if losses.is_timm_loss(loss):
        return {**shared, 'smoothing': _SMOOTHING} if loss == 'ce' else shared
    return {**shared, **losses.declared(loss, 'search_space')}


def suggest(
    space: Mapping[str, Range], start: Mapping[str, float], trials: Sequence[tuple[dict, float]], seed: int
) -> dict:
    """The next values to try, given all trials so far; the same ones whenever it is asked.

    Args:
        space: from :func:`search_space`.
        start: values of the first trial.
        trials: values tried, and the score of each, higher is better.
        seed: of the search.
    """
    if not trials:
        return {name: space[name].clip(start[name]) for name in space}
    import optuna  # takes a second: only when it is asked

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ranges = {
        name: optuna.distributions.FloatDistribution(low, high, log=log) for name, (low, high, log) in space.items()
    }
    sampler = optuna.samplers.TPESampler(seed=(_SAMPLER_SEED + _SEEDS * seed + len(trials)) % 2**32)
    study = optuna.create_study(direction='maximize', sampler=sampler)
    for params, value in trials:
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=value))
    return {name: space[name].clip(float(f'{value:.4g}')) for name, value in study.ask(ranges).params.items()}


def best_params(trials: Sequence[tuple[dict[str, Any], float]]) -> dict[str, Any]:
    """The values of the best trial, the earliest of several."""
    return max(trials, key=lambda trial: trial[1])[0]
