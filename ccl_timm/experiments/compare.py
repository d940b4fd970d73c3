"""A fair comparison of losses: tuned on one share of the data with equal effort, measured on another, with controls.

Every loss has the head made for it. The controls are cross-entropy on the linear head, on each head that occurs, on the
cosine head and on the ``mlp`` head. Tuning holds a share of the training split out; the final runs train on all of it,
with seeds that tuning never saw, and touch the validation split once, after the last epoch.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ccl_timm import losses
from ccl_timm.console import log_info, show_duration
from ccl_timm.console.memory import keep_freed_memory
from ccl_timm.data.datasets import content_hash, create_splits
from ccl_timm.errors import UserError, user_errors
from ccl_timm.experiments.tables import to_cli_args
from ccl_timm.experiments.trial import run_trial, unseen_images
from ccl_timm.experiments.tuning import best_params, search_space, suggest
from ccl_timm.heads import head_class
from ccl_timm.training.checks import check_config, check_fit
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.folder_lock import FolderLock
from ccl_timm.training.provenance import environment
from ccl_timm.training.setup import input_channels, learning_rate

__all__ = ['METRICS', 'RECORDS', 'Comparison', 'Entry', 'entries_of', 'final_runs', 'read_records', 'run_comparison']

RECORDS = 'compare.jsonl'
METRICS = ('top1', 'recall_at_1', 'map_at_r', 'unseen_recall_at_1', 'unseen_map_at_r')
_FIRST_SEED = 1000  # of the final runs; tuning has the seed of the recipe
_CONTROLS = ('linear', 'cosine', 'mlp')  # heads that cross-entropy is trained on besides those of the losses


@dataclass(frozen=True)
class Entry:
    """A loss on a head."""

    head: str
    loss: str

    @property
    def name(self) -> str:
        """Such as ``'cam:cc'``."""
        return f'{self.head}:{self.loss}'


def entries_of(names: list[str]) -> list[Entry]:
    """The losses by name, each on its head, below the controls: cross-entropy on all heads that occur.

    Args:
        names: a loss, or ``HEAD:LOSS``, such as ``'cosine:center'``. A loss for any head gets the linear one.

    Raises:
        UserError: there is no loss or no head of a name.
    """
    entries = [_entry(name) for name in names]
    controls = [Entry(head, 'ce') for head in (*_CONTROLS, *(entry.head for entry in entries))]
    return list(dict.fromkeys([*controls, *entries]))


def _entry(name: str) -> Entry:
    head, separator, loss = name.partition(':')
    if separator and not name.startswith(losses.PREFIX):
        head_class(head)
        if not loss:
            raise UserError(f"'{name}' names no loss: give HEAD:LOSS, such as {head}:ce.")
        return Entry(head, loss)
    return Entry('linear' if losses.is_timm_loss(name) else losses.declared(name, 'head') or 'linear', name)


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        backbone: a timm architecture.
        entries: see :func:`entries_of`.
        args: of the training script, for all runs.
        output: folder of the records.
        trials: of each entry's tuning; 0 for the recipe's settings.
        seeds: final runs of each entry.
        tune_fraction: share of the training split that tuning holds out.
        unseen: folder of classes to measure retrieval on; None for none.
        metric: what is compared, one of ``METRICS``.
        head_options: options of heads by name, for every loss on them.
    """

    backbone: str
    entries: list[Entry]
    args: tuple[str, ...]
    output: Path
    trials: int = 20
    seeds: int = 10
    tune_fraction: float = 0.2
    unseen: str | None = None
    metric: str = 'top1'
    head_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """The records: one line per run."""
        return self.output / RECORDS

    @property
    def key(self) -> str:
        """Tells records of these settings from others."""
        settings = [self.backbone, *self.args, self.trials, self.tune_fraction, self.unseen, self.metric]
        settings += [self.head_options] if self.head_options else []
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]

    @property
    def seed(self) -> int:
        """Of the search and of its runs."""
        return TrainConfig.resolve(list(self.args)).seed

    def argv(self, entry: Entry, params: dict[str, float]) -> list[str]:
        """Arguments of the training script for a loss with its settings."""
        settings: dict[str, Any] = {'model': f'{self.backbone}_{entry.head}', 'loss': entry.loss}
        if own := self.head_options.get(entry.head):
            settings['model_kwargs'] = {**TrainConfig.resolve(list(self.args)).model_kwargs, **own}
        options = dict(params)
        settings |= {name: options.pop(name) for name in ('lr', 'weight_decay', 'smoothing') if name in options}
        if options:
            settings['loss_kwargs'] = options
        return [*self.args, *to_cli_args(settings)]

    def space(self, entry: Entry) -> tuple[dict[str, losses.Range], dict[str, float]]:
        """What is searched for an entry, and where the search begins: at the recipe's rate and the loss's defaults."""
        config = TrainConfig.resolve(self.argv(entry, {}))
        ranges = search_space(entry.loss, learning_rate(config))
        defaults = {name: option.default for name, option in losses.loss_options(entry.loss).items()}
        known = {'lr': learning_rate(config), 'weight_decay': config.weight_decay, 'smoothing': 0.0}
        return ranges, {name: known[name] if name in known else float(defaults[name]) for name in ranges}

    def check(self) -> None:
        """Raise a UserError if an entry cannot be trained; nothing is computed."""
        for entry in self.entries:
            config = TrainConfig.resolve(self.argv(entry, {}))
            check_config(config)
            check_fit(config)
        if self.trials and config.val_fraction is not None:
            raise UserError(
                'Tuning would see the images that the result is measured on: divide them with `ccl-timm data split DIR '
                'OUT`, and compare on OUT without --val-fraction.'
            )
        if not config.val_split:
            raise UserError('A comparison ends on images that no loss was tuned on: give --val-split NAME.')
        if self.metric.startswith('unseen') and not self.unseen:
            raise UserError(f'--metric {self.metric} is measured on classes that are not trained: give --unseen DIR.')
        if self.unseen and not Path(self.unseen).is_dir():
            raise UserError(f"There is no folder '{self.unseen}': --unseen names one that has a folder for each class.")


