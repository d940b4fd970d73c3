"""The training script's flags: timm's names and defaults, some of our own, and how recipe and words combine."""

import argparse
import shlex
from argparse import SUPPRESS
from typing import Any

from ccl_timm.console.arguments import (
    COUNT,
    FRACTION,
    PROBABILITY,
    RATE,
    SHARE,
    UPSTREAM_ONLY,
    WORKERS,
    KeyValues,
    Parser,
    integer,
    real,
)
from ccl_timm.errors import UserError, did_you_mean
from ccl_timm.training import recipes

__all__ = ['OWN', 'resolve', 'train_parser']

# flags that timm's train.py does not have
OWN = (
    'class_names', 'class_weight', 'deterministic', 'in_memory', 'loss', 'loss_kwargs', 'lr_batch', 'memory_format',
    'pad_crop', 'patience', 'samples_per_class', 'scale_lr', 'tracker', 'train_fraction', 'val_fraction',
)  # fmt: skip


def train_parser(prog: str = 'timm train.py') -> Parser:
    """The flags of the built-in training script, with timm's names and defaults."""
    parser = Parser(
        prog=prog,
        description="Train an image classifier. Names and defaults are those of timm's train.py; without any data "
        'named it trains on the embedded handwritten digits.',
    )
    for add in (_add_data, _add_model, _add_training, _add_schedule, _add_augmentation, _add_run):
        add(parser)
    return parser


def _add_data(parser: Parser) -> None:
    add = parser.add_argument_group('data').add_argument
    add('-c', '--config', default='', metavar='RECIPE', help='recipe: a packaged name such as digits, or a YAML file')
    add('data', nargs='?', default=None, metavar='DIR', help='data folder, the same as --data-dir')
    add('--data-dir', default=None, metavar='DIR', help='folder with train/ and validation/, a folder a class in each')
    add('--dataset', default='', metavar='NAME', help="'digits', 'torch/mnist', 'hfds/owner/name', ...; empty: folder")
    add('--train-split', default='train', metavar='NAME', help='name of the training part')
    add('--val-split', default='validation', metavar='NAME', help="name of the validation part; '' for none")
    add('--val-fraction', type=SHARE, default=None, metavar='F', help='hold out this share of each training class')
    add('--train-fraction', type=SHARE, default=None, metavar='F', help='train on this share of each class only')
    add('--dataset-download', action='store_true', help='let torch/ data sets download themselves')
    add('--class-map', default='', metavar='FILE', help='class names, one a line, in the order of their numbers')
    add('--class-names', nargs='+', default=None, metavar='NAME', help='the same in words; args.yaml has it')
    add('--in-memory', default='auto', choices=('auto', 'on', 'off'), help='keep images decoded in memory; auto: small')
    add(
        '--samples-per-class',
        type=COUNT,
        default=None,
        metavar='K',
        help='batches of B/K classes with K images each',
    )
    add('--input-img-mode', default=None, metavar='MODE', help="colour mode of images, default 'RGB', or 'L' for 1")
    add('--input-key', default=None, help='column of images (hfds/)')
    add('--target-key', default=None, help='column of labels (hfds/)')


