"""Galleries: classes that the model never saw, and unknown images."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import ccl_timm
from ccl_timm.errors import UserError
from ccl_timm.hub.publish import export
from ccl_timm.training.gallery import Gallery

from ..conftest import write_folder


def predicted(out):
    return [row['class'] for row in csv.DictReader(io.StringIO(out))]


def gallery(threshold=None):
    features = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1)
    return Gallery(features, torch.tensor([0, 0, 1]), ['ant', 'bee'], 'm', 'w', threshold)


def test_the_nearest_feature_names_the_class(tmp_path):
    found = gallery().classify(torch.tensor([[0.0, 5.0], [3.0, 0.1]]), topk=2)
    assert [[p['class'] for p in row['predictions']] for row in found] == [['bee', 'ant'], ['ant', 'bee']]
    assert found[0]['predictions'][0] == {'class': 'bee', 'index': 1, 'similarity': 1.0}
    assert all(row['known'] for row in found)
    first = Gallery(gallery().features, torch.tensor([0, 0, 0]), ['ant', 'bee'], 'm', 'w', None)
    assert [p['class'] for p in first.classify(torch.ones(1, 2), topk=2)[0]['predictions']] == ['ant']  # no bee there
    limited = gallery(0.99)
    middle = torch.tensor([[1.0, 1.0]])
    assert not limited.classify(middle)[0]['known'] and limited.classify(middle, threshold=0.5)[0]['known']
    limited.save(tmp_path / 'g.safetensors')
    again = Gallery.load(tmp_path / 'g.safetensors')
    assert torch.equal(again.features, limited.features) and again.class_names == ['ant', 'bee']
    assert (again.model, again.weights, again.threshold) == ('m', 'w', 0.99)
    with pytest.raises(UserError, match='exists already'):
        limited.save(tmp_path / 'g.safetensors')


def test_a_gallery_of_new_classes(run_cli, trained, folder, workdir):
    new = write_folder(workdir / 'new', ('dog', 'eel', 'fox', 'gnu'))
    argv = ['index', trained, new / 'train', '-o', 'g.safetensors', '-j', '0', '--validation', new / 'validation']
    code, out, err = run_cli('ccl-timm', *argv)
    assert code == 0 and '32 images of 4 classes, threshold' in err and '--gallery g.safetensors' in out, err
    code, out, err = run_cli('ccl-timm', *argv)
    assert code == 2 and 'exists already' in err
    found = Gallery.load('g.safetensors')
    made = ccl_timm.load(trained).index(new / 'train', new / 'validation')
    assert made.class_names == found.class_names == ['dog', 'eel', 'fox', 'gnu'] and made.threshold == found.threshold

    argv = ['predict', trained, new / 'validation', '--gallery', 'g.safetensors']
    code, out, err = run_cli('ccl-timm', *argv, '--format', 'csv')
    assert code == 0 and predicted(out).count('(unknown)') <= 1  # the threshold accepts 95% of these 16
    assert {*predicted(out)} <= {'dog', 'eel', 'fox', 'gnu', '(unknown)'} and 'similarity' in out
    assert {*predicted(run_cli('ccl-timm', *argv, '--format', 'csv', '--threshold', '1')[1])} == {'(unknown)'}
    code, out, err = run_cli('ccl-timm', *argv, '--format', 'json', '--topk', '2')
    row = json.loads(out)[0]
    assert len(row['predictions']) == 2 and {'class', 'index', 'similarity'} == row['predictions'][0].keys()

    export(trained, workdir / 'exported')  # the same weights
    assert run_cli('ccl-timm', 'predict', 'exported', folder / 'validation', '--gallery', 'g.safetensors')[0] == 0
    code, out, err = run_cli('ccl-timm', 'predict', trained / 'checkpoint-0.pth.tar', *argv[2:])
    assert code == 2 and 'The gallery was made with another model' in err


@pytest.mark.parametrize(
    'source, validation, message',
    [
        ('images', None, 'has splits (train, validation)'),
        ('nowhere', None, "There is no folder 'nowhere'"),
        ('images/train/ant', None, 'outside of any class folder'),
        ('images/train', 'images/train', 'are those of the gallery'),
        ('new/train', 'images/validation', "classes that the gallery lacks, such as 'bee'"),
    ],
)
def test_folders_that_make_no_gallery(source, validation, message, run_cli, trained, workdir):
    write_folder(workdir / 'images')
    write_folder(workdir / 'new', ('ant',))
    flags = ['--validation', validation] if validation else []
    code, out, err = run_cli('ccl-timm', 'index', trained, source, '-j', '0', *flags)
    assert code == 2 and message in err and not Path('gallery.safetensors').exists()


def test_a_gallery_that_cannot_be_written(tmp_path):
    made = Gallery(torch.randn(2, 3), torch.arange(2), ['ant', 'bee'], 'test_resnet', 'hash')
    with pytest.raises(UserError, match='cannot be written'):
        made.save('/proc/gallery.safetensors')  # not even root may


def test_what_is_no_gallery(run_cli, trained, folder, workdir):
    Path('text.safetensors').write_text('no tensors')
    for argv, message in (
        (['--gallery', 'text.safetensors'], "'text.safetensors' is not a gallery"),
        (['--gallery', 'nowhere'], "'nowhere' is not a gallery"),
        (['--threshold', '0.5'], '--threshold is that of a --gallery'),
        (['--gallery', 'g', '--calibrated'], 'leave out --gallery or --calibrated'),
    ):
        code, out, err = run_cli('ccl-timm', 'predict', trained, folder / 'validation', *argv)
        assert code == 2 and message in err, err


@pytest.mark.slow
def test_open_set_of_digits(run_cli, workdir):
    """Trained on five digits, the model knows ten from a gallery, and rejects those that the gallery lacks."""
    run_cli('ccl-timm', 'data', 'digits', 'digits')
    code, out, err = run_cli('ccl-timm', 'data', 'split', 'digits/train', 'half', '--held-out-classes', '0.5')
    assert code == 0 and '5 classes in unseen' in out
    argv = ['--config', 'digits', '--dataset', 'folder', '--data-dir', 'half', '--model', 'test_resnet_cam', '--epochs']
    assert run_cli('timm', 'train.py', *argv, '4', '-j', '0', '--loss', 'cc', '--experiment', 'half')[0] == 0
    run, right = 'output/train/half', {}
    for name, images, validation in (
        ('five', 'half/train', 'half/validation'),
        ('ten', 'digits/train', 'digits/validation'),
    ):
        argv = ['index', run, images, '--validation', validation, '-o', f'{name}.safetensors', '-j', '0']
        assert run_cli('ccl-timm', *argv)[0] == 0
        for digit in range(10):
            argv = ['predict', run, f'digits/validation/{digit}', '--gallery', f'{name}.safetensors', '--format', 'csv']
            answers = predicted(run_cli('ccl-timm', *argv)[1])
            expected = str(digit) if digit < 5 or name == 'ten' else '(unknown)'
            right[name, digit] = answers.count(expected) / len(answers)
    assert min(right['five', digit] for digit in range(5)) > 0.7
    assert sum(right['five', digit] for digit in range(5, 10)) / 5 > 0.3  # rejected, where 5% would be by chance
    assert sum(right['ten', digit] for digit in range(5, 10)) / 5 > 0.6  # known without training
