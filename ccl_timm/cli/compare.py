"""`ccl-timm compare`."""

import argparse
import os
from pathlib import Path

from ccl_timm.cli.common import add_plan, shared_args
from ccl_timm.console import log_info, show_duration
from ccl_timm.console.arguments import COUNT, SHARE, Parser, integer, real
from ccl_timm.errors import UserError
from ccl_timm.experiments.compare import (
    METRICS,
    Comparison,
    entries_of,
    final_runs,
    read_records,
    run_comparison,
)
from ccl_timm.experiments.compare_result import show_comparison
from ccl_timm.experiments.estimate import time_run
from ccl_timm.experiments.statistics import EQUIVALENCE
from ccl_timm.experiments.tables import read_benchmark, to_cli_args
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.evaluation import pick_device
from ccl_timm.training.run_dir import atomic_write

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    'Compare losses with cross-entropy on your own images. Each has the head made for it, and cross-entropy on that '
    'head and on others is its control. With --trials, every loss is tuned with the same effort on a share of the '
    'training images; the final runs train on all of them and are measured on the validation split. Finished runs are '
    'not repeated. Arguments after -- go to `timm train.py`.'
)
_DEFAULTS = {'losses': ['cc', 'arcface', 'pod'], 'backbone': 'resnet18', 'config': 'finetune', 'trials': 0, 'seeds': 3}


def add_arguments(parser: Parser) -> None:
    parser.usage = f'{parser.prog} --data-dir DIR --losses A B [options] [-- arguments of the training script]'
    add = parser.add_argument
    add('--table', metavar='NAME', help='a packaged benchmark: losses, backbone, trials, seeds and settings')
    add('--losses', nargs='+', metavar='NAME', help=f'default {" ".join(_DEFAULTS["losses"])}')
    add('--backbone', metavar='NAME', help=f'a timm architecture, default {_DEFAULTS["backbone"]}')
    add('--config', metavar='RECIPE', help=f'settings that all runs share, default {_DEFAULTS["config"]}')
    add('--trials', type=integer(0, 10_000), metavar='N', help='tuning runs of each loss, default 0: none')
    add('--tune-fraction', type=SHARE, default=0.2, metavar='F', help='share held out for tuning, default 0.2')
    add('--metric', choices=METRICS, help='what is compared, default top1')
    add('--unseen', metavar='DIR', help='folder of classes that are not trained, for --metric unseen_recall_at_1')
    add('--within', type=real(0, 100, above=True), default=EQUIVALENCE, metavar='X',
        help=f'points within which losses count as equal, default {EQUIVALENCE}')  # fmt: skip
    add('--jobs', type=COUNT, metavar='N', help='runs at a time; default one for each core, or 1 with an accelerator')
    add('--freeze-backbone', action='store_true', help='as for `timm train.py`: minutes in the place of hours')
    add('--show', action='store_true', help='print the result of the runs that are recorded, and make none')
    add_plan(parser, 'output/compare')


def run(args: argparse.Namespace) -> int:
    comparison = _comparison(args)
    if args.show or args.dry_run:
        comparison.check()
    if args.dry_run:
        for entry in comparison.entries:
            print(f'{entry.name}: timm train.py {" ".join(comparison.argv(entry, {}))}')
        return 0
    jobs = args.jobs or _default_jobs(comparison)
    if not args.show:
        comparison.check()
        seconds = _estimated(comparison, jobs)
        log_info(f'about {show_duration(seconds)} for all runs')
        if args.estimate:
            return 0
        run_comparison(comparison, jobs)
    runs = final_runs(read_records(comparison.file, comparison.key))
    if not runs:
        raise UserError(f"'{comparison.file}' has no runs of this comparison.")
    title = f'{comparison.backbone}, {comparison.trials} tuning runs for each loss'
    text = show_comparison(title, runs, comparison.metric, args.within)
    atomic_write(comparison.output / 'compare.txt', text + '\n')
    print(text)
    return 0


def _comparison(args: argparse.Namespace) -> Comparison:
    table = {**_DEFAULTS, 'metric': 'top1', **(read_benchmark(args.table) if args.table else {})}
    given = {name: getattr(args, name) for name in (*_DEFAULTS, 'metric')}
    chosen = {name: table[name] if value is None else value for name, value in given.items()}
    shared = ['--config', chosen['config'], '--smoothing', '0.0', *to_cli_args(table.get('set', {}))]
    shared += shared_args(args)
    if args.freeze_backbone and '--freeze-backbone' not in shared:
        shared.append('--freeze-backbone')
    return Comparison(
        chosen['backbone'], entries_of(chosen['losses']), (*shared, *args.train_args), Path(args.output),
        chosen['trials'], chosen['seeds'], args.tune_fraction, args.unseen, chosen['metric'],
    )  # fmt: skip


def _default_jobs(comparison: Comparison) -> int:
    accelerated = pick_device(TrainConfig.resolve(list(comparison.args)).device) != 'cpu'
    return 1 if accelerated else os.cpu_count() or 1


def _estimated(comparison: Comparison, jobs: int) -> float:
    """Seconds for all runs, from a few steps of the first."""
    config, folder = TrainConfig.resolve(comparison.argv(comparison.entries[0], {})), comparison.output / 'no run'
    if config.freeze_backbone:
        time_run(config, folder)  # computes the features, which all runs share
    runs = len(comparison.entries) * (comparison.trials + comparison.seeds)
    return runs * time_run(config, folder).hours * 3600 / jobs
