"""Speed as ratios, each measured side by side in one run: losses, training steps, loaders."""

import copy
import csv
import dataclasses
import functools
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, RandomSampler

from ccl_timm import losses, models
from ccl_timm.console import log_info
from ccl_timm.data.config import LoaderConfig
from ccl_timm.data.datasets import create_splits
from ccl_timm.data.in_memory import Augment, InMemoryLoader
from ccl_timm.data.loaders import create_loader, make_loaders
from ccl_timm.errors import UserError, user_errors
from ccl_timm.losses import channel_correlation
from ccl_timm.models import create_model
from ccl_timm.task import create_task
from ccl_timm.training.checkpoints import Trained
from ccl_timm.training.kernel_cropping import crop_kernels
from ccl_timm.training.prediction import find_images, predict
from ccl_timm.training.step_timing import list_dtypes, time_choices, time_step

__all__ = [
    'bench_cc', 'bench_import', 'bench_layouts', 'bench_loaders', 'bench_photos', 'bench_predict', 'bench_steps',
    'bench_train', 'ratios',
]  # fmt: skip


def ratios(
    actions: dict[str, Callable[[], Any]], rounds: int, device: torch.device, untimed: int = 1
) -> dict[str, tuple[float, float]]:
    """Time actions in turn, so that whatever else the machine does falls on all of them.

    Args:
        actions: what to time, by name; the first is what the others are compared with.
        rounds: how often each is timed.
        device: waited for before a clock is read.
        untimed: rounds before those.

    Returns:
        For each the median seconds, and the median over the rounds of its time divided by the first one's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(untimed + rounds):
        for name, action in actions.items():
            _wait_for(device)
            started = time.perf_counter()
            action()
            _wait_for(device)
            if number >= untimed:
                seconds[name].append(time.perf_counter() - started)
    base = next(iter(seconds.values()))
    return {
        name: (statistics.median(own), statistics.median(a / b for a, b in zip(own, base, strict=True)))
        for name, own in seconds.items()
    }


def _wait_for(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize()


def paper_form(attention: Tensor, target: Tensor, num_classes: int, eps: float = 1e-8) -> Tensor:
    """CC-Loss's ratio as the paper prints it (eq. 6, 7), over all N x N pairs of attention vectors (N, D)."""
    distance = torch.cdist(attention, attention).square()
    same = (target[:, None] == target).to(distance.dtype)
    return (same * distance).sum() / (((1 - same) * distance).sum() + eps)


