"""The training script's settings: timm's names and defaults, some of our own, and how recipe and flags combine."""

import shlex
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ccl_timm.console.arguments import COUNT, FRACTION, PROBABILITY, RATE, UPSTREAM_ONLY, Parser, integer, real
from ccl_timm.console.options import Options, option
from ccl_timm.data.config import LoaderConfig
from ccl_timm.errors import UserError, did_you_mean
from ccl_timm.training import recipes

__all__ = ['ModelConfig', 'TrainConfig', 'diff_settings']


_WITHOUT_COOLDOWN = ('none', 'step', 'multistep', 'constant', 'plateau')  # timm's schedules that do not have it


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(Options, title='recipe'):
    """Where settings that are not given come from."""

    config: str = option(
        '', None, '-c', metavar='RECIPE', varies='nothing', help='a packaged recipe such as digits, or a YAML file'
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options, title='model'):
    """The model, its weights, and the size of its images."""

    model: str = option(
        'resnet50', metavar='NAME', varies='method', help='any timm name, or one of ours such as resnet18_cam'
    )
    pretrained: bool = option(False, help='start from pretrained weights')
    pretrained_path: str | None = option(None, metavar='FILE', varies='budget', help='pretrained weights from a file')
    initial_checkpoint: str = option('', metavar='FILE', help='load these weights after building the model')
    model_kwargs: dict[str, Any] = option({}, varies='method', help='small_input=True ...')
    freeze_backbone: bool = option(
        False, own=True, help="train head and loss only, on the backbone's features, computed once"
    )
    feature_views: int = option(
        1, integer(1, 1000), metavar='N', own=True, varies='budget',
        help="with it, features of each image as in validation and of N-1 augmented copies, one drawn for each epoch",
    )  # fmt: skip
    gp: str | None = option(None, metavar='POOL', help='global pooling')
    img_size: int | None = option(None, COUNT, metavar='N', help='image size, default that of the model')
    in_chans: int | None = option(None, COUNT, metavar='N', help='input channels')
    input_size: list[int] | None = option(None, COUNT, nargs=3, metavar='N', help='channels, height, width')
    crop_pct: float | None = option(None, real(0, 2, above=True), metavar='F', help='centre crop at evaluation')
    mean: list[float] | None = option(None, real(0, 1), nargs='+', help='pixel mean for normalisation')
    std: list[float] | None = option(None, real(0, 1, above=True), nargs='+', help='pixel deviation for normalisation')
    interpolation: str = option('', metavar='NAME', help='of resizing')
    drop: float = option(0.0, FRACTION, metavar='P', help='dropout before the classifier')
    drop_path: float | None = option(None, FRACTION, metavar='P', help='stochastic depth')
    bn_momentum: float | None = option(None, PROBABILITY)
    bn_eps: float | None = option(None, real(0, 1, above=True))
    grad_checkpointing: bool = option(False, varies='budget', help='less memory, more time')
    channels_last: bool = option(False, varies='budget', help='channels-last memory layout')
    memory_format: str = option(
        'auto', choices=('auto', 'channels_last', 'contiguous'), own=True, varies='budget',
        help='of images; auto: the one known to be faster; long runs time both',
    )  # fmt: skip
    torchcompile: str | None = option(
        None, nargs='?', const='inductor', metavar='BACKEND', varies='budget', help='compile model and loss'
    )
    torchcompile_mode: str | None = option(None, varies='budget')


