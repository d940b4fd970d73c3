"""Command lines: a parser whose errors are one sentence, flags' ranges, and the flags that only timm's train.py has."""

import argparse
import ast
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ccl_timm.errors import UserError, did_you_mean

__all__ = [
    'COUNT', 'FRACTION', 'PROBABILITY', 'RATE', 'SHARE', 'UPSTREAM_ONLY', 'WORKERS', 'KeyValues', 'Number', 'Parser',
    'check_flags', 'integer', 'real',
]  # fmt: skip

# flags of timm's train.py that the built-in script leaves to it, with timm's defaults: a recipe may name them if they
# are off
UPSTREAM_ONLY: dict[str, Any] = {
    'aug_repeats': 0,
    'aug_splits': 0,
    'bce_loss': False,
    'bce_pos_weight': None,
    'bce_sum': False,
    'bce_target_thresh': None,
    'dataset_trust_remote_code': False,
    'distill_loss_weight': None,
    'drop_block': None,
    'drop_connect': None,
    'epoch_repeats': 0.0,
    'fast_norm': False,
    'fuser': '',
    'head_init_bias': None,
    'head_init_scale': None,
    'jsd_loss': False,
    'kd_distill_type': 'logit',
    'kd_loss_type': 'kl',
    'kd_model_name': None,
    'kd_student_feature_dim': None,
    'kd_teacher_feature_dim': None,
    'kd_temperature': 4.0,
    'kd_token_distill_type': 'soft',
    'local_rank': 0,
    'lr_cycle_decay': 0.5,
    'lr_cycle_limit': 1,
    'lr_cycle_mul': 1.0,
    'lr_k_decay': 1.0,
    'lr_noise': None,
    'lr_noise_pct': 0.67,
    'lr_noise_std': 1.0,
    'model_dtype': None,
    'model_ema_force_cpu': False,
    'naflex_loader': False,
    'naflex_loss_scale': 'linear',
    'naflex_max_seq_len': 576,
    'naflex_patch_size_probs': None,
    'naflex_patch_sizes': None,
    'naflex_patchify_channels_first': False,
    'naflex_train_seq_lens': [128, 256, 576, 784, 1024],
    'no_ddp_bb': False,
    'no_prefetcher': False,
    'recovery_interval': 0,
    'resplit': False,
    'save_images': False,
    'split_bn': False,
    'start_epoch': None,
    'synchronize_step': False,
    'task_loss_weight': None,
    'torchscript': False,
    'train_batch_sizes': None,
    'train_batches_per_epoch': None,
    'train_img_sizes': None,
    'train_num_samples': None,
    'train_size_probs': None,
    'train_size_random_mix': 0.1,
    'train_size_schedule': 'constant',
    'train_size_schedule_spread': 0.65,
    'tta': 0,
    'use_multi_epochs_loader': False,
    'val_num_samples': None,
    'variable_batch_loss_scale': 'none',
    'worker_seeding': 'all',
}


_LARGEST_INTEGER = 2**31 - 1  # of flags that name no limit: what torch, NumPy and PIL all take


