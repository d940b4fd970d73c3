"""Training steps timed in each memory layout and precision: the fastest is chosen, as far as the run leaves it open."""

import copy
import functools
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ccl_timm.console import log_info
from ccl_timm.data.cache import cache_dir
from ccl_timm.task import LossTask
from ccl_timm.training.run_dir import atomic_write

__all__ = ['LAYOUTS', 'Choice', 'fastest_choice', 'likely_layout', 'list_dtypes', 'time_choices', 'time_step']

LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
_LONG = 300  # seconds: of shorter runs the timing would take a large share
_GAIN = 1.05  # smaller gains are within what a busy machine varies by
_STEP = 0.25  # seconds that a timed step takes, or less
_ROUNDS = 3
_HOPELESS = 3  # times the fastest: timed on a few images only


class Choice(NamedTuple):
    """How a training step is computed.

    Attributes:
        layout: of images and weights in memory, one of :data:`LAYOUTS`.
        dtype: ``'float32'``, or that of mixed precision.
    """

    layout: str
    dtype: str


def time_choices(
    task: LossTask,
    size: tuple[int, int, int],
    batch_size: int,
    dtypes: Sequence[str] = ('float32', 'bfloat16'),
    soft_targets: bool = False,
    at_least: float = 0.0,
) -> dict[Choice, float]:
    """Seconds per image of a training step, forward and backward, by choice. The task stays as it is.

    Args:
        task: on its device, of one process.
        size: channels, height and width of an image.
        batch_size: largest number of images in a step; fewer are taken where a step takes long.
        dtypes: to try.
        soft_targets: give the loss probabilities of classes, as Mixup does.
        at_least: if an image takes less than that many seconds, nothing more is timed.

    Returns:
        Empty if an image took less than ``at_least``.
    """
    device = next(task.parameters()).device
    choices = [Choice(layout, dtype) for dtype in dtypes for layout in LAYOUTS]
    step = functools.partial(_attempt, size=size, soft_targets=soft_targets)
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        task = copy.deepcopy(task)
        task.get_trainable_module().train()
        few = min(batch_size, 8)
        each = min(step(task, choices[0], few) for _ in range(2)) / few
        if each < at_least:
            return {}
        # the first step of each prepares kernels; of some precisions it takes very long
        others = {choice: min(step(task, choice, few) for _ in range(2)) / few for choice in choices[1:]}
        found = {choices[0]: each} | others
        hopeful = [choice for choice in choices if found[choice] < _HOPELESS * min(found.values())]
        count = max(min(batch_size, int(_STEP / each)), few)
        if count > few:
            for choice in hopeful:
                step(task, choice, count)  # prepares kernels for as many
        rounds = [{choice: step(task, choice, count) / count for choice in hopeful} for _ in range(_ROUNDS)]
    return found | {choice: min(timed[choice] for timed in rounds) for choice in hopeful}


def _attempt(*args: Any, **options: Any) -> float:
    """Seconds that one step takes; infinity for one that does not work, for want of memory or of an operation."""
    try:
        return time_step(*args, **options)
    except RuntimeError:
        return math.inf


def time_step(
    task: LossTask, choice: Choice, count: int, size: tuple[int, int, int], soft_targets: bool = False
) -> float:
    """Seconds that a step takes on a number of random images; arguments as of :func:`time_choices`."""
    module, layout = task.get_trainable_module(), LAYOUTS[choice.layout]
    device = next(module.parameters()).device
    module.to(memory_format=layout)
    images = torch.randn(count, *size, device=device).contiguous(memory_format=layout)
    classes = task.get_eval_model().num_classes
    target = torch.arange(count, device=device) % classes
    target = functional.one_hot(target, classes).float() if soft_targets else target
    _wait_for(device)
    started = time.perf_counter()
    with torch.autocast(device.type, dtype=getattr(torch, choice.dtype), enabled=choice.dtype != 'float32'):
        loss = module(images, target)['loss']  # the task itself counts batches
    loss.backward()
    _wait_for(device)
    module.zero_grad()
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize()


