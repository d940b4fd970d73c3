"""`ccl-timm features`."""

import argparse
from pathlib import Path

import numpy as np
import torch

from ccl_timm.cli.common import add_data, add_loading, add_output, add_source
from ccl_timm.console import log_info, table
from ccl_timm.console.arguments import Parser, integer
from ccl_timm.data.config import DataConfig
from ccl_timm.errors import UserError
from ccl_timm.experiments.features import analyse, describe, draw, draw_neighbours, show_measures, split_outputs
from ccl_timm.experiments.plots import draw_features, in_the_plane, save
from ccl_timm.training.checkpoints import Trained, load_trained
from ccl_timm.training.evaluation import choose_data, open_for, pick_device
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.validation import hint_at_last_epoch

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    "Draw a model's features, attention, confusion and nearest images. Features are drawn as they are if two wide, "
    'else by t-SNE; distances, norms and what other classifiers make of the features are printed, and kept for '
    '`ccl-timm report`.'
)


def add_arguments(parser: Parser) -> None:
    add_source(parser, 'folder of a run or of an export, or a checkpoint file; of several, one picture', nargs='+')
    add_output(parser, 'DIR', 'where pictures go; default RUN/pictures, for `ccl-timm report`')
    add_data(parser)
    add_loading(parser)
    add = parser.add_argument
    add('--format', default='png', choices=('png', 'svg'), help='of the pictures, default png, which reports show')
    text = 'features: input of the last layer (default); hidden: output of the first layer of cam and mlp'
    add('--layer', default='features', choices=('features', 'hidden'), help=text)
    add('--limit', type=integer(2), default=1500, metavar='N', help='images of each split for t-SNE, default 1500')


def run(args: argparse.Namespace) -> int:
    if len(args.source) > 1:
        return _run_side_by_side(args)
    source = args.source[0]
    trained = load_trained(source, args.use_ema)
    data, splits = _outputs(args, trained)
    folder = Path(args.output) if args.output else RunDir.of(source).path / 'pictures'
    title, last = describe(trained), list(splits)[-1]
    drawn = draw(splits, trained.labels, title, folder, args.limit, args.layer, args.format)
    if args.layer == 'features':
        dataset = open_for(data, data.val_split, trained, named=args.split is not None)
        path, title = folder / f'retrieval.{args.format}', f'{title}\n{last} split'
        drawn += draw_neighbours(dataset, splits[last], trained.labels, title, path)
    for path in drawn:
        log_info(f'written: {path}')
    weight = getattr(trained.model.get_classifier(), 'weight', None) if args.layer == 'features' else None
    found = analyse(splits, None if weight is None else weight.detach().flatten(1).cpu().double().numpy())
    print(table(show_measures([{name: [x] for name, x in own.items()} for own in found.values()]), ('', *splits)))
    other = args.output or args.data_dir or args.dataset
    if trained.epoch is not None and args.layer == 'features' and not other:
        run = RunDir.of(source)
        path = run.set_features({'split': last, 'epoch': trained.epoch, 'measures': found[last]})
        log_info(f'written: {path}')
        hint_at_last_epoch(run, trained.epoch)
    return 0


def _outputs(args: argparse.Namespace, trained: Trained) -> tuple[DataConfig, dict[str, dict[str, np.ndarray]]]:
    """The data of a trained model, and what it computes of both splits."""
    device = torch.device(pick_device(args.device))
    data = choose_data(trained.settings, args.data_dir, args.dataset, args.split, args.batch_size)
    return data, split_outputs(trained, data, args.split is not None, device, args.workers, args.layer)


def _run_side_by_side(args: argparse.Namespace) -> int:
    """Draw the validation split's features of several models in one picture, a panel each, named as its folder."""
    if not args.output:
        raise UserError('A picture of several runs belongs to none of them: give its folder with --output DIR.')
    names = [RunDir.of(source).path.name for source in args.source]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"Two runs are in folders called '{twice}', which are the names of the panels: rename one.")
    panels, classes, caption, split = {}, None, '', ''
    for source, name in zip(args.source, names, strict=True):
        trained = load_trained(source, args.use_ema)
        if classes not in (None, trained.labels):
            raise UserError(f"'{source}' has other classes than '{args.source[0]}': one picture needs the same.")
        data, splits = _outputs(args, trained)
        classes, split = trained.labels, data.val_split
        points, caption = in_the_plane({name: (splits[split]['features'], splits[split]['labels'])}, args.limit)
        panels |= points
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{args.layer}.{args.format}'
    save(draw_features(panels, classes, f'{args.layer} of the {split} split', caption, shared=False), path)
    log_info(f'written: {path}')
    return 0
