"""`ccl-timm compare`."""

import argparse
from pathlib import Path

import torch

from ccl_timm.cli.common import add_plan, shared_args
from ccl_timm.console import log_info, show_duration
from ccl_timm.console.arguments import COUNT, SHARE, Parser, integer, real
from ccl_timm.errors import UserError, require_absent
from ccl_timm.experiments import plots
from ccl_timm.experiments.compare import METRICS, RECORDS, Comparison, entries_of, read_records, run_comparison
from ccl_timm.experiments.compare_result import draw_rows, show_comparison, split_comparisons
from ccl_timm.experiments.estimate import time_run
from ccl_timm.experiments.statistics import EQUIVALENCE
from ccl_timm.experiments.tables import read_benchmark, to_cli_args
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.evaluation import pick_device

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    'Compare losses with cross-entropy on your own images. Each has the head made for it, and cross-entropy on that '
    'head and on others is its control. With --trials, every loss is tuned with the same effort on a share of the '
    'training images; the final runs train on all of them and are measured on the validation split. Finished runs are '
    'not repeated. Arguments after -- go to `timm train.py`.'
)
_DEFAULTS = {'losses': ['cc', 'arcface', 'pod'], 'backbone': 'resnet18', 'trials': 0, 'seeds': 3, 'metric': 'top1'}
_RECIPE, _FROZEN_RECIPE = 'finetune', 'probe'


def add_arguments(parser: Parser) -> None:
    parser.usage = f'{parser.prog} --data-dir DIR --losses A B [options] [-- arguments of the training script]'
    add = parser.add_argument
    add('--table', metavar='NAME', help='a packaged benchmark: losses, backbone, trials, seeds and settings')
    add('--losses', nargs='+', metavar='NAME',
        help=f'default {" ".join(_DEFAULTS["losses"])}; HEAD:NAME for another head')  # fmt: skip
    add('--backbone', metavar='NAME', help=f'a timm architecture, default {_DEFAULTS["backbone"]}')
    add('--config', metavar='RECIPE',
        help=f'settings that all runs share, default {_RECIPE}, with --freeze-backbone {_FROZEN_RECIPE}')  # fmt: skip
    add('--embedding', type=COUNT, metavar='N',
        help='width of an embedding before the cosines of head cosine: a margin needs features to change')  # fmt: skip
    add('--trials', type=integer(0, 10_000), metavar='N', help='tuning runs of each loss, default 0: none')
    add('--tune-fraction', type=SHARE, default=0.2, metavar='F', help='share held out for tuning, default 0.2')
    add('--metric', choices=METRICS, help='what is compared, default top1')
    add('--unseen', metavar='DIR', help='folder of classes that are not trained, for --metric unseen_recall_at_1')
    add('--within', type=real(0, 100, above=True), default=EQUIVALENCE, metavar='X',
        help=f'points within which losses count as equal, default {EQUIVALENCE}')  # fmt: skip
    add('--jobs', type=COUNT, metavar='N', help='runs at a time; default one for each core, or 1 with an accelerator')
    add('--freeze-backbone', action='store_true', help='as for `timm train.py`: minutes in the place of hours')
    add('--show', metavar='PATH', help='print what a file of records or the folder of one shows, and train nothing')
    add('--plot', default='', metavar='FILE', help='draw differences to cross-entropy to this new .svg or .png file')
    add_plan(parser, 'output/compare', f'final runs of each loss, default {_DEFAULTS["seeds"]}')


def run(args: argparse.Namespace) -> int:
    if args.plot:
        require_absent(args.plot)
        plots.check_name(args.plot)
    if args.show:
        _show(Path(args.show), args)
        return 0
    comparison = _comparison(args)
    comparison.check()
    if args.dry_run:
        for entry in comparison.entries:
            print(f'{entry.name}: timm train.py {" ".join(comparison.argv(entry, {}))}')
        return 0
    jobs = args.jobs or _default_jobs(comparison)
    log_info(f'about {show_duration(_estimated(comparison, jobs))} for all runs')
    if not args.estimate:
        run_comparison(comparison, jobs)
        _show(comparison.file, args, comparison.key)
        log_info(f'the runs are in {comparison.file}; `ccl-timm compare --show {comparison.file}` prints this again')
    return 0


def _show(path: Path, args: argparse.Namespace, key: str | None = None) -> None:
    """Print the comparisons of a file of records, or of the file in a folder, and draw the last one."""
    file = path / RECORDS if path.is_dir() else path
    comparisons = split_comparisons(read_records(file, key))
    if not comparisons:
        raise UserError(f"'{file}' has no runs of a comparison.")
    print('\n\n'.join(show_comparison(records, args.within) for records in comparisons))
    if args.plot:
        rows, metric = draw_rows(comparisons[-1], args.within), comparisons[-1][0]['metric']
        title = f'{metric}, difference to cross-entropy on a linear head'
        plots.save(plots.draw_forest(rows, title, args.within), Path(args.plot))
        log_info(f'written: {args.plot}')


def _comparison(args: argparse.Namespace) -> Comparison:
    config = _FROZEN_RECIPE if args.freeze_backbone else _RECIPE
    table = {**_DEFAULTS, 'config': config, **(read_benchmark(args.table) if args.table else {})}
    given = {name: getattr(args, name) for name in (*_DEFAULTS, 'config')}
    chosen = {name: table[name] if value is None else value for name, value in given.items()}
    shared = ['--config', chosen['config'], '--smoothing', '0.0', *to_cli_args(table.get('set', {}))]
    shared += shared_args(args)
    if args.freeze_backbone and '--freeze-backbone' not in shared:
        shared.append('--freeze-backbone')
    heads = {'cosine': {'feature_dim': args.embedding}} if args.embedding else table.get('head_options', {})
    return Comparison(
        chosen['backbone'], entries_of(chosen['losses']), (*shared, *args.train_args), Path(args.output),
        chosen['trials'], chosen['seeds'], args.tune_fraction, args.unseen, chosen['metric'], heads,
    )  # fmt: skip


def _default_jobs(comparison: Comparison) -> int:
    accelerated = pick_device(TrainConfig.resolve(list(comparison.args)).device) != 'cpu'
    return 1 if accelerated else torch.get_num_threads()


def _estimated(comparison: Comparison, jobs: int) -> float:
    """Seconds for all runs, from a few steps of the first."""
    config, folder = TrainConfig.resolve(comparison.argv(comparison.entries[0], {})), comparison.output / 'no run'
    if config.freeze_backbone:
        time_run(config, folder)  # computes the features, which all runs share
    runs = len(comparison.entries) * (comparison.trials + comparison.seeds)
    return runs * time_run(config, folder).hours * 3600 / jobs