def _add_model(parser: Parser) -> None:
    add = parser.add_argument_group('model').add_argument
    add('--model', default='resnet50', metavar='NAME', help='any timm name, or one of ours such as resnet18_cam')
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--pretrained-path', default=None, metavar='FILE', help='pretrained weights from a file')
    add('--initial-checkpoint', default='', metavar='FILE', help='load these weights after building the model')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='K=V', help='small_input=True ...')
    add('--num-classes', type=COUNT, default=None, metavar='N', help='default: as many as the data has')
    add('--gp', default=None, metavar='POOL', help='global pooling')
    add('--img-size', type=COUNT, default=None, metavar='N', help='image size, default that of the model')
    add('--in-chans', type=COUNT, default=None, metavar='N', help='input channels')
    add('--input-size', type=COUNT, nargs=3, default=None, metavar='N', help='channels, height, width')
    add('--crop-pct', type=real(0, 2, above=True), default=None, metavar='F', help='centre crop at evaluation')
    add('--mean', type=real(0, 1), nargs='+', default=None, help='pixel mean for normalisation')
    add('--std', type=real(0, 1, above=True), nargs='+', default=None, help='pixel deviation for normalisation')
    add('--interpolation', default='', metavar='NAME', help='of resizing')
    add('--drop', type=FRACTION, default=0.0, metavar='P', help='dropout before the classifier')
    add('--drop-path', type=FRACTION, default=None, metavar='P', help='stochastic depth')
    add('--bn-momentum', type=PROBABILITY, default=None)
    add('--bn-eps', type=real(0, 1, above=True), default=None)
    add('--grad-checkpointing', action='store_true', help='less memory, more time')
    add('--channels-last', action='store_true', help='channels-last memory layout')
    add('--memory-format', default='auto', choices=('auto', 'channels_last', 'contiguous'),
        help='of images; auto: what is faster on the device')  # fmt: skip
    add('--torchcompile', nargs='?', const='inductor', default=None, metavar='BACKEND', help='compile model and loss')
    add('--torchcompile-mode', default=None)
    add('--loss', default='ce', metavar='NAME', help="one of `ccl-timm losses`, or timm's ce, bce, asl, poly")
    add('--loss-kwargs', nargs='*', default={}, action=KeyValues, metavar='K=V', help="the loss's options")
    add('--class-weight', default='', metavar='W', help="'balanced', or a file of 'NAME WEIGHT' lines; for the CE part")
    add(
        '--smoothing',
        type=FRACTION,
        default=0.1,
        metavar='F',
        help='label smoothing, for losses that have it',
    )


def _add_training(parser: Parser) -> None:
    add = parser.add_argument_group('optimizer and device').add_argument
    add('-b', '--batch-size', type=COUNT, default=128, metavar='N', help='images a step and process')
    add('-vb', '--validation-batch-size', type=COUNT, default=None, metavar='N')
    add('--grad-accum-steps', type=COUNT, default=1, metavar='N', help='batches an optimizer step')
    add('--opt', default='sgd', metavar='NAME', help="timm's optimizers")
    add('--opt-eps', type=real(0, 1, above=True), default=None)
    add('--opt-betas', type=FRACTION, nargs='+', default=None)
    add('--opt-kwargs', nargs='*', default={}, action=KeyValues, metavar='K=V')
    add('--momentum', type=FRACTION, default=0.9)
    add('--weight-decay', type=real(0, 1000), default=2e-5)
    add('--clip-grad', type=real(0, above=True), default=None, metavar='NORM')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'))
    add(
        '--layer-decay',
        type=real(0, 1, above=True),
        default=None,
        help='factor on lr from layer to layer',
    )
    add('--layer-decay-min-scale', type=PROBABILITY, default=0.0)
    add('--layer-decay-no-opt-scale', type=PROBABILITY, default=None)
    add('--model-ema', action='store_true', help='keep a moving average of the weights, and validate it')
    add('--model-ema-decay', type=FRACTION, default=0.9998)
    add('--model-ema-warmup', action='store_true')
    add('--sync-bn', action='store_true', help='batch norm over all processes')
    add('--dist-bn', default='reduce', choices=('reduce', 'broadcast', ''), help='batch norm statistics after an epoch')
    add('--device', default='auto', help='cpu, cuda, ...; auto takes an accelerator if there is one')
    add('--device-modules', nargs='+', default=None, metavar='MODULE', help='modules to import first')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'))


