"""Measures beside accuracy, asked for by command and from Python: calibration, retrieval, unknown images, counts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ccl_timm
from ccl_timm.errors import UserError
from ccl_timm.hub.publish import export
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.measures import calibration, retrieval
from ccl_timm.training.prediction import preprocessing
from ccl_timm.training.run_dir import RunDir

from ..conftest import results, write_folder

METRICS = ('loss', 'top1', 'top5', 'macro_top1')


@pytest.fixture
def run(trained, workdir):
    """A copy of a finished run."""
    return shutil.copytree(trained, workdir / 'run')


def noise(folder, count=6):
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f'{number}.png')
    return folder


def test_the_command_and_python_measure_the_same(run_cli, run, workdir):
    unknown = noise(workdir / 'unknown')
    flags = ['--calibration', '--recall', '--knn', '3', '--by-count', '--ood', unknown]
    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', *flags)
    assert code == 0, err
    printed = results(out)
    plain = results(run_cli('timm', 'validate.py', run, '-j', '0')[1])
    assert printed['images'] == 12 and {n: printed[n] for n in METRICS} == pytest.approx({n: plain[n] for n in METRICS})
    found = ccl_timm.load(run).evaluate(calibration=True, recall=True, knn=3, by_count=True, ood=str(unknown))
    assert {name: printed[name] for name in found.metrics} == found.metrics
    outputs = found.outputs
    assert outputs['features'].shape == (12, 512) and outputs['logits'].shape == (12, 3)
    expected = calibration(outputs['logits'], outputs['labels']) | retrieval(outputs['features'], outputs['labels'])
    assert {name: printed[name] for name in expected} == expected
    assert printed['nll'] == pytest.approx(printed['loss'], rel=1e-5)
    assert printed['top1_few'] == printed['macro_top1'] and 'top1_many' not in printed  # 8 training images a class
    scores = {
        f'ood_{score}_{value}' for score in ('softmax', 'energy', 'nearest', 'norm') for value in ('auroc', 'fpr95')
    }
    assert scores <= printed.keys() and 'unknown images by nearest: AUROC' in err and 'map_at_r' in err


def test_a_temperature_is_fitted_kept_exported_and_applied(run_cli, run, workdir, folder):
    image = next((folder / 'validation').rglob('*.png'))
    code, out, err = run_cli('ccl-timm', 'predict', run, image, '--calibrated')
    assert code == 2 and 'No temperature was fitted' in err and '--fit-temperature' in err
    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--fit-temperature', '--calibration')
    assert code == 0 and 'temperature' in err and 'split validation' in err, err
    assert 'ece_calibrated' not in results(out)  # measured on the images that it was fitted on
    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--calibration')
    assert 'ece_calibrated' not in results(out) and 'fitted on these very images' in err
    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--calibration', '--split', 'train')
    printed, trained = results(out), load_trained(run)
    assert printed['temperature'] == trained.calibration['temperature'] != 1.0
    assert printed['ece_calibrated'] != printed['ece'] and 'nll_calibrated' in err
    assert trained.calibration['images'] == 12 and trained.calibration['data'] == folder.name

    export(run, workdir / 'exported')
    exported = load_trained(workdir / 'exported')
    assert exported.calibration == trained.calibration
    logits = ccl_timm.load(run).outputs([image]).logits
    expected = (logits / printed['temperature']).softmax(1).max().item()
    for source in (run, workdir / 'exported'):
        code, out, err = run_cli('ccl-timm', 'predict', source, image, '--calibrated', '--format', 'json')
        assert code == 0, err
        assert json.loads(out)[0]['predictions'][0]['probability'] == pytest.approx(expected, abs=1e-5)
    assert ccl_timm.load(run).predict(image, calibrated=True)[0][0]['probability'] == pytest.approx(expected, abs=1e-5)
    assert load_trained(run / 'checkpoint-0.pth.tar').calibration is None  # of another epoch
    code, out, err = run_cli('timm', 'validate.py', 'exported', '--data-dir', folder, '-j', '0', '--fit-temperature')
    assert code == 2 and "name a run's folder" in err


def test_no_temperature_is_fitted_on_the_training_split(run_cli, run):
    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--split', 'train', '--fit-temperature')
    assert code == 2 and 'was not trained on' in err and not (run / 'calibration.json').exists()


@pytest.mark.parametrize('flag', [['--fit-temperature'], ['--knn', '1']])
def test_images_trained_on_say_nothing(flag, run_cli, run, folder, workdir):
    for argv in (['--split', 'training'], ['--data-dir', folder / 'train']):
        code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', *argv, *flag)
        assert code == 2 and '24 of these 24 images are training images' in err
    flat = shutil.copytree(folder / 'validation', workdir / 'flat')
    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--data-dir', flat, *flag)
    if flag == ['--knn', '1']:  # a folder without splits is the whole of either
        assert code == 2 and 'images are training images' in err
    else:
        assert code == 0, err


def test_two_models_are_one_too_many(run_cli, run):
    code, out, err = run_cli('timm', 'validate.py', run, '--checkpoint', 'other.pth.tar')
    assert code == 2 and '--checkpoint other.pth.tar name two models: give one of them' in err


@pytest.mark.parametrize(
    'content', ['{', '[]', '{"temperature": 0}', '{"temperature": "hot", "epoch": 1, "ema": false}']
)
def test_a_damaged_temperature_is_reported(content, run, run_cli, folder):
    (run / 'calibration.json').write_text(content)
    code, out, err = run_cli('ccl-timm', 'predict', run, folder / 'validation', '--calibrated')
    assert code == 2 and 'calibration.json' in err and 'Traceback' not in err


def test_reliability_diagrams_are_drawn(run_cli, run, monkeypatch):
    pytest.importorskip('matplotlib')
    assert run_cli('timm', 'validate.py', run, '-j', '0', '--fit-temperature', '--plot', 'a.svg')[0] == 0
    assert run_cli('timm', 'validate.py', run, '-j', '0', '--split', 'train', '--plot', 'b.png')[0] == 0
    assert 'ECE' in Path('a.svg').read_text() and 'with temperature' not in Path('a.svg').read_text()
    assert Image.open('b.png').size[0] > 400
    for name, message in (('a.svg', 'exists already'), ('c.gif', 'must end in .png or .svg')):
        code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--plot', name)
        assert code == 2 and message in err


def test_classes_never_trained_on_are_measured_by_retrieval_alone(run_cli, run, workdir):
    unseen = write_folder(workdir / 'unseen', ('dog', 'eel', 'fox', 'gnu', 'hen'))
    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--data-dir', unseen, '--recall')
    assert code == 0 and 'only retrieval is measured' in err, err
    printed = results(out)
    assert printed['images'] == 20 and 'top1' not in printed and 0 <= printed['map_at_r'] <= 100
    assert 'top1' not in ccl_timm.load(run).evaluate(str(unseen), recall=True).metrics
    for flags in ([], ['--calibration'], ['--knn', '3'], ['--per-class', 'a.csv'], ['--confusion', 'b.csv']):
        flags = ['--recall', *flags] if flags else []
        code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--data-dir', unseen, *flags)
        assert code == 2 and 'not among the 3 of training' in err
    alone = write_folder(workdir / 'alone', ('dog', 'eel'), validation=1)
    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--data-dir', alone, '--recall')
    assert code == 2 and 'No class has two images' in err


def test_unknown_images_must_be_there(run_cli, run, workdir):
    (workdir / 'empty').mkdir()
    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--ood', 'empty')
    assert code == 2 and "--ood 'empty' cannot be used: Found 0 images" in err
    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--ood', 'nowhere')
    assert code == 2 and "'nowhere'" in err


def test_the_file_of_the_temperature_names_checkpoint_and_data(run):
    assert RunDir(run).calibration(0, False) is None
    fitted = {'temperature': 2.0, 'data': 'x', 'split': 'test', 'images': 3, 'fingerprint': 'f'}
    RunDir(run).set_calibration({'epoch': 0, 'ema': False, **fitted})
    assert RunDir(run).calibration(0, False) == fitted
    assert RunDir(run).calibration(1, False) is None and RunDir(run).calibration(0, True) is None


def test_tta_averages_the_logits_of_mirrored_images(run_cli, run, folder):
    trained, files = load_trained(run), sorted((folder / 'validation').rglob('*.png'))
    images = torch.stack([preprocessing(trained)(file) for file in files])
    with torch.inference_mode():
        once, mirrored = trained.model(images), trained.model(images.flip(3))
    logits = (once + mirrored) / 2
    labels = torch.tensor([trained.class_names.index(file.parent.name) for file in files])
    assert not torch.allclose(once, logits, atol=1e-3)

    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--tta', '--split', 'validation', '--save-split')
    assert code == 0 and 'each with its mirror image' in err, err
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert results(out)['loss'] == pytest.approx(loss, rel=1e-4)
    assert results(out)['top1'] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert RunDir(run).extra_splits()[-1]['split'] == 'validation+tta'
    assert ccl_timm.load(run).evaluate(tta=True).metrics['loss'] == pytest.approx(loss, rel=1e-4)

    expected = logits[0].softmax(0).max().item()
    code, out, err = run_cli('ccl-timm', 'predict', run, files[0], '--tta', '--format', 'json')
    assert json.loads(out)[0]['predictions'][0]['probability'] == pytest.approx(expected, abs=1e-5), err
    assert ccl_timm.load(run).predict(files[0], tta=True)[0][0]['probability'] == pytest.approx(expected, abs=1e-5)


def test_tta_is_for_accuracy_alone(run_cli, run, folder):
    for measure in (['--calibration'], ['--knn', '3']):
        code, out, err = run_cli('timm', 'validate.py', run, '-j', '0', '--tta', *measure)
        assert code == 2 and '--tta is for accuracy: leave out --calibration' in err
    image = next((folder / 'validation').rglob('*.png'))
    assert run_cli('ccl-timm', 'index', run, folder / 'validation', '-o', 'gallery', '-j', '0')[0] == 0
    for flags in (['--calibrated'], ['--gallery', 'gallery']):
        code, out, err = run_cli('ccl-timm', 'predict', run, image, '--tta', *flags)
        assert code == 2 and f'leave out --tta or {flags[0]}' in err
    with pytest.raises(UserError, match='leave out --tta or --calibrated'):
        ccl_timm.load(run).predict(image, calibrated=True, tta=True)


@pytest.mark.parametrize(
    'settings',
    [{}, {'hflip': 0.0}, {'no_aug': True}, {'freeze_backbone': True}, {'freeze_backbone': True, 'feature_views': 2}],
    ids=str,
)
def test_tta_warns_of_a_model_that_saw_no_mirrored_images(settings, run, folder, capsys):
    loaded = ccl_timm.load(run)
    loaded.trained.settings.update({'hflip': 0.5, **settings})
    saw_none = settings and 'feature_views' not in settings
    image = next((folder / 'validation').rglob('*.png'))
    for use in (lambda: loaded.evaluate(tta=True), lambda: loaded.predict(image, tta=True)):
        use()
        assert ('trained without mirrored images' in capsys.readouterr().err) == bool(saw_none)
