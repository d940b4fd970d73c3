"""A table's rows as runs of the training script: checked, timed, run, skipped when done, resumed when cut."""

import argparse
import contextlib
import functools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ccl_timm.console import log_info, log_warning, show_share, table
from ccl_timm.console.arguments import COUNT, Parser
from ccl_timm.errors import UserError
from ccl_timm.experiments import tables
from ccl_timm.experiments.statistics import show_figures, show_printed
from ccl_timm.experiments.tables import Row, Table, run_name
from ccl_timm.training import checks, recipes, run_dir
from ccl_timm.training.config import TrainConfig

__all__ = ['Job', 'Plan', 'add_common', 'run_plan', 'common_words', 'figures', 'main', 'plan_of', 'split_words']


@dataclass(frozen=True)
class Job:
    """One run of the training script.

    Attributes:
        row: what it is a run of.
        words: all of the script's words.
        folder: the run's.
    """

    row: Row
    words: tuple[str, ...]
    folder: Path

    @functools.cached_property
    def config(self) -> TrainConfig:
        """Its configuration."""
        return TrainConfig.resolve(list(self.words), 'ccl-timm train')

    @property
    def epochs(self) -> int:
        """Epochs that it has when it is done."""
        return self.config.planned_epochs

    def top1(self) -> list[float]:
        """Top-1 in % on the validation part after each epoch that it was measured in; of the last if it is done."""
        rows = run_dir.complete_rows(self.folder)
        done = run_dir.is_done(rows, self.config.settings())
        return [row['eval_top1'] for row in rows if 'eval_top1' in row] if done else []

    def done(self) -> bool:
        """Whether all its epochs have been trained.

        Raises:
            UserError: its folder holds a run of other settings.
        """
        if not run_dir.is_run_dir(self.folder):
            return False
        try:
            run_dir.check_same_settings(self.config, self.folder)
        except UserError as error:
            raise UserError(f'{str(error).partition(": give")[0]}: give another --output.') from error
        return bool(self.top1())


@dataclass(frozen=True)
class Plan:
    """A table, and the jobs of each of its rows, one for each seed."""

    table: Table
    jobs: dict[Row, list[Job]]

    @property
    def all_jobs(self) -> list[Job]:
        """The jobs of all rows, seed after seed, so that a plan cut short has something on every row."""
        return [jobs[i] for i in range(max(map(len, self.jobs.values()))) for jobs in self.jobs.values()]


def main(argv: list[str], prog: str) -> int:
    """Check, time or run the rows of a table; 1 if a row failed."""
    own, train_words = split_words(argv)
    args = _parser(prog).parse_strictly(own)
    if not args.table:
        rows = [(name, tables.read_table(name)) for name in tables.list_tables()]
        print(table([(name, t.title, ', '.join(t.datasets)) for name, t in rows], ('name', 'title', 'data sets')))
        return 0
    names = [name for name in args.rows.split(',') if name]
    chosen = tables.select(tables.read_table(args.table), args.dataset, names)
    if len(chosen.datasets) > 1 and not args.dry_run:
        raise UserError(f"Table '{chosen.name}' has several data sets: give --dataset {'|'.join(chosen.datasets)}.")
    seeds = chosen.seeds if args.seeds is None else args.seeds
    plan = plan_of(chosen, seeds, Path(args.output) / chosen.name, [*common_words(args), *train_words])
    return run_plan(plan, args, _result)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f'{prog} [TABLE] [options] [-- words of the training script]',
        description="Run rows of the papers' tables, or of ours: what is done is skipped, what was cut goes on. "
        'Without TABLE: list them. What stands after -- goes to `timm train.py`, such as -- --workers 2.',
    )
    add = parser.add_argument
    add('table', nargs='?', default=None, metavar='TABLE', help='such as cc-table1')
    add('--dataset', default=None, metavar='NAME', help="the table's column, such as mnist")
    add('--rows', default='', metavar='A,B', help='such as resnet18:cc,resnet18:ce; default all')
    add('--data-dir', default=None, metavar='DIR', help="the data set's folder")
    add_common(parser, 'output/reproduce')
    return parser


def add_common(parser: Parser, output: str) -> None:
    """The flags of every command that carries out a plan."""
    add = parser.add_argument
    add('--seeds', type=COUNT, default=None, metavar='N', help="runs a row, 0 to N-1; default the table's")
    add('--epochs', type=COUNT, default=None, metavar='N', help="default the recipe's")
    add('--output', default=output, metavar='DIR', help=f'where the runs lie, default {output}')
    add('--dry-run', action='store_true', help='check every row and print its commands')
    add('--estimate', action='store_true', help='time ten steps of every row and print the hours that all takes')


def common_words(args: argparse.Namespace) -> list[str]:
    """The training script's words that follow from the flags of every such command."""
    return tables.to_cli_args({key: getattr(args, key) for key in ('epochs', 'data_dir') if getattr(args, key)})


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our words, and those after ``--``, which are the training script's."""
    cut = argv.index('--') if '--' in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def plan_of(chosen: Table, seeds: int, output: Path, words: list[str]) -> Plan:
    """Make a job of each row and seed.

    Args:
        chosen: the table.
        seeds: number of runs a row.
        output: folder of the runs; each has a name made of data set, row and seed.
        words: further words of the training script, which come before the rows' own.
    """
    jobs: dict[Row, list[Job]] = {}
    for row in chosen.rows:
        jobs[row] = []
        for seed in range(seeds):
            run = {'seed': seed, 'output': str(output), 'experiment': run_name(row, seed), 'resume': 'auto'}
            own = tables.to_cli_args(run)
            jobs[row].append(Job(row, (*row.words, *words, *own), output / run['experiment']))
    return Plan(chosen, jobs)