def _add_schedule(parser: Parser) -> None:
    add = parser.add_argument_group('learning rate').add_argument
    add('--epochs', type=COUNT, default=300, metavar='N')
    add('--lr', type=RATE, default=None, help='learning rate, overrides --lr-base')
    add(
        '--lr-batch',
        type=COUNT,
        default=None,
        metavar='N',
        help="global batch that --lr is for; default the recipe's",
    )
    add('--scale-lr', action='store_true', help='scale --lr from that batch to the one in use')
    add('--lr-base', type=RATE, default=0.1, help='lr = lr_base * global batch / lr_base_size')
    add('--lr-base-size', type=COUNT, default=256)
    add('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'))
    add('--sched', default='cosine', metavar='NAME', help="timm's schedulers")
    add('--sched-on-updates', action='store_true', help='a schedule step with each update, not each epoch')
    add('--warmup-epochs', type=integer(0), default=5)
    add('--warmup-lr', type=real(0, 1000), default=1e-5)
    add('--warmup-prefix', action='store_true')
    add('--cooldown-epochs', type=integer(0), default=0)
    add('--min-lr', type=real(0, 1000), default=0.0)
    add('--decay-epochs', type=real(0, above=True), default=90)
    add('--decay-milestones', type=COUNT, nargs='+', default=[90, 180, 270])
    add('--decay-rate', '--dr', type=real(0, 10, above=True), default=0.1)
    add(
        '--patience',
        type=COUNT,
        default=None,
        metavar='N',
        help='stop after N epochs without a better --eval-metric',
    )
    add('--patience-epochs', type=integer(0), default=10, help='of the plateau schedule')


def _add_augmentation(parser: Parser) -> None:
    add = parser.add_argument_group('augmentation').add_argument
    add('--no-aug', action='store_true', help='no augmentation')
    add(
        '--pad-crop',
        type=integer(0),
        default=0,
        metavar='PX',
        help='zero-pad and crop at random instead of resized crops',
    )
    add('--train-crop-mode', default=None, choices=('rrc', 'rkrc', 'rkrr'))
    add('--scale', type=real(0, 4, above=True), nargs=2, default=[0.08, 1.0])
    add('--ratio', type=real(0, 100, above=True), nargs=2, default=[3.0 / 4.0, 4.0 / 3.0])
    add('--hflip', type=PROBABILITY, default=0.5)
    add('--vflip', type=PROBABILITY, default=0.0)
    add('--color-jitter', type=real(0, 10), default=0.4)
    add('--color-jitter-prob', type=PROBABILITY, default=None)
    add('--grayscale-prob', type=PROBABILITY, default=None)
    add('--gaussian-blur-prob', type=PROBABILITY, default=None)
    add('--aa', default=None, metavar='POLICY', help='AutoAugment or RandAugment')
    add('--reprob', type=PROBABILITY, default=0.0, help='random erasing')
    add('--remode', default='pixel')
    add('--recount', type=integer(1, 1000), default=1)
    add('--mixup', type=real(0, 100), default=0.0)
    add('--cutmix', type=real(0, 100), default=0.0)
    add('--cutmix-minmax', type=PROBABILITY, nargs=2, default=None)
    add('--mixup-prob', type=PROBABILITY, default=1.0)
    add('--mixup-switch-prob', type=PROBABILITY, default=0.5)
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'))
    add('--mixup-off-epoch', type=integer(0), default=0)
    add('--train-interpolation', default='random')


def _add_run(parser: Parser) -> None:
    add = parser.add_argument_group('run').add_argument
    add('--seed', type=integer(0), default=42)
    add('--output', default='', metavar='DIR', help='default ./output/train')
    add('--experiment', default='', metavar='NAME', help="the run's folder in it; default a time stamp")
    add('--resume', default='', metavar='FILE', help="a checkpoint to go on from; 'auto': that of --experiment, if any")
    add('--no-resume-opt', action='store_true', help='without the state of the optimizer')
    add('--checkpoint-hist', type=COUNT, default=10, metavar='N', help='how many checkpoints to keep')
    add('--val-interval', type=COUNT, default=1, metavar='N', help='epochs between validations')
    add('--log-interval', type=COUNT, default=50, metavar='N', help='steps between log lines')
    add('--eval-metric', default='top1', choices=('top1', 'macro_top1', 'top5', 'loss'),
        help='what the best checkpoint is best in; macro_top1: mean accuracy of the classes')  # fmt: skip
    add('-j', '--workers', type=WORKERS, default=4, metavar='N', help='loader processes; 0 for none')
    add('--pin-mem', action='store_true')
    add('--deterministic', action='store_true', help='only algorithms that repeat their results bit for bit')
    add('--tracker', default='', choices=('', 'tensorboard', 'trackio', 'wandb'), help='show metrics elsewhere too')
    add('--log-wandb', action='store_true')
    add('--wandb-project', default=None)
    add('--wandb-tags', nargs='+', default=[])
    add('--wandb-resume-id', default='')


