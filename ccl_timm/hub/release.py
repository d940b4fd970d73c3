"""Our checkpoints, from their description in hub_cards/ to their repository: trained, checked, and pushed."""

import contextlib
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccl_timm.console import log_info
from ccl_timm.errors import UnknownNameError, UserError, did_you_mean
from ccl_timm.experiments.results import Result
from ccl_timm.hub.publish import push, write_card
from ccl_timm.hub.run import load
from ccl_timm.models.checkpoints import ORGANISATION
from ccl_timm.registry import resource_dir
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.train import train
from ccl_timm.training.yaml_files import read_yaml

__all__ = ['Release', 'list_releases', 'read_release', 'release']

_FILE = 'release.yaml'
_PLACES = {'data_dir', 'pretrained_path'}  # of files, which somebody else's run has elsewhere


@dataclass(frozen=True)
class Release:
    """How one of our checkpoints is made; the content of its release.yaml.

    Attributes:
        name: ``'architecture.tag'``: of its folder in hub_cards/, its repository and its pretrained tag.
        train: arguments of `timm train.py`, without the folders of a machine; ``--seed`` among them.
        top1: accuracy that it is expected to have on its run's validation split, in %.
        tolerance: by how many points another machine's may differ.
        license: of the weights.
        note: what a reader of the card must know of the data, as a sentence.
        baseline: arguments that differ for the run of the same recipe with cross-entropy; empty for none.
    """

    name: str
    train: str
    top1: float
    tolerance: float
    license: str = 'apache-2.0'
    note: str = ''
    baseline: str = ''

    def runs(self, data_dir: str | None, output: Path) -> dict[str, list[str]]:
        """Arguments of the checkpoint's run and of its baseline's, by the name of their folder in ``output``."""
        data = ['--data-dir', data_dir] if data_dir else []
        runs = {self.name: self.train}
        if self.baseline:
            runs[f'{self.name}.baseline'] = f'{self.train} {self.baseline}'
        return {
            name: [*shlex.split(args), *data, '--output', str(output), '--experiment', name, '--resume', 'auto']
            for name, args in runs.items()
        }


def list_releases() -> list[str]:
    """Names of the checkpoints that are described."""
    return sorted(file.parent.name for file in resource_dir('hub_cards').glob(f'*/{_FILE}'))


def read_release(name: str) -> Release:
    """Read a checkpoint's description.

    Raises:
        UnknownNameError: there is none of that name.
        UserError: it is not such a description.
    """
    names = list_releases()
    if name not in names:
        raise UnknownNameError(
            f"No checkpoint '{name}' is described{did_you_mean(name, names)} There are: {', '.join(names)}."
        )
    file = resource_dir('hub_cards') / name / _FILE
    content: Any = read_yaml(file)
    try:
        return Release(name, **content)
    except TypeError as error:
        raise UserError(f'{file} does not describe a checkpoint: {error}.') from error


def release(
    name: str,
    data_dir: str | None = None,
    run: str | None = None,
    output: Path | str = 'output/release',
    dry_run: bool = False,
    private: bool = False,
) -> str:
    """Train one of our checkpoints, or take the run of one, check its accuracy, write its card, and push it.

    Args:
        name: ``'architecture.tag'``.
        data_dir: folder of its data.
        run: folder of a finished run with its settings, in the place of training one.
        output: folder of what is trained, and of the card with its records in ``NAME.card``.
        dry_run: push nothing.
        private: only the organisation sees a new repository.

    Returns:
        Address of the pushed commit; empty for a dry run.

    Raises:
        UserError: the run has other settings or another accuracy, or what :func:`publish.push` refuses.
    """
    described, output = read_release(name), Path(output)
    wanted = described.runs(data_dir, output)
    if run:
        folders = [_finished(RunDir(run), wanted[name], _PLACES)]
    else:
        folders = [_train(RunDir(output / experiment), args) for experiment, args in wanted.items()]
    own, baseline = [*folders, None][:2]
    use_ema = bool(RunDir(own).settings().get('model_ema'))
    _check_accuracy(described, own, use_ema)
    options: dict[str, Any] = {
        'use_ema': use_ema,
        'baseline': baseline,
        'license': described.license,
        'note': described.note,
    }
    repo_id, card = f'{ORGANISATION}/{name}', output / f'{name}.card'
    if card.exists():
        log_info(f'{card} is there already, and stays as it is')
    else:
        write_card(own, repo_id=repo_id, output=card, **options)
    return push(own, repo_id, private=private, dry_run=dry_run, **options)


def _train(run: RunDir, args: list[str]) -> Path:
    """Train, or go on with, what is not finished."""
    if run.exists():
        with contextlib.suppress(_Unfinished):
            finished = _finished(run, args)
            log_info(f'{run.path}: trained already')
            return finished
    return train(TrainConfig.resolve(args, 'ccl-timm train'), args)


class _Unfinished(UserError):
    pass


def _finished(run: RunDir, args: list[str], ignore: Collection[str] = ()) -> Path:
    """The folder of a run, which must have these settings and be finished."""
    run.check_settings(TrainConfig.resolve(args, 'ccl-timm train'), 'give another --output or --run', ignore)
    try:
        Result.of(run).finished()
    except UserError as error:
        raise _Unfinished(str(error)) from error
    return run.path


def _check_accuracy(described: Release, run: Path, use_ema: bool) -> None:
    """Measure the checkpoint and compare."""
    top1 = load(run, use_ema).evaluate().metrics['top1']
    expected = f'{described.top1:.2f} expected, within {described.tolerance:g} points'
    if abs(top1 - described.top1) > described.tolerance:
        raise UserError(
            f"'{described.name}' has a top-1 accuracy of {top1:.2f}%, {expected}: it is not published. Check the data, "
            'or change release.yaml if the recipe was changed.'
        )
    log_info(f'{described.name}: top-1 {top1:.2f}%, {expected}')
