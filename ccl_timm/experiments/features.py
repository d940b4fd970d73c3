"""A trained model's features: pictures of them, and how well they separate classes without its classifier."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ccl_timm.console import log_info, table
from ccl_timm.console.arguments import WORKERS, Parser, integer
from ccl_timm.errors import UserError
from ccl_timm.experiments import analysis, plots
from ccl_timm.training import evaluation, retrieval
from ccl_timm.training.checkpoints import Trained, load_trained
from ccl_timm.training.run_dir import RunDir

__all__ = ['analyse', 'draw', 'main']


def main(argv: list[str], prog: str) -> int:
    """Draw a model's features, attention and confusion, and print what its features show."""
    args = _parser(prog).parse_strictly(argv)
    trained = load_trained(args.source, use_ema=args.use_ema)
    splits = _read_splits(args, trained)
    folder = Path(args.output) if args.output else RunDir.of(args.source).path / 'pictures'
    names = trained.class_names or [str(k) for k in range(trained.model.num_classes)]
    for path in draw(splits, names, _title(trained), folder, args.limit, args.layer):
        log_info(f'written: {path}')
    weight = getattr(trained.model.get_classifier(), 'weight', None) if args.layer == 'features' else None
    rows = analyse(splits, None if weight is None else weight.detach().flatten(1).cpu().double().numpy())
    print(table(rows, ('', *splits)))
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Draw a trained model's features (as they are if two wide, else by t-SNE), its attention, if "
        'it has any, and its confusion; print distances, norms, and what other classifiers make of its features.',
    )
    add = parser.add_argument
    add('source', metavar='RUN', help='folder of a run or of an export, or a checkpoint file')
    add(
        '-o',
        '--output',
        default='',
        metavar='DIR',
        help='where pictures go; default RUN/pictures, for `ccl-timm report`',
    )
    add('--data-dir', default=None, metavar='DIR', help="default: the run's")
    add('--dataset', default=None, metavar='NAME')
    add(
        '--split',
        default=None,
        metavar='NAME',
        help='split beside the training split; default: the one the run validated on',
    )
    add('--layer', default='features', choices=('features', 'hidden'),
        help='features: input of the last layer; hidden: output of the first layer of cam and mlp')  # fmt: skip
    add('--limit', type=integer(2), default=1500, metavar='N', help='images of each split for t-SNE')
    add('--use-ema', action='store_true', help='the moving average of the weights')
    add('-b', '--batch-size', type=integer(1), default=256, metavar='N')
    add('-j', '--workers', type=WORKERS, default=4, metavar='N')
    add('--device', default='auto')
    return parser


def _read_splits(args: argparse.Namespace, trained: Trained) -> dict[str, dict[str, np.ndarray]]:
    """The outputs for the training and the other split; ``features`` are those of --layer."""
    device = torch.device(evaluation.pick_device(args.device))
    data = evaluation.data_config_of(args, trained.settings)
    config = {**trained.data_config, 'batch_size': args.batch_size}
    names = {'training': data.train_split, data.val_split or 'none': data.val_split}
    model, splits = trained.model.to(device), {}
    for split, name in names.items():
        if not name:
            raise UserError('The run had no split to validate on: give --split NAME.')
        dataset = evaluation.open_for(
            data,
            name,
            config['input_size'][0],
            trained.class_names,
            training=split == 'training',
            named=args.split is not None,
        )
        evaluation.check_labels(dataset, trained)
        loader = evaluation.loader_of(dataset, config, device, args.workers)
        found = retrieval.extract_outputs(model, loader, (args.layer, 'logits', 'attention'), f'{split} split')
        if args.layer not in found:
            head = type(model.get_classifier()).__name__
            raise UserError(f'Only the heads cam and mlp have --layer {args.layer}; this model has a {head}.')
        found['features'] = found.pop(args.layer)
        splits[split] = {key: value.cpu().numpy() for key, value in found.items()}
        splits[split] |= {'features': splits[split]['features'].astype(np.float64)}
    return splits


def _title(trained: Trained) -> str:
    loss = trained.settings.get('loss') or ''
    when = f', after epoch {trained.epoch + 1}' if trained.epoch is not None else ''
    return f'{trained.name}{f" trained with {loss}" if loss else ""}{when}'


def draw(
    splits: dict[str, dict[str, np.ndarray]],
    names: list[str],
    title: str,
    folder: Path,
    limit: int,
    layer: str = 'features',
) -> list[Path]:
    """Draw features of both splits, and attention and confusion of the last one.

    Args:
        splits: ``features`` (N, D), ``logits`` (N, K), ``labels`` (N,) and perhaps ``attention`` (N, C), by split.
        names: of the classes.
        title: of the model.
        folder: where to write; created if it does not exist.
        limit: see :func:`plots.in_the_plane`.
        layer: of which the features are, ``features`` or ``hidden``; their picture is named after it.

    Returns:
        The files written.
    """
    points, how = plots.in_the_plane({split: (own['features'], own['labels']) for split, own in splits.items()}, limit)
    caption = '\n'.join([how, *(_distances(split, own) for split, own in splits.items())])
    heading = title if layer == 'features' else f'{title}, {layer} layer'
    drawn = {layer: plots.draw_features(points, names, heading, caption)}
    name, last = list(splits.items())[-1]
    title = f'{title}\n{name} split'
    if 'attention' in last:
        drawn['attention'] = plots.draw_attention(last['attention'], last['labels'], names, title)
    confusion = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(confusion, (last['labels'], last['logits'].argmax(1)), 1)
    drawn['confusion'] = plots.draw_confusion(confusion, names, title)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        plots.save(figure, folder / f'{name}.png')
    return [folder / f'{name}.png' for name in drawn]


def _distances(split: str, own: dict[str, np.ndarray]) -> str:
    intra, inter = analysis.class_distances(own['features'], own['labels'])
    return f'{split}: mean distance to the class centre {intra:.3g}, between class centres {inter:.3g}'


def analyse(splits: dict[str, dict[str, np.ndarray]], vectors: np.ndarray | None) -> list[tuple[str, ...]]:
    """What the features of each split show, as rows of a table: a name, and a value for each split.

    Args:
        splits: as for :func:`draw`.
        vectors: the classifier's, one a class (K, D); None if it has none.
    """
    known = splits['training']
    columns: list[dict[str, Any]] = []
    for own in splits.values():
        features, labels = own['features'], own['labels']
        correct = own['logits'].argmax(1) == labels
        intra, inter = analysis.class_distances(features, labels)
        eigenvalues = analysis.eigenvalue_variance(features, labels)
        below, above = analysis.accuracy_by_norm(features, correct)
        column = {
            'images': f'{len(labels)}',
            'mean distance to the class centre': f'{intra:.4g}',
            'mean distance between class centres': f'{inter:.4g}',
            'variance of eigenvalues within classes, unit features': f'{eigenvalues:.3g}',
            'top-1 %, features shorter than the mean': f'{below:.2f}',
            'top-1 %, features longer than the mean': f'{above:.2f}',
            'top-1 %, the model': f'{100 * correct.mean():.2f}',
        }
        if vectors is not None and vectors.shape[1] == features.shape[1]:
            column['top-1 %, cosine with class vectors'] = f'{analysis.cosine_accuracy(features, labels, vectors):.2f}'
        gaussian = analysis.gaussian_accuracy(known['features'], known['labels'], features, labels)
        columns.append({**column, 'top-1 %, Gaussian discriminant': f'{gaussian:.2f}'})
    return [(name, *(column[name] for column in columns)) for name in columns[0]]