def run_plan(plan: Plan, args: argparse.Namespace, result: Callable[[Plan], str]) -> int:
    """Check every row, and then run all jobs and print what came out, or only print the commands, or only time them.

    Args:
        plan: the jobs.
        args: with the flags of :func:`add_common`.
        result: what to print of a plan once its jobs are done.

    Returns:
        The exit code: 1 if any failed.

    Raises:
        UserError: a row cannot work, or its data is not there: nothing has begun.
    """
    for jobs in plan.jobs.values():
        _check(jobs[0], needs_data=not args.dry_run)
    if args.dry_run:
        for job in plan.all_jobs:
            print(shlex.join(['ccl-timm', 'train', *job.words]))
        log_info(f'{len(plan.jobs)} rows checked, {len(plan.all_jobs)} runs')
        return 0
    if args.estimate:
        return int(_estimate(plan))
    done = [_run(job) for job in plan.all_jobs]
    print(result(plan))
    return int(not all(done))


def _check(job: Job, needs_data: bool) -> None:
    config = job.config
    checks.check_config(config)
    checks.check_fit(config)
    scheme = config.dataset.partition('/')[0]
    if not needs_data or config.dataset == 'digits' or scheme in ('hfds', 'hfids', 'tfds', 'wds'):
        return
    if not config.data_dir:
        raise UserError(f'{_label(job.row)} needs its data: give --data-dir DIR.')
    if not os.path.isdir(config.data_dir) and not config.dataset_download:
        raise UserError(f"There is no data folder '{config.data_dir}': give an existing one with --data-dir.")


def _label(row: Row) -> str:
    return f'{row.dataset} {row.name}'.strip()


def _run(job: Job) -> bool:
    """Run a job unless it is done; whether it is done then. What goes wrong is said, and harms no other job."""
    name = job.folder.name
    with _locked(job.folder) as lock:
        if lock is None:
            log_warning(f'{name} is being trained by another process: left out')
            return False
        try:
            if job.done():
                log_info(f'{name}: done already, top-1 {job.top1()[-1]:.2f}%')
                return True
        except UserError as error:
            log_warning(f'{name} failed: {error}')
            return False
        log_info()
        log_info(f'{name}: {shlex.join(["ccl-timm", "train", *job.words])}')
        command = [sys.executable, '-m', 'ccl_timm', 'train', *job.words]
        # the child keeps the lock: it may outlive us
        code = subprocess.run(command, stdout=subprocess.DEVNULL, pass_fds=lock, check=False).returncode
    if code:
        log_warning(f'{name} failed with code {code}; what it said stands above')
    return code == 0


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[tuple[int, ...] | None]:
    """Hold a run's folder against other processes; gives the descriptors that hold it, None if another one does."""
    try:
        import fcntl
    except ImportError:  # Windows, where nothing of the kind holds a folder
        yield ()
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield (descriptor,)
    except BlockingIOError:
        yield None
    finally:
        os.close(descriptor)


def figures(jobs: list[Job]) -> list[float]:
    """Top-1 in % after the last epoch, of the jobs that are done."""
    found = [job.top1() for job in jobs if run_dir.is_run_dir(job.folder)]
    return [values[-1] for values in found if values]


def _result(plan: Plan) -> str:
    rows = []
    for row, jobs in plan.jobs.items():
        values = figures(jobs)
        theirs = TrainConfig.resolve(list(row.words)).epochs
        images = show_share(jobs[0].config.train_fraction) or 'all'
        ours = (show_figures(values), str(len(values)), str(jobs[0].epochs), images)
        rows.append((_label(row), *ours, show_printed(row.paper), str(theirs)))
    header = ('row', 'ours, top-1 %', 'seeds', 'epochs', 'images', "the paper's", "the recipe's epochs")
    lines = [plan.table.title, '', table(rows, header), '']
    lines.append('Ours: after the last epoch, mean ± largest deviation over the seeds.')
    return '\n'.join([*lines, *_footnotes(plan)])


def _footnotes(plan: Plan) -> list[str]:
    """What the table's notes say, and what each recipe has assumed because the paper leaves it open."""
    lines = [f'Note: {note}' for note in plan.table.notes]
    for name in dict.fromkeys(row.recipe for row in plan.jobs):
        assumed = recipes.read_recipe(recipes.find_recipe(name)).get('assumed') or []
        lines += [f'Recipe {name} assumes:', *(f'  - {text}' for text in assumed)]
    return lines


def _estimate(plan: Plan) -> bool:
    from ccl_timm.experiments.estimate import time_run

    started = time.perf_counter()
    subprocess.run([sys.executable, '-c', 'import ccl_timm.training.train'], check=True)
    outset = (time.perf_counter() - started) / 3600  # of every run: Python and its imports
    rows, total, failed = [], 0.0, False
    for row, jobs in plan.jobs.items():
        try:
            cost = time_run(jobs[0].config, jobs[0].folder)
        except UserError as error:
            log_warning(f'{_label(row)} failed: {error}')
            failed = True
            continue
        hours = len(jobs) * (outset + cost.hours)
        total += hours
        rows.append((_label(row), f'{cost.training:.1f}', f'{cost.validation:.1f}', str(cost.epochs), str(len(jobs)),
                     _hours(hours)))  # fmt: skip
    rows.append(('in all', '', '', '', '', _hours(total)))
    print(table(rows, ('row', 's an epoch', 's a validation', 'epochs', 'seeds', 'hours')))
    print('\nFrom ten steps of each row on this machine, without saving; runs that are done count too.')
    print('\n'.join(_footnotes(plan)))
    return failed


def _hours(hours: float) -> str:
    return f'{hours:.1f}' if hours >= 10 else f'{hours:.3f}'