@dataclass(frozen=True, kw_only=True)
class LossConfig(Options, title='loss'):
    """The loss and its options."""

    loss: str = option(
        'ce',
        metavar='NAME',
        own=True,
        varies='method',
        help="one of `ccl-timm losses`, timm's ce, bce, asl, poly, or pml:NAME",
    )
    loss_kwargs: dict[str, Any] = option({}, own=True, varies='method', help="the loss's options")
    class_weight: str = option(
        '', metavar='W', own=True, help="'balanced', or a file of 'NAME WEIGHT' lines; for the cross-entropy term"
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Options, title='optimizer and device'):
    """The optimizer, averaged weights, precision and processes."""

    grad_accum_steps: int = option(1, COUNT, metavar='N', help='batches per optimizer step')
    opt: str = option('sgd', metavar='NAME', varies='budget', help="timm's optimizers")
    opt_eps: float | None = option(None, real(0, 1, above=True))
    opt_betas: list[float] | None = option(None, FRACTION, nargs='+')
    opt_kwargs: dict[str, Any] = option({}, varies='budget')
    momentum: float = option(0.9, FRACTION)
    weight_decay: float = option(2e-5, real(0, 1000))
    clip_grad: float | None = option(None, real(0, above=True), metavar='NORM')
    clip_mode: str = option('norm', choices=('norm', 'value', 'agc'))
    layer_decay: float | None = option(None, real(0, 1, above=True), help='factor on lr from layer to layer')
    layer_decay_min_scale: float = option(0.0, PROBABILITY)
    layer_decay_no_opt_scale: float | None = option(None, PROBABILITY)
    model_ema: bool = option(False, help='keep a moving average of the weights, and validate it')
    model_ema_decay: float = option(0.9998, FRACTION)
    model_ema_warmup: bool = option(False)
    sync_bn: bool = option(False, help='batch norm over all processes')
    dist_bn: str = option('reduce', choices=('reduce', 'broadcast', ''), help='batch norm statistics after an epoch')
    device: str = option('auto', varies='nothing', help='cpu, cuda, ...; auto takes an accelerator if there is one')
    device_modules: list[str] | None = option(
        None, nargs='+', metavar='MODULE', varies='nothing', help='modules to import first'
    )
    amp: bool = option(
        False, varies='budget',
        help="mixed precision; '--amp auto': the fastest of float32, float16 and bfloat16, timed before training",
    )  # fmt: skip
    amp_dtype: str = option(
        'float16', choices=('float16', 'bfloat16', 'auto'), varies='budget', help="auto: as '--amp auto'"
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Options, title='learning rate'):
    """Epochs and the learning rate over them."""

    epochs: int = option(300, COUNT, metavar='N', varies='budget')
    lr: float | None = option(None, RATE, help='learning rate, overrides --lr-base')
    lr_batch: int | None = option(
        None, COUNT, metavar='N', own=True, varies='budget', help="global batch that --lr is for; default the recipe's"
    )
    scale_lr: bool = option(False, own=True, help='scale --lr from that batch to the one in use')
    lr_base: float = option(0.1, RATE, help='lr = lr_base * global batch / lr_base_size')
    lr_base_size: int = option(256, COUNT)
    lr_base_scale: str = option('', choices=('', 'linear', 'sqrt'))
    sched: str = option('cosine', metavar='NAME', help="timm's schedulers")
    sched_on_updates: bool = option(False, help='a schedule step with each update, not each epoch')
    warmup_epochs: int = option(5, integer(0), varies='budget')
    warmup_lr: float = option(1e-5, real(0, 1000))
    warmup_prefix: bool = option(False)
    cooldown_epochs: int = option(0, integer(0), varies='budget')
    min_lr: float = option(0.0, real(0, 1000))
    decay_epochs: float = option(90, real(0, above=True), varies='budget')
    decay_milestones: list[int] = option([90, 180, 270], COUNT, nargs='+', varies='budget')
    decay_rate: float = option(0.1, real(0, 10, above=True), '--dr')
    patience: int | None = option(
        None, COUNT, metavar='N', own=True, varies='nothing', help='stop after N epochs without a better --eval-metric'
    )
    patience_epochs: int = option(10, integer(0), help='of the plateau schedule')


