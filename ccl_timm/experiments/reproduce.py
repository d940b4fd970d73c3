"""A table's rows as runs of the training script: checked, timed, run, skipped when done, resumed when interrupted."""

import contextlib
import functools
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ccl_timm.console import log_info, log_warning, table
from ccl_timm.errors import UserError
from ccl_timm.experiments import tables
from ccl_timm.experiments.estimate import time_run
from ccl_timm.experiments.matching import match_row
from ccl_timm.experiments.rendering import FORMATS
from ccl_timm.experiments.report import table_report
from ccl_timm.experiments.results import Result, read_results
from ccl_timm.experiments.tables import Row, Table, run_name
from ccl_timm.training import checks, recipes
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.interrupts import Stopped, stopped_by_signals
from ccl_timm.training.run_dir import RunDir, is_done

__all__ = ['Job', 'Plan', 'final_results', 'plan_of', 'run_plan', 'show_results']

_POLL = 0.1  # seconds between two looks at the jobs that run


@dataclass(frozen=True)
class Job:
    """One run of the training script.

    Attributes:
        row: what it is a run of.
        args: all of the script's arguments.
        run: its folder.
    """

    row: Row
    args: tuple[str, ...]
    run: RunDir

    @functools.cached_property
    def config(self) -> TrainConfig:
        """Its configuration."""
        return TrainConfig.resolve(list(self.args), 'ccl-timm train')

    @property
    def name(self) -> str:
        """That of its run's folder."""
        return self.run.path.name

    @property
    def command(self) -> list[str]:
        """The command that runs it."""
        return ['ccl-timm', 'train', *self.args]

    def result(self) -> Result | None:
        """What the run has recorded, once all its epochs have been trained.

        Raises:
            UserError: its folder holds a run of other settings.
        """
        if not self.run.exists():
            return None
        self.run.check_settings(self.config, 'give another --output')
        result = Result.of(self.run)
        return result if is_done(result.rows, self.config.settings()) and result.curve else None


@dataclass(frozen=True)
class Plan:
    """A table, and the jobs of each of its rows, one for each seed."""

    table: Table
    jobs: dict[Row, list[Job]]

    @property
    def all_jobs(self) -> list[Job]:
        """The jobs of all rows, seed after seed, so that a plan that is cut short has a run of every row."""
        return [jobs[i] for i in range(max(map(len, self.jobs.values()))) for jobs in self.jobs.values()]


def plan_of(chosen: Table, seeds: int, output: Path, args: list[str]) -> Plan:
    """Make a job of each row and seed.

    Args:
        chosen: the table.
        seeds: runs per row.
        output: folder of the runs, which are named after data set, row and seed.
        args: further arguments of the training script, which come before the run's own.
    """
    jobs: dict[Row, list[Job]] = {}
    for row in chosen.rows:
        jobs[row] = []
        for seed in range(seeds):
            name = run_name(row, seed)
            own = {'seed': seed, 'output': str(output), 'experiment': name, 'resume': 'auto'}
            jobs[row].append(Job(row, (*row.args, *args, *tables.to_cli_args(own)), RunDir(output / name)))
    return Plan(chosen, jobs)


def run_plan(
    plan: Plan, result: Callable[[Plan], str], dry_run: bool = False, estimate: bool = False, at_once: int = 1
) -> int:
    """Check every row, then run all jobs and print the results, or only print the commands, or only time them.

    Args:
        plan: the jobs.
        result: what to print of a plan once its jobs are done.
        dry_run: only check every row and print the commands.
        estimate: only time ten steps of every row.
        at_once: jobs that run at the same time. If several, each has its share of the processor's threads, and writes
            its messages to a file beside its folder, ``NAME.log``.

    Returns:
        The exit code: 1 if any failed.

    Raises:
        UserError: a row cannot work, or its data is not there: nothing has begun.
    """
    for jobs in plan.jobs.values():
        _check(jobs[0], needs_data=not dry_run)
    if dry_run:
        for job in plan.all_jobs:
            print(shlex.join(job.command))
        log_info(f'{len(plan.jobs)} rows checked, {len(plan.all_jobs)} runs')
        return 0
    if estimate:
        return int(_estimate(plan))
    done = _run(plan.all_jobs, at_once)
    print(result(plan))
    return int(not done)


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