def bench_cc(samples: int, width: int, classes: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """CC-Loss, forward and backward, against the paper's form, and its memory.

    Args:
        samples: N.
        width: D of the attention vectors.
        classes: K.
        rounds: as of :func:`ratios`.
        device: where.
    """
    attention = torch.rand(samples, width, device=device, requires_grad=True)
    target = torch.randint(classes, (samples,), device=device)

    def run(form: Callable[..., Tensor]) -> None:
        attention.grad = None
        form(attention, target, classes).backward()

    actions = {"cc, the paper's N x N form": lambda: run(paper_form), 'cc': lambda: run(channel_correlation)}
    rows = _rows(ratios(actions, rounds, device))
    for row, form in zip(rows, (paper_form, channel_correlation), strict=True):
        row['kept_mib'] = _kept(form, attention, target, classes) / 2**20
        half = slice(0, samples // 2)
        row['kept_at_half_mib'] = _kept(form, attention[half], target[half], classes) / 2**20
    return rows


def _kept(form: Callable[..., Tensor], *inputs: Any) -> int:
    """Bytes that the forward pass keeps for the backward pass, beside its inputs."""
    kept: dict[int, int] = {}
    own = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        form(*inputs)
    return sum(size for place, size in kept.items() if place not in own)


def bench_steps(
    backbone: str, names: list[str], size: int, batch: int, classes: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Training steps (forward, backward, SGD) of every loss against cross-entropy, each on its head.

    Args:
        backbone: timm architecture that takes ``small_input``.
        names: of losses.
        size: height and width of the images.
        batch: images a step.
        classes: K.
        rounds: as of :func:`ratios`.
        device: where.
    """
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    target = torch.randint(classes, (batch,), device=device)
    actions = {name: _step(backbone, name, images, target, classes) for name in ['ce', *names]}
    return _rows(ratios(actions, rounds, device))


def _step(backbone: str, loss: str, images: Tensor, target: Tensor, classes: int) -> Callable[[], None]:
    head = None if loss == 'ce' else losses.declared(loss, 'head')
    name = f'{backbone}_{head}' if head else backbone
    model = models.create_model(name, num_classes=classes, **({'output_stride': 16} if head == 'mc' else {}))
    task = create_task(model.to(images.device, memory_format=torch.channels_last), loss)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-4)
    task.train()

    def step() -> None:
        optimizer.zero_grad()
        task(images, target)['loss'].backward()
        optimizer.step()

    return step


class _Noise(Dataset):
    """Images of noise that have to be made from arrays, as those of CIFAR."""

    def __init__(self, images: np.ndarray):
        self.images, self.transform = images, None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), 0


def bench_loaders(
    count: int, size: int, batch: int, workers: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Images a second of pad-crop, flip and normalisation: timm's loader, then ours from memory.

    Args:
        count: images of an epoch.
        size: their height and width.
        batch: images a batch.
        workers: processes of timm's loader.
        rounds: epochs, as of :func:`ratios`.
        device: where batches are wanted.
    """
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    mean = std = (0.5, 0.5, 0.5)
    shared = {'input_size': (3, size, size), 'batch_size': batch, 'is_training': True, 'mean': mean, 'std': std}
    theirs = create_loader(_Noise(images), pad_crop=4, color_jitter=0.0, num_workers=workers, device=device, **shared)
    stored = Augment(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), (size, size), pad_crop=4, hflip=0.5)
    labels = torch.zeros(count, dtype=torch.int64)
    ours = InMemoryLoader(stored, labels, RandomSampler(labels), batch, mean, std, device, drop_last=True)
    actions = {f"timm's loader, {workers} workers": lambda: _drain(theirs), 'in memory': lambda: _drain(ours)}
    rows = _rows(ratios(actions, rounds, device))
    for row in rows:
        row['images_per_second'] = count // batch * batch / row['seconds']
    return rows


def bench_photos(
    count: int, size: int, batch: int, workers: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Images a second of random resized crops and flips of JPEG files of 704 x 480: timm's loader, then ours.

    Args:
        count: files.
        size: height and width of the model's input.
        batch: images a batch.
        workers: timm's processes, and our threads.
        rounds: epochs, as of :func:`ratios`.
        device: where batches are wanted.
    """
    data_config = {'input_size': (3, size, size), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bilinear'}
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CCL_TIMM_CACHE=f'{folder}/cache'):
        _write_photos(Path(folder, 'train', 'all'), count)
        config = LoaderConfig(data_dir=folder, val_split='', color_jitter=0.0, batch_size=batch, workers=workers)

        def loader(place: str) -> Any:
            own = dataclasses.replace(config, in_memory=place)
            return make_loaders(own, 1, device, data_config, create_splits(own, 3))[0]

        def first_epoch() -> None:
            shutil.rmtree(f'{folder}/cache')
            _drain(loader('disk'))

        theirs, later = loader('off'), loader('disk')
        actions = {f"timm's loader, {workers} workers": lambda: _drain(theirs)}
        actions |= {'first epoch, decoding': first_epoch, 'later epochs': lambda: _drain(later)}
        rows = _rows(ratios(actions, rounds, device))
    for row in rows:
        row['images_per_second'] = count // batch * batch / row['seconds']
    return rows


def _write_photos(folder: Path, count: int) -> None:
    """JPEG files of 704 x 480, cut at random out of the two photographs that scikit-learn has."""
    from sklearn.datasets import load_sample_images  # takes a second: only when photographs are asked for

    random = np.random.default_rng(0)
    originals = [Image.fromarray(pixels).resize((1280, 854)) for pixels in load_sample_images().images]
    folder.mkdir(parents=True)
    for number in range(count):
        left, top = random.integers(1280 - 704), random.integers(854 - 480)
        photo = originals[number % 2].crop((left, top, left + 704, top + 480))
        photo.save(folder / f'{number:05}.jpg', quality=90)


def bench_layouts(
    model: str, size: int, batch: int, classes: int, backend: str | None, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Training steps with cross-entropy in each memory layout and precision, as a long run times them at its start.

    Args:
        model: timm architecture, with or without a head.
        size: height and width of the images.
        batch: images a step.
        classes: K.
        backend: of torch.compile, for one line more: the fastest step, compiled, timed in turn with it as it was.
        rounds: how often those two are timed.
        device: where.
    """
    network = models.create_model(model, num_classes=classes)
    if device.type == 'cpu':
        crop_kernels(network)
    task, images = create_task(network.to(device), 'ce'), (3, size, size)
    found = time_choices(task, images, batch, list_dtypes(device))
    seconds = {f'{layout}, {dtype}': each for (layout, dtype), each in found.items()}
    if backend:
        best = min(found, key=found.__getitem__)
        compiled = copy.deepcopy(task)
        with user_errors(f"--torchcompile '{backend}' does not work", (RuntimeError,)):
            compiled.compile(backend=backend)
        tasks = {'eager': task, 'compiled': compiled}
        steps = {name: functools.partial(time_step, own, best, batch, images) for name, own in tasks.items()}
        seconds[f'{best.layout}, {best.dtype}, compiled'] = found[best] * ratios(steps, rounds, device)['compiled'][1]
    base = next(iter(seconds.values()))
    return [
        {'name': name, 'seconds': each, 'ratio': each / base, 'images_per_second': 1 / each}
        for name, each in seconds.items()
    ]


def bench_train(script: str, argv: list[str], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Whole training runs, start and end included: timm's script, then the built-in one, with the same arguments.

    Args:
        script: path of timm's train.py.
        argv: for both: data, model, epochs and so on.
        rounds: runs of each.
        device: of both.

    Raises:
        UserError: a run fails.
    """
    programs = {"timm's train.py": [script], 'the built-in script': ['-m', 'ccl_timm', 'train']}
    accuracies: dict[str, float] = {}

    def train(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *programs[name], '--device', str(device), *argv]
            command += ['--output', folder, '--experiment', 'bench']
            log_info(f'{name} trains: {shlex.join(command)}')
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(f'{name} failed: {(done.stderr.splitlines() or ["no reason given"])[-1]}')
            with open(Path(folder, 'bench', 'summary.csv'), newline='') as file:
                accuracies[name] = float(list(csv.DictReader(file))[-1]['eval_top1'])

    actions = {name: functools.partial(train, name) for name in programs}
    rows = _rows(ratios(actions, rounds, device, untimed=0))
    return [row | {'top1': accuracies[row['name']]} for row in rows]


def bench_predict(
    backbone: str, count: int, size: int, batch: int, workers: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Images a second of a model's classes of JPEG files of 704 x 480: a loop over timm's loader, then ours.

    Args:
        backbone: any model.
        count: files.
        size: height and width of the model's input.
        batch: images a batch.
        workers: timm's processes.
        rounds: as of :func:`ratios`.
        device: where the model computes.
    """
    data_config = {'input_size': (3, size, size), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bicubic',
                   'crop_pct': 0.875}  # fmt: skip
    trained = Trained(backbone, create_model(backbone, num_classes=100).eval(), data_config, None, {})
    with tempfile.TemporaryDirectory() as folder:
        _write_photos(Path(folder, 'all'), count)
        dataset = timm.data.create_dataset('', root=folder)
        loader = timm.data.create_loader(
            dataset, batch_size=batch, num_workers=workers, use_prefetcher=False, device=device, **data_config
        )

        @torch.inference_mode()
        def theirs() -> None:
            for images, _ in loader:
                trained.model.to(device)(images.to(device)).softmax(-1).topk(5)

        paths = find_images([folder])
        ours = functools.partial(predict, trained, paths, batch_size=batch, device=str(device))
        rows = _rows(ratios({f"timm's loader, {workers} workers": theirs, 'predict': ours}, rounds, device))
    for row in rows:
        row['images_per_second'] = count / row['seconds']
    return rows


def bench_import(rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of a new process for ``import timm``, ``import ccl_timm`` and ``ccl-timm --help``.

    Args:
        rounds: as of :func:`ratios`.
        device: likewise.
    """

    def python(*args: str) -> Callable[[], Any]:
        return functools.partial(subprocess.run, [sys.executable, *args], check=True, stdout=subprocess.DEVNULL)

    actions = {name: python('-c', name) for name in ('import timm', 'import ccl_timm')}
    command = "import sys; sys.argv = ['ccl-timm', '--help']; from ccl_timm.cli import main; main()"  # as installed
    return _rows(ratios({**actions, 'ccl-timm --help': python('-c', command)}, rounds, device))


def _drain(loader: Any) -> None:
    for _ in loader:
        pass


def _rows(found: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    return [{'name': name, 'seconds': seconds, 'ratio': ratio} for name, (seconds, ratio) in found.items()]