@dataclass(frozen=True, kw_only=True)
class RunConfig(Options, title='run'):
    """Where a run is written, what it resumes, and how it is shown."""

    output: str = option('', metavar='DIR', varies='nothing', help='default ./output/train')
    experiment: str = option('', metavar='NAME', varies='nothing', help="the run's folder in it; default a time stamp")
    resume: str = option(
        '', metavar='FILE', varies='nothing', help="a checkpoint to resume; 'auto': that of --experiment, if any"
    )
    no_resume_opt: bool = option(False, varies='nothing', help='without the state of the optimizer')
    checkpoint_hist: int = option(10, COUNT, metavar='N', varies='nothing', help='how many checkpoints to keep')
    val_interval: int = option(1, COUNT, metavar='N', varies='budget', help='epochs between validations')
    log_interval: int = option(50, COUNT, metavar='N', varies='nothing', help='steps between log lines')
    eval_metric: str = option(
        'top1', choices=('top1', 'macro_top1', 'top5', 'loss'), varies='budget',
        help='what the best checkpoint is best in; macro_top1: mean accuracy of the classes',
    )  # fmt: skip
    deterministic: bool = option(
        False, own=True, varies='budget', help='only algorithms that repeat their results bit for bit'
    )
    tracker: str = option(
        '', choices=('', 'tensorboard', 'trackio', 'wandb'), own=True, varies='nothing',
        help='send metrics to a tracker too',
    )  # fmt: skip
    log_wandb: bool = option(False, varies='nothing')
    wandb_project: str | None = option(None, varies='nothing')
    wandb_tags: list[str] = option([], nargs='+', varies='nothing')
    wandb_resume_id: str = option('', varies='nothing')


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig, ScheduleConfig, OptimConfig, LossConfig, ModelConfig, LoaderConfig, RecipeConfig):
    """All settings of a run, and where each comes from. No value changes after :meth:`resolve`.

    The groups are its base classes, so that a function takes the group that it needs, timm finds the names that it
    looks for, and args.yaml is flat.
    """

    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Add the data folder and a flag for each setting; what is not given is absent from the parser's result."""
        parser.add_argument('data', nargs='?', metavar='DIR', help='data folder, the same as --data-dir')
        super().add_arguments(parser)
        parser.shorthands['--amp', 'auto'] = ['--amp', '--amp-dtype', 'auto']

    @classmethod
    def resolve(cls, argv: list[str], prog: str = 'timm train.py') -> 'TrainConfig':
        """Combine defaults, the recipe and the command line, in this order.

        Args:
            argv: what follows the script's name.
            prog: what help and errors call the script.

        Raises:
            UserError: an unknown flag or recipe key, or a value that does not fit.
        """
        parser = Parser(prog=prog)
        cls.add_arguments(parser)
        return cls.from_args(parser.parse_strictly(argv), prog)

    @classmethod
    def from_args(cls, args: Namespace, prog: str = 'timm train.py') -> 'TrainConfig':
        """The same from arguments that were parsed with :meth:`add_arguments`."""
        given = {name: value for name, value in vars(args).items() if name in cls.options()}
        if args.data is not None:
            given.setdefault('data_dir', args.data)
        return cls._combine(given, prog)

    @classmethod
    def from_settings(cls, **settings: Any) -> 'TrainConfig':
        """The same from Python: settings by name.

        Raises:
            UserError: an unknown setting or recipe key, or a value that does not fit.
        """
        for name, value in settings.items():
            if name not in cls.options():
                raise UserError(f"Unknown setting '{name}'{did_you_mean(name, cls.options())}")
            try:
                settings[name] = cls.checked(name, value)
            except ValueError as error:
                raise UserError(f"'{name}={value!r}' does not fit: {error}.") from error
        return cls._combine(settings, 'ccl_timm.train')

    @classmethod
    def _combine(cls, given: dict[str, Any], prog: str) -> 'TrainConfig':
        name = given.get('config') or ('' if {'data_dir', 'dataset'} & given.keys() else 'digits')
        recipe = _without_overridden(cls._read_recipe(name, given, prog), given) if name else {}
        if recipe.get('lr') is not None:
            batch = recipe.get('batch_size', cls.defaults()['batch_size']) * recipe.get('grad_accum_steps', 1)
            recipe = {'lr_batch': batch, **recipe}
        values = {**recipe, **given, 'config': name}
        sources = dict.fromkeys(recipe, name) | dict.fromkeys(given, 'cli')
        return cls(**values, sources=sources)

    @classmethod
    def _read_recipe(cls, name: str, given: dict[str, Any], prog: str) -> dict[str, Any]:
        """A recipe's settings, checked; what only describes it is left out."""
        path = recipes.find_recipe(name)
        typed = (given.get(name) for name in ('loss', 'model', 'num_classes'))
        recipe = recipes.split_options(recipes.read_recipe(path), *typed)
        recipes.check_modules(recipe, given.get('device_modules'), path)
        checked = {}
        for key, value in recipe.items():
            if key in recipes.DESCRIPTIVE or (key in UPSTREAM_ONLY and value in (UPSTREAM_ONLY[key], None)):
                continue
            if key in UPSTREAM_ONLY:
                raise UserError(
                    f"Recipe {path}: '{key}: {value}' needs timm's own train.py: "
                    f'`ccl-timm run path/to/train.py --config {shlex.quote(str(path))}`.'
                )
            if key not in cls.options():
                raise UserError(
                    f"Recipe {path} has an unknown key '{key}'{did_you_mean(key, cls.options())} See `{prog} -h`."
                )
            try:
                checked[key] = cls.checked(key, value)
            except ValueError as error:
                raise UserError(f"Recipe {path}: '{key}: {value}' does not fit: {error}.") from error
        return checked

    def source(self, name: str) -> str:
        """Where a setting comes from: ``'cli'``, ``'default'`` or the recipe's name."""
        return self.sources.get(name, 'default')

    def view(self, **changed: Any) -> Namespace:
        """A copy for functions of timm's, with computed values in the place of some settings."""
        return Namespace(**{**self.settings(), **changed})

    @property
    def planned_epochs(self) -> int:
        """Epochs of a finished run, unless its patience ends it before."""
        cooldown = 0 if self.sched in _WITHOUT_COOLDOWN else self.cooldown_epochs
        return self.epochs + cooldown + (self.warmup_epochs if self.warmup_prefix else 0)


def _without_overridden(recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Leave out what another flag overrides, such as a recipe's lr where --lr-base was given."""
    recipe = dict(recipe)
    if 'data_dir' in given and recipe.get('dataset') == 'digits':  # the only data set without a folder
        del recipe['dataset']
    if 'lr_base' in given:
        recipe.pop('lr', None)
    if 'input_size' in given:
        recipe.pop('img_size', None)
        recipe.pop('in_chans', None)
    elif recipe.get('input_size') and {'img_size', 'in_chans'} & given.keys():
        channels, height, _ = recipe.pop('input_size')
        recipe = {'in_chans': channels, 'img_size': height, **recipe}
    return recipe


def diff_settings(before: dict[str, Any], now: dict[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """The settings that both runs have and that change what is computed, as text, where they differ.

    Args:
        before: settings of one run.
        now: of the other.
        ignore: settings that may differ, beside those that change nothing.
    """
    neutral = {*TrainConfig.names(varies='nothing'), *ignore}
    changed = [key for key in now if key in before and key not in neutral and _plain(before[key]) != _plain(now[key])]
    return [f'{key} was {before[key]!r}, is {now[key]!r}' for key in changed]


def _plain(value: Any) -> Any:
    """A value as a YAML file gives it back: with lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
