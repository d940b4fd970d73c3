"""Class-balanced batches."""

from collections import Counter

import pytest
import torch
from PIL import Image

from ccl_timm.data import loaders
from ccl_timm.data.config import LoaderConfig
from ccl_timm.data.datasets import create_splits
from ccl_timm.data.samplers import ClassBalancedSampler
from ccl_timm.errors import UserError

TARGETS = [0] * 40 + [1] * 9 + [2] * 3 + [3] * 1  # classes of very different size


def batches(sampler, size):
    order = list(sampler)
    assert len(order) == len(sampler)
    return [order[i : i + size] for i in range(0, len(order), size)]


def test_each_batch_has_as_many_classes_and_images_as_asked():
    for batch in batches(ClassBalancedSampler(TARGETS, 6, 2), 6):
        assert sorted(Counter(TARGETS[i] for i in batch).values()) == [2, 2, 2]


def test_no_image_comes_twice_in_a_batch_unless_its_class_has_no_other():
    for batch in batches(ClassBalancedSampler(TARGETS, 12, 3), 12):
        for image, times in Counter(batch).items():
            assert times == (3 if TARGETS[image] == 3 else 1)


def test_classes_and_images_take_turns():
    sampler = ClassBalancedSampler(TARGETS, 4, 2, seed=3)
    order = [i for epoch in range(20) for i in (sampler.set_epoch(epoch), *sampler)[1:]]
    classes = Counter(TARGETS[i] for i in order)
    assert max(classes.values()) - min(classes.values()) <= 2 * 20
    assert len({i for i in order if TARGETS[i] == 0}) == 40


def test_order_depends_on_seed_and_epoch_only():
    first, again = ClassBalancedSampler(TARGETS, 6, 2, seed=1), ClassBalancedSampler(TARGETS, 6, 2, seed=1)
    assert list(first) == list(again) == list(first)
    first.set_epoch(1)
    assert list(first) != list(again) != list(ClassBalancedSampler(TARGETS, 6, 2, seed=2))


def test_processes_share_the_batches():
    whole = batches(ClassBalancedSampler(TARGETS, 6, 2), 6)
    parts = [batches(ClassBalancedSampler(TARGETS, 6, 2, rank=rank, world_size=2), 6) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(whole) // 2
    assert [batch for pair in zip(*parts, strict=True) for batch in pair] == whole[: 2 * len(parts[0])]


@pytest.mark.parametrize(('batch', 'samples'), [(6, 4), (10, 2)])
def test_impossible_batches_are_refused(batch, samples):
    with pytest.raises(UserError, match='--samples-per-class .* does not make batches'):
        ClassBalancedSampler(TARGETS, batch, samples)


@pytest.mark.parametrize('place', ['files', 'memory'])
def test_order_on_several_processes_depends_on_the_seed(place, monkeypatch, tmp_path):
    for split in ('train', 'validation'):
        for number in range(24):
            path = tmp_path / split / 'ab'[number % 2] / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (8, 8)).save(path)
    monkeypatch.setattr(loaders, 'world_size', lambda: 2)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda *args: 2)
    monkeypatch.setattr(torch.distributed, 'get_rank', lambda *args: 0)
    monkeypatch.setattr(torch.distributed, 'is_available', lambda: True)
    orders = []
    for seed in (7, 7, 8):
        config = LoaderConfig(data_dir=str(tmp_path), seed=seed, batch_size=4, workers=0)
        if place == 'memory':
            orders.append(list(loaders._sampler(config, [0, 1] * 12)))
        else:
            shapes = {'input_size': (3, 8, 8), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bilinear'}
            dataset = create_splits(config, 3).train
            orders.append(list(loaders._file_loader(config, 2, torch.device('cpu'), shapes, dataset).sampler))
    assert orders[0] == orders[1] != orders[2]