def fastest_choice(
    task: LossTask,
    facts: dict[str, Any],
    size: tuple[int, int, int],
    images: int,
    before: Choice,
    layouts: Sequence[str] = tuple(LAYOUTS),
    dtypes: Sequence[str] = (),
) -> Choice:
    """The fastest of the allowed choices; logs what was found, and what another precision would gain.

    Timings are kept on this machine, so that later runs do the same.

    Args:
        task: of one process.
        facts: what steps depend on; ``batch_size`` and ``soft_targets`` among them.
        size: channels, height and width of an image.
        images: that the run trains on, over all epochs; for a few nothing is timed unless the precision is free.
        before: what to keep unless another choice is clearly faster.
        layouts: allowed ones, that of ``before`` among them.
        dtypes: allowed besides that of ``before``.
    """
    device = next(task.parameters()).device
    if device.type not in ('cpu', 'cuda'):
        return before
    key = json.dumps([facts, size, before.dtype, _machine(device)], sort_keys=True, default=str)
    path = cache_dir('steps') / f'{hashlib.sha256(key.encode()).hexdigest()[:32]}.json'
    found = _read(path)
    if not found:
        tried = dict.fromkeys([*list_dtypes(device), before.dtype])
        at_least = 0.0 if dtypes else _LONG / images
        found = time_choices(task, size, facts['batch_size'], [*tried], facts['soft_targets'], at_least)
        if not found:
            return before
        _write(path, found)
    allowed = {
        choice: seconds
        for choice, seconds in found.items()
        if choice.layout in layouts and choice.dtype in (before.dtype, *dtypes)
    }
    best = min(allowed, key=allowed.__getitem__)
    if math.isinf(allowed[best]):
        return before
    chosen = best if allowed[before] >= _GAIN * allowed[best] else before
    if chosen != before:
        _log_gain(allowed[before] / allowed[chosen], chosen, before)
    if dtypes and chosen.dtype == before.dtype:
        timed = f'steps were timed in {" and ".join(dtypes)}: none is clearly faster than {before.dtype}'
        log_info(timed if len(dtypes) > 1 else f'{before.dtype} is taken: this processor is slower in other precisions')
    best = min(found, key=found.__getitem__)
    if best.dtype not in (before.dtype, *dtypes) and found[chosen] >= _GAIN * found[best]:
        how = 'without --amp' if best.dtype == 'float32' else f'in {best.dtype}: --amp auto'
        log_info(f'steps would be {found[chosen] / found[best]:.2f} times as fast {how}')
    return chosen


def likely_layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """The layout that is usually faster, where none is timed: channels last for convolutions on a CPU."""
    convolves = any(isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in model.modules())
    return torch.channels_last if convolves and device.type == 'cpu' else torch.contiguous_format


def list_dtypes(device: torch.device) -> list[str]:
    """Precisions to time on a device. An x86 processor without AVX-512 takes many times as long in bfloat16."""
    if device.type == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2':
        return ['float32']
    return ['float32', 'bfloat16', *(['float16'] if device.type == 'cuda' else [])]


def _log_gain(ratio: float, chosen: Choice, before: Choice) -> None:
    parts = [f'--memory-format {chosen.layout}'] if chosen.layout != before.layout else []
    parts += [chosen.dtype] if chosen.dtype != before.dtype else []
    log_info(f'steps are {ratio:.2f} times as fast with {" and ".join(parts)}, which is chosen')


def _machine(device: torch.device) -> list[Any]:
    """What a time depends on besides the step."""
    if device.type == 'cuda':
        return [torch.__version__, torch.cuda.get_device_name(device)]
    name = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), name)
    return [torch.__version__, name, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def _read(path: Path) -> dict[Choice, float]:
    try:
        return {Choice(*name.split()): float(seconds) for name, seconds in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, found: dict[Choice, float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps({' '.join(choice): seconds for choice, seconds in found.items()}))
    except OSError:
        return
