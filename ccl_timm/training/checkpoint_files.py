"""Training checkpoints as files: read, checked for damage, and ranked as timm's saver ranks them."""

import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ccl_timm._compat import keep_best, keep_epoch
from ccl_timm.errors import UserError, reason, user_errors

__all__ = ['check_intact', 'read_checkpoint', 'restore_saver']


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint, tensors memory-mapped, without unpickling anything but plain types.

    Raises:
        UserError: the file does not exist or is not a training checkpoint.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint '{path}'.")
    first_line = partial(reason, line=0)
    # a damaged file fails in any of the layers that read it
    with user_errors(f"'{path}' is not a readable training checkpoint", (Exception,), first_line):
        content = load_checkpoint_metadata(path)
    if not isinstance(content, dict) or not {'state_dict', 'epoch'} <= content.keys():
        raise UserError(f"'{path}' is not a training checkpoint: it has no model and epoch of a run in it.")
    return content


def check_intact(path: Path) -> None:
    """Raise a UserError if a checkpoint's checksums do not match its content, which is read in full."""
    if not zipfile.is_zipfile(path):
        return  # written by an old torch, without checksums
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        damaged = reason(error, 0)
    if damaged:
        raise UserError(f"'{path}' is damaged ({damaged}): take another checkpoint, or a copy of this one.")


def restore_saver(saver: CheckpointSaver, checkpoint: Path) -> None:
    """Let a saver continue where that of a checkpoint stopped, also if it was stopped while it saved.

    timm's saver writes a checkpoint, then its numbered copy, then the copy that is the best. A run killed in between
    would rank its checkpoints in another way than one that was not, or keep no best one: missing copies are made.
    """
    saver.load_state_dict_from_checkpoint(str(checkpoint))
    content = read_checkpoint(checkpoint)
    epoch, metric = content['epoch'], content.get('metric')
    if metric is not None:
        keep_epoch(saver, checkpoint, epoch, metric)
    best = Path(saver.checkpoint_dir) / 'model_best.pth.tar'
    if _epoch_of(best) != saver.best_epoch:
        keep_best(saver, best)


def _epoch_of(path: Path) -> int | None:
    try:
        return read_checkpoint(path)['epoch']
    except UserError:
        return None