@dataclass(frozen=True)
class Number:
    """The type of a numeric flag: converts its value, and refuses one that is not finite or out of range.

    Attributes:
        kind: ``int`` or ``float``.
        low: the lowest value.
        high: the highest value.
        above: the value must be greater than ``low``.
        below: the value must be less than ``high``.
    """

    kind: type
    low: float
    high: float
    above: bool = False
    below: bool = False

    def __call__(self, value: str | int | float) -> int | float:
        """Convert a flag's text or a recipe's value.

        Raises:
            argparse.ArgumentTypeError: it is no such number.
        """
        try:
            number = self.kind(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or (isinstance(value, float) and number != value == value):
            raise argparse.ArgumentTypeError(f"'{value}' is not a {'whole ' if self.kind is int else ''}number")
        if not math.isfinite(number):
            raise argparse.ArgumentTypeError(f'{value} must be finite')
        too_low = number <= self.low if self.above else number < self.low
        too_high = number >= self.high if self.below else number > self.high
        if too_low or too_high:
            bounds = [f'{"above" if self.above else "at least"} {self.low}']
            if too_high or self.high not in (_LARGEST_INTEGER, math.inf):
                bounds.append(f'{"below" if self.below else "at most"} {self.high}')
            raise argparse.ArgumentTypeError(f'{value} must be {" and ".join(bounds)}')
        return number


def integer(low: int, high: int = _LARGEST_INTEGER) -> Number:
    """The type of a flag that takes whole numbers from ``low`` to ``high``, both included."""
    return Number(int, low, high)


def real(low: float, high: float = math.inf, above: bool = False, below: bool = False) -> Number:
    """The type of a flag that takes finite numbers from ``low`` to ``high``; see :class:`Number`."""
    return Number(float, low, high, above, below)


COUNT = integer(1)
FRACTION = real(0, 1, below=True)  # as of dropout, where 1 leaves nothing
SHARE = real(0, 1, above=True, below=True)  # of the images
PROBABILITY = real(0, 1)
RATE = real(0, 1000, above=True)  # of learning
WORKERS = integer(0, 1024)  # processes


class KeyValues(argparse.Action):
    """Collects ``name=value`` arguments in a dict, with Python's literals as values and other text as it stands."""

    def __call__(self, parser, namespace, values, option_string=None):
        options = {}
        for text in values:
            name, equals, value = text.partition('=')
            if not (name and equals):
                raise argparse.ArgumentError(self, f"'{text}' is not NAME=VALUE")
            try:
                options[name] = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                options[name] = value
        setattr(namespace, self.dest, options)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UserError`, and that knows which flags are only upstream's.

    Attributes:
        trailing: name for the arguments after ``--``, which belong to another program; None if there are none.
        shorthands: pairs of arguments, and what they stand for.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.trailing: str | None = None
        self.shorthands: dict[tuple[str, str], list[str]] = {}

    def error(self, message: str) -> None:
        """Raise instead of leaving the process."""
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        hint = did_you_mean(wrong[1], re.findall(r"[^\s',]+", wrong[2])) if wrong else '.'
        raise UserError(f'{message[:1].upper()}{message[1:]}{hint} See `{self.prog} --help`.')

    def parse_strictly(self, argv: list[str]) -> argparse.Namespace:
        """Parse all of ``argv``; a flag that is not ours is named, with where it can be used."""
        cut = argv.index('--') if self.trailing and '--' in argv else len(argv)
        args, rest = self.parse_known_args(self._spell_out(argv[:cut]))
        check_flags(rest, getattr(args, 'parser', self))
        if self.trailing:
            setattr(args, self.trailing, argv[cut + 1 :])
        return args

    def _spell_out(self, argv: list[str]) -> list[str]:
        found = [index for index, pair in enumerate(pairwise(argv)) if pair in self.shorthands]
        for index in reversed(found):
            argv = [*argv[:index], *self.shorthands[argv[index], argv[index + 1]], *argv[index + 2 :]]
        return argv


def check_flags(rest: list[str], parser: argparse.ArgumentParser) -> None:
    """Raise a UserError that explains the first argument that a parser left over."""
    if not rest:
        return
    flag = next((text for text in rest if text.startswith('-')), rest[0])
    name = flag.split('=')[0]
    if name.lstrip('-').replace('-', '_') in UPSTREAM_ONLY:
        raise UserError(
            f"The built-in script does not have timm's {name}: run timm's own train.py with it, "
            '`ccl-timm run path/to/train.py ...`.'
        )
    flags = [option for action in parser._actions for option in action.option_strings]
    raise UserError(f"Unknown argument '{name}'{did_you_mean(name, flags)} See `{parser.prog} --help`.")