def resolve(argv: list[str], prog: str = 'timm train.py') -> tuple[argparse.Namespace, dict[str, str]]:
    """Combine defaults, the recipe and the words typed, in this order.

    Args:
        argv: the words after the script's name.
        prog: what the help and errors call the script.

    Returns:
        All settings, of plain types, and for each its source: ``'typed'``, ``'default'``, or the recipe's name.

    Raises:
        UserError: an unknown flag or recipe key, a value of the wrong type.
    """
    parser = train_parser(prog)
    defaults = {a.dest: a.default for a in parser._actions if a.default is not SUPPRESS and a.dest != 'help'}
    for action in parser._actions:
        action.default = SUPPRESS
    typed = vars(parser.parse_strictly(argv))
    folder = typed.pop('data', None)
    if folder is not None:
        typed.setdefault('data_dir', folder)
    recipe_name = typed.get('config') or ('' if {'data_dir', 'dataset'} & typed.keys() else 'digits')
    recipe = read_for(parser, defaults, recipe_name, typed) if recipe_name else {}
    recipe = _without_rivals(recipe, typed)
    if recipe.get('lr') is not None:
        batch = recipe.get('batch_size', defaults['batch_size']) * recipe.get('grad_accum_steps', 1)
        recipe = {'lr_batch': batch, **recipe}
    settings = {**defaults, **recipe, **typed, 'config': recipe_name}
    settings.pop('data')
    sources = {key: 'typed' if key in typed else recipe_name if key in recipe else 'default' for key in settings}
    return argparse.Namespace(**settings), sources


def _without_rivals(recipe: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a recipe says in other words than those typed, such as lr where --lr-base was."""
    recipe = dict(recipe)
    if 'data_dir' in typed and recipe.get('dataset') == 'digits':  # the only set without a folder
        del recipe['dataset']
    if 'lr_base' in typed:
        recipe.pop('lr', None)
    if 'input_size' in typed:
        recipe.pop('img_size', None)
        recipe.pop('in_chans', None)
    elif recipe.get('input_size') and {'img_size', 'in_chans'} & typed.keys():
        channels, height, _ = recipe.pop('input_size')
        recipe = {'in_chans': channels, 'img_size': height, **recipe}
    return recipe


def read_for(parser: Parser, defaults: dict[str, Any], name: str, typed: dict[str, Any]) -> dict[str, Any]:
    """Read a recipe and check its keys and types against the flags; what only describes the recipe is left out."""
    actions = {a.dest: a for a in parser._actions if a.dest not in ('help', 'config', 'data')}
    path = recipes.find_recipe(name)
    recipe = recipes.split_options(recipes.read_recipe(path), typed.get('loss'), typed.get('model'))
    recipes.check_modules(recipe, typed.get('device_modules'), path)
    checked = {}
    for key, value in recipe.items():
        if key in recipes.DESCRIPTIVE or (key in UPSTREAM_ONLY and value in (UPSTREAM_ONLY[key], None)):
            continue
        if key in UPSTREAM_ONLY:
            raise UserError(
                f"Recipe {path}: '{key}: {value}' needs timm's own train.py: "
                f'`ccl-timm run path/to/train.py --config {shlex.quote(str(path))}`.'
            )
        if key not in actions:
            raise UserError(
                f"Recipe {path} has an unknown key '{key}'{did_you_mean(key, actions)} See `{parser.prog} -h`."
            )
        checked[key] = recipes.check_value(actions[key], defaults[key], value, path)
    return checked
