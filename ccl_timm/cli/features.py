"""`ccl-timm features`."""

import argparse
from pathlib import Path

import torch

from ccl_timm.cli.common import add_data, add_loading, add_output, add_source
from ccl_timm.console import log_info, table
from ccl_timm.console.arguments import Parser, integer
from ccl_timm.experiments.features import analyse, describe, draw, split_outputs
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.evaluation import choose_data, pick_device
from ccl_timm.training.run_dir import RunDir

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    "Draw a model's features, attention and confusion. Features are drawn as they are if two wide, else by t-SNE; "
    'distances, norms and what other classifiers make of the features are printed.'
)


def add_arguments(parser: Parser) -> None:
    add_source(parser)
    add_output(parser, 'DIR', 'where pictures go; default RUN/pictures, for `ccl-timm report`')
    add_data(parser)
    add_loading(parser)
    add = parser.add_argument
    text = 'features: input of the last layer (default); hidden: output of the first layer of cam and mlp'
    add('--layer', default='features', choices=('features', 'hidden'), help=text)
    add('--limit', type=integer(2), default=1500, metavar='N', help='images of each split for t-SNE, default 1500')


def run(args: argparse.Namespace) -> int:
    device = torch.device(pick_device(args.device))
    trained = load_trained(args.source, args.use_ema)
    data = choose_data(trained.settings, args.data_dir, args.dataset, args.split, args.batch_size)
    splits = split_outputs(trained, data, args.split is not None, device, args.workers, args.layer)
    folder = Path(args.output) if args.output else RunDir.of(args.source).path / 'pictures'
    for path in draw(splits, trained.labels, describe(trained), folder, args.limit, args.layer):
        log_info(f'written: {path}')
    weight = getattr(trained.model.get_classifier(), 'weight', None) if args.layer == 'features' else None
    rows = analyse(splits, None if weight is None else weight.detach().flatten(1).cpu().double().numpy())
    print(table(rows, ('', *splits)))
    return 0