def _run(jobs: list[Job], at_once: int) -> bool:
    """Run the jobs that are not done; returns whether all are done then. An error is logged, and stops no other job."""
    waiting, running, ended = deque(jobs), dict[subprocess.Popen, Job](), list[bool]()
    with stopped_by_signals(), _ended_with_us(running):
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                if (done := _is_done(job)) is None:
                    running[_start(job, at_once)] = job
                else:
                    ended.append(done)
            time.sleep(_POLL)
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                if process.returncode:
                    where = 'above' if at_once == 1 else f'in {_log_file(job)}, the last: {_last_line(job)}'
                    log_warning(f'{job.name} failed with code {process.returncode}; its messages are {where}')
                elif at_once > 1:
                    log_info(f'{job.name}: done')
                ended.append(not process.returncode)
    return all(ended)


def _is_done(job: Job) -> bool | None:
    """Whether a job is done already, False if its folder holds something else, None if it is to run."""
    try:
        result = job.result()
    except UserError as error:
        log_warning(f'{job.name} failed: {error}')
        return False
    if not result:
        return None
    log_info(f'{job.name}: done already, top-1 {result.last:.2f}%')
    return True


def _start(job: Job, at_once: int) -> subprocess.Popen:
    """Start a job: alone with our output, among others with a file and a share of the threads of its own."""
    log_info()
    log_info(f'{job.name}: {shlex.join(job.command)}')
    start = functools.partial(
        subprocess.Popen, [sys.executable, '-m', 'ccl_timm', *job.command[1:]], stdout=subprocess.DEVNULL
    )
    if at_once == 1:
        return start()
    log_info(f'its messages are in {_log_file(job)}')
    _log_file(job).parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // at_once)
    with _log_file(job).open('ab') as file:
        return start(stderr=file, env={'OMP_NUM_THREADS': str(threads), **os.environ})


def _log_file(job: Job) -> Path:
    return job.run.path.with_name(f'{job.name}.log')


def _last_line(job: Job) -> str:
    lines = _log_file(job).read_text(encoding='utf-8', errors='replace').split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), 'none')


@contextlib.contextmanager
def _ended_with_us(processes: Iterable[subprocess.Popen]) -> Iterator[None]:
    """Let no process go on when an error or a signal ends the block."""
    try:
        yield
    except BaseException as error:
        by_hand = isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped)  # ^C, which they had, too
        for process in processes if not by_hand else ():
            process.terminate()
        for process in processes:
            process.wait()
        raise


def final_results(jobs: list[Job]) -> list[Result]:
    """What the runs of the jobs that are done have recorded."""
    found = []
    for job in jobs:
        with contextlib.suppress(UserError):  # a run of other settings, which was reported
            found.append(job.result())
    return [result for result in found if result]


def show_results(plan: Plan) -> str:
    """The report of the table, and what its recipes assume."""
    matched = [match_row(row, final_results(jobs)) for row, jobs in plan.jobs.items()]
    others: list[Result] = []
    with contextlib.suppress(UserError):  # no run is finished
        others = read_results([plan.all_jobs[0].run.path.parent])
    report = table_report(tables.read_table(plan.table.name), matched, others)
    return '\n'.join([FORMATS['md'](report), *_assumptions(plan)])


def _assumptions(plan: Plan) -> list[str]:
    """What each recipe assumes because the paper leaves it open."""
    lines = []
    for name in dict.fromkeys(row.recipe for row in plan.jobs):
        assumed = recipes.read_recipe(recipes.find_recipe(name)).get('assumed') or []
        lines += [f'Recipe {name} assumes:', *(f'  - {text}' for text in assumed)]
    return lines


def _estimate(plan: Plan) -> bool:
    started = time.perf_counter()
    subprocess.run([sys.executable, '-c', 'import ccl_timm.training.train'], check=True)
    startup = (time.perf_counter() - started) / 3600  # of every run: Python and its imports
    rows, total, failed = [], 0.0, False
    for row, jobs in plan.jobs.items():
        try:
            cost = time_run(jobs[0].config, jobs[0].run.path)
        except UserError as error:
            log_warning(f'{_label(row)} failed: {error}')
            failed = True
            continue
        hours = len(jobs) * (startup + cost.hours)
        total += hours
        rows.append((_label(row), f'{cost.training:.1f}', f'{cost.validation:.1f}', str(cost.epochs), str(len(jobs)),
                     _hours(hours)))  # fmt: skip
    rows.append(('in all', '', '', '', '', _hours(total)))
    print(table(rows, ('row', 's per epoch', 's per validation', 'epochs', 'seeds', 'hours')))
    print(
        '\nFrom ten steps of each row on this machine, without saving, one run at a time; runs that are done count too.'
    )
    print('\n'.join([*(f'Note: {note}' for note in plan.table.notes), *_assumptions(plan)]))
    return failed


def _hours(hours: float) -> str:
    return f'{hours:.1f}' if hours >= 10 else f'{hours:.3f}'