@dataclass
class _State:
    """How far an entry's runs are."""

    entry: Entry
    trials: list[tuple[dict[str, float], float]] = field(default_factory=list)
    trainable: bool = False  # with the settings of one trial at least
    params: dict[str, float] | None = None

    def add_trial(self, line: dict[str, Any], metric: str) -> None:
        """Take in a trial's record; a run that failed has the lowest score."""
        self.trials.append((line['params'], float(line.get(metric.removeprefix('unseen_'), 0.0))))
        self.trainable |= 'error' not in line


@dataclass(frozen=True)
class _Job:
    """A run to be made: of an entry, with its settings, for tuning (``seed`` None) or for the result."""

    state: _State
    params: dict[str, float]
    seed: int | None

    def line(self, key: str, found: dict[str, Any]) -> dict[str, Any]:
        """The record of the run."""
        number = {'trial': len(self.state.trials)} if self.seed is None else {'seed': self.seed}
        return {'key': key, 'entry': self.state.entry.name, **number, 'params': self.params, **found}


def read_records(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """Lines of a file of records, those of a comparison's key only; a last line that was cut off is left out.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    if lines and not lines[-1].endswith('\n'):
        lines.pop()
    try:
        found = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"'{path}' is a damaged file of records: {error}.") from error
    return [line for line in found if key is None or line.get('key') == key]


def final_runs(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The final runs of each entry by seed."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in records:
        if 'seed' in line and 'error' not in line:
            found.setdefault(line['entry'], {})[line['seed']] = line
    return found


def run_comparison(comparison: Comparison, jobs: int) -> None:
    """Tune every loss, make the final runs, and write a record of each; those recorded already are not repeated.

    Args:
        comparison: what to compare.
        jobs: processes that train at the same time; 1 for this one alone.

    Raises:
        UserError: an entry cannot be trained, or another process writes into the folder.
    """
    comparison.check()
    with FolderLock() as lock:
        with user_errors(f"The folder '{comparison.output}' cannot be written", (OSError,)):
            comparison.output.mkdir(parents=True, exist_ok=True)
            free = lock.take(comparison.output)
        if not free:
            raise UserError(f"Another process is writing into '{comparison.output}': wait for it, or give --output.")
        _run(comparison, jobs)


def _run(comparison: Comparison, jobs: int) -> None:
    known, data = read_records(comparison.file, comparison.key), _fingerprint(comparison)
    if not known:
        _append(comparison.file, {**_header(comparison), 'data': data})
    elif known[0].get('data', data) != data:
        raise UserError(f"The data are no longer those of the runs in '{comparison.file}': give another --output.")
    states = [_State(entry) for entry in comparison.entries]
    ready = deque(job for state in states for job in _next_jobs(comparison, state, known))
    total = len(states) * (comparison.trials + comparison.seeds)
    progress = _Progress(total, total - _missing(comparison, states, known), jobs)
    with _workers(jobs) as submit:
        _work(comparison, ready, submit, jobs, progress)


def _work(
    comparison: Comparison, ready: deque[_Job], submit: Callable[..., Future], jobs: int, progress: '_Progress'
) -> None:
    """Make all runs that are ready, and those that become so."""
    running: dict[Future, _Job] = {}
    while ready or running:
        while ready and len(running) < jobs:
            job = ready.popleft()
            running[_submit(comparison, job, submit)] = job
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            try:
                line = job.line(comparison.key, future.result())
            except BrokenProcessPool as error:
                raise UserError(
                    'A process of the comparison was killed, perhaps for lack of memory: give fewer --jobs. Finished '
                    'runs are kept.'
                ) from error
            _require_measured(line, comparison)
            _append(comparison.file, line)
            progress.log(job.state.entry, line, comparison.metric)
            ready.extend(_after(comparison, job, line))


def _submit(comparison: Comparison, job: _Job, submit: Callable[..., Future]) -> Future:
    argv = comparison.argv(job.state.entry, job.params)
    if job.seed is None:
        argv += ['--val-fraction', str(comparison.tune_fraction)]
        return submit(run_trial, argv, comparison.metric != 'top1')
    last_only = str(TrainConfig.resolve(argv).planned_epochs)
    return submit(run_trial, [*argv, '--seed', str(job.seed), '--val-interval', last_only], True, comparison.unseen)


def _after(comparison: Comparison, job: _Job, line: dict[str, Any]) -> Iterator[_Job]:
    """What follows a finished run."""
    if job.seed is not None:
        if 'error' in line:
            raise UserError(f"'{job.state.entry.name}' cannot be trained: {line['error']}")
        return
    job.state.add_trial(line, comparison.metric)
    yield from _next_jobs(comparison, job.state, [])


def _next_jobs(comparison: Comparison, state: _State, known: list[dict[str, Any]]) -> Iterator[_Job]:
    """An entry's next runs, after those that are recorded: a trial, or all final runs once tuning has ended."""
    ranges, start = comparison.space(state.entry)
    own = [line for line in known if line.get('entry') == state.entry.name]
    while len(state.trials) < comparison.trials:
        recorded = next((line for line in own if line.get('trial') == len(state.trials)), None)
        if recorded is None:
            yield _Job(state, suggest(ranges, start, state.trials, comparison.seed), None)
            return
        state.add_trial(recorded, comparison.metric)
    if state.trials and not state.trainable:
        raise UserError(f"No trial of '{state.entry.name}' could be trained: see {comparison.file}.")
    state.params = best_params(state.trials) if state.trials else {}
    done = {
        seed for lines in final_runs(own).values() for seed, line in lines.items() if line['params'] == state.params
    }
    for seed in range(_FIRST_SEED, _FIRST_SEED + comparison.seeds):
        if seed not in done:
            yield _Job(state, state.params, seed)


def _missing(comparison: Comparison, states: list[_State], known: list[dict[str, Any]]) -> int:
    done = sum(len(state.trials) for state in states) + sum(map(len, final_runs(known).values()))
    return len(states) * (comparison.trials + comparison.seeds) - done


def _require_measured(line: dict[str, Any], comparison: Comparison) -> None:
    """Raise a UserError for a run without the measure that is compared: retrieval of images each of its own class."""
    metric = comparison.metric.removeprefix('unseen_') if 'trial' in line else comparison.metric
    if 'error' in line or metric in line:
        return
    images = 'that tuning holds out' if 'trial' in line else f'of {comparison.unseen or "the validation split"}'
    raise UserError(
        f'{metric} cannot be measured: among the images {images} no class has two, so that there is none of the same '
        'class to find. Take more images, or --metric top1.'
    )


def _fingerprint(comparison: Comparison) -> str:
    """Of all images: trained on, validated on, and unseen."""
    config = TrainConfig.resolve(comparison.argv(comparison.entries[0], {}))
    channels = input_channels(config)
    found = create_splits(config, channels).fingerprint
    return found + (f'-{content_hash(unseen_images(comparison.unseen, channels))}' if comparison.unseen else '')


def _header(comparison: Comparison) -> dict[str, Any]:
    made = environment([], TrainConfig.resolve(list(comparison.args)).device, '')
    return {
        'key': comparison.key, 'backbone': comparison.backbone, 'args': list(comparison.args),
        'head_options': comparison.head_options, 'tune_fraction': comparison.tune_fraction,
        'trials': comparison.trials, 'metric': comparison.metric, 'unseen': comparison.unseen,
        'versions': made['versions'], 'device': made['device'], 'started': made['started'],
    }  # fmt: skip


def _append(path: Path, line: dict[str, Any]) -> None:
    text = path.read_bytes() if path.exists() else b''
    if text and not text.endswith(b'\n'):  # of a process that was killed while it wrote
        path.write_bytes(text[: text.rfind(b'\n') + 1])
    with path.open('a', encoding='utf-8') as file:
        file.write(json.dumps(line) + '\n')


def _start_worker() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()


@contextmanager
def _workers(jobs: int) -> Iterator[Callable[..., Future]]:
    """A function that starts a call in one of several processes, which live until the end; one job stays here."""
    if jobs == 1:
        yield _call_here
        return
    pool = ProcessPoolExecutor(jobs, get_context('spawn'), _start_worker)
    try:
        yield pool.submit
    finally:
        pool.shutdown(cancel_futures=True)


def _call_here(function: Callable, *args: Any) -> Future:
    future: Future = Future()
    future.set_result(function(*args))
    return future


class _Progress:
    """Lines about finished runs and the time that is left."""

    def __init__(self, total: int, done: int, jobs: int):
        self.total, self.done, self.jobs = total, done, jobs
        self.started, self.made = time.perf_counter(), 0
        log_info(f'{total} runs, {done} of them recorded already, {jobs} at a time')

    def log(self, entry: Entry, line: dict[str, Any], metric: str) -> None:
        """After a run: what it gave."""
        self.done, self.made = self.done + 1, self.made + 1
        left = (time.perf_counter() - self.started) / self.made * (self.total - self.done)
        kind = f'trial {line["trial"] + 1}' if 'trial' in line else f'seed {line["seed"]}'
        values = ' '.join(f'{name}={value:.3g}' for name, value in line['params'].items())
        measured = metric if metric in line else metric.removeprefix('unseen_')  # tuning's, of its held-out share
        found = line['error'] if 'error' in line else f'{measured} {line[measured]:.2f}'
        log_info(f'{self.done}/{self.total}  {entry.name}, {kind}: {found}  ({values})  {show_duration(left)} left')
