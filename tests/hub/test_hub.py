"""Trained models out of a run: export, load, evaluate, predict."""

import csv
import importlib.util
import io
import json
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

import ccl_timm
from ccl_timm.hub import publish
from ccl_timm.hub.publish import export
from ccl_timm.training.checkpoints import load_trained

from ..conftest import results


@pytest.fixture(scope='session')
def exported(trained, tmp_path_factory):
    """An exported model. Do not change it."""
    folder = tmp_path_factory.mktemp('export') / 'model'
    export(trained, folder)
    return folder


def test_export_gives_the_same_logits_through_timm(trained, exported):
    images = torch.randn(2, 3, 32, 32)
    model = timm.create_model(f'local-dir:{exported}', pretrained=True).eval()
    assert torch.equal(model(images), load_trained(trained).model(images))
    again = ccl_timm.create_model(f'local-dir:{exported}', pretrained=True).eval()
    assert torch.equal(model(images), again(images))


def test_export_holds_what_it_was_trained_with(exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        'config.json',
        'model.safetensors',
        'modeling_ccl_timm.py',
    ]
    config = json.loads((exported / 'config.json').read_text())
    assert config['architecture'] == 'resnet18_cam' and config['label_names'] == ['ant', 'bee', 'cat']
    cfg = config['pretrained_cfg']
    assert cfg['input_size'] == [3, 32, 32] and cfg['mean'] == [0.4] * 3 and cfg['std'] == [0.2] * 3
    assert cfg['crop_pct'] == 1.0 and config['ccl_timm']['package'] == 'ccl-timm'


def test_export_loads_in_a_fresh_process(exported):
    code = f"import ccl_timm, timm; print(timm.create_model('local-dir:{exported}', pretrained=True).num_classes)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '3'


@pytest.fixture
def run_on(run_cli, folder, workdir):
    """Train on images of a colour mode."""

    def run(mode, *more):
        code, _, err = run_cli(
            'timm', 'train.py', '--model', 'fast_convnet_linear', '--data-dir', folder, '--input-img-mode', mode,
            '--img-size', '32', '--epochs', '1', '-b', '8', '-j', '0', '--output', 'out', '--experiment', mode, *more,
        )  # fmt: skip
        assert code == 0, err
        return ccl_timm.load(f'out/{mode}')

    return run


@pytest.fixture
def run_on_hsv(run_on):
    return run_on('HSV')


@pytest.mark.parametrize('mode, channels', [('L', 1), ('RGBA', 4), ('HSV', 3)])
def test_whatever_the_channels_the_run_is_used_as_any_other(mode, channels, run_on, run_cli, folder):
    run = run_on(mode, '--in-chans', channels)
    image = folder / 'validation' / 'ant' / '0.png'
    expected = run.predict(str(image))
    run.export('export')
    assert ccl_timm.load('export').predict(str(image)) == expected
    model = timm.create_model('local-dir:export', pretrained=True)
    assert len(timm.data.resolve_model_data_config(model)['mean']) == channels
    code, out, err = run_cli('ccl-timm', 'card', f'out/{mode}')
    assert code == 0 and f".convert('{mode}')" in out and 'from transformers' not in out, err
    code, out, err = run_cli('ccl-timm', 'embed', f'out/{mode}', folder / 'validation', '-o', 'x.npz')
    assert code == 0, err


def test_channels_need_no_size(run_cli, folder, workdir):
    """The network's own size, as a user would type it."""
    argv = ('--model', 'fast_convnet_cam', '--loss', 'cc', '--data-dir', folder, '--in-chans', '1', '--epochs', '1')
    code, _, err = run_cli('timm', 'train.py', *argv, '-b', '8', '-j', '0', '--output', 'out', '--experiment', 'grey')
    assert code == 0 and '1x32x32' in err, err
    assert len(ccl_timm.load('out/grey').predict(str(folder / 'validation' / 'ant' / '0.png'))) == 1


def test_an_export_that_fails_leaves_nothing(run_on_hsv, monkeypatch, workdir):
    monkeypatch.setattr(publish, 'save_config_for_hf', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_on_hsv.export('export')
    assert [*(workdir / 'export').iterdir()] == []


def test_an_export_keeps_the_colour_mode_of_its_images(run_on_hsv, folder):
    run_on_hsv.export('export')
    again = ccl_timm.load('export')
    again.export('again')  # an export of an export
    red = Image.new('RGB', (32, 32), (200, 30, 30))
    for other in (again, ccl_timm.load('again')):
        assert other.predict(red) == run_on_hsv.predict(red)
        measured = other.evaluate(data_dir=str(folder), split='validation').metrics
        assert measured == run_on_hsv.evaluate().metrics


@pytest.mark.skipif(not importlib.util.find_spec('onnxscript'), reason='needs the extra onnx')
def test_onnx_holds_the_colour_mode_of_its_images_and_the_temperature(run_on_hsv):
    import onnx

    fitted = run_on_hsv.evaluate(fit_temperature=True).calibration
    run_on_hsv = ccl_timm.load('out/HSV')
    run_on_hsv.export('onnx', format='onnx')
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load('onnx/model.onnx').metadata_props}
    assert facts['input_img_mode'] == 'HSV' and facts['calibration'] == fitted


def test_a_colour_mode_that_does_not_exist_is_named(run_cli, folder, workdir):
    code, _, err = run_cli(
        'timm', 'train.py', '--model', 'test_resnet', '--data-dir', folder, '--input-img-mode', 'hsv'
    )
    assert code == 2 and '--input-img-mode' in err and "'hsv'" in err and 'HSV' in err


def test_export_writes_nothing_over(run_cli, trained, exported):
    code, out, err = run_cli('ccl-timm', 'export', trained, exported)
    assert code == 2 and 'already holds model.safetensors' in err


def test_onnx_is_equal_for_any_batch_and_holds_classes_and_normalisation(trained, tmp_path, run_cli):
    onnxruntime = pytest.importorskip('onnxruntime')
    code, out, err = run_cli('ccl-timm', 'export', trained, tmp_path / 'onnx', '--format', 'onnx')
    assert code == 0, err
    session = onnxruntime.InferenceSession(str(tmp_path / 'onnx' / 'model.onnx'))
    model = load_trained(trained).model
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        logits = session.run(None, {'images': images.numpy()})[0]
        assert torch.allclose(torch.from_numpy(logits), model(images), atol=1e-4)
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert facts['class_names'] == ['ant', 'bee', 'cat'] and facts['mean'] == [0.4] * 3
    assert facts['architecture'] == 'resnet18_cam' and facts['input_size'] == [3, 32, 32]


def test_validate_gives_what_training_reported(run_cli, trained, workdir):
    code, out, err = run_cli('timm', 'validate.py', trained, '-j', '0')
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO((trained / 'summary.csv').read_text())))
    best = max(rows, key=lambda row: float(row['eval_top1']))
    assert results(out)['top1'] == float(best['eval_top1'])
    assert results(out)['images'] == 12


def test_validate_an_export_on_data_given(run_cli, exported, folder, workdir):
    code, out, err = run_cli('timm', 'validate.py', exported, '--data-dir', folder, '--split', 'train', '-j', '0')
    assert code == 0 and results(out)['images'] == 24
    code, out, err = run_cli('timm', 'validate.py', exported)
    assert code == 2 and 'No data to evaluate on' in err


def test_predict_files_and_folders_in_three_formats(run_cli, trained, folder):
    code, out, err = run_cli('ccl-timm', 'predict', trained, folder / 'validation' / 'cat', '--topk', '2')
    assert code == 0 and len(out.splitlines()) == 1 + 4 * 2
    code, out, err = run_cli(
        'ccl-timm', 'predict', trained, folder / 'validation' / 'cat' / '0.png', '--format', 'json'
    )
    row = json.loads(out)[0]
    assert row['image'].endswith('0.png') and row['predictions'][0]['class'] in ('ant', 'bee', 'cat')
    code, out, err = run_cli('ccl-timm', 'predict', trained, folder / 'validation', '--format', 'csv', '-b', '5')
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 12 and {row['rank'] for row in rows} == {'1'}


def test_predictions_are_those_of_the_validation(run_cli, trained, folder):
    _, out, _ = run_cli('ccl-timm', 'predict', trained, folder / 'validation', '--format', 'csv')
    rows = list(csv.DictReader(io.StringIO(out)))
    correct = sum(row['image'].split('/')[-2] == row['class'] for row in rows)
    _, out, _ = run_cli('timm', 'validate.py', trained, '-j', '0')
    assert 100 * correct / len(rows) == pytest.approx(results(out)['top1'])


def test_image_that_cannot_be_decoded_is_named_and_left_out(run_cli, trained, tmp_path):
    Image.new('RGB', (20, 20), 'red').save(tmp_path / 'a.png')
    (tmp_path / 'b.png').write_bytes(b'not an image')
    Image.new('I;16', (20, 20)).save(tmp_path / 'c.png')
    code, out, err = run_cli('ccl-timm', 'predict', trained, tmp_path, '--format', 'json')
    assert code == 1
    assert [row['image'].split('/')[-1] for row in json.loads(out)] == ['a.png', 'c.png']
    assert "b.png' is not a readable image and was left out" in err


@pytest.mark.parametrize(
    'argv, message',
    [
        (['predict', 'nowhere', '{trained}/args.yaml'], "'nowhere' does not exist"),
        (['predict', '{trained}', 'nothing.png'], "'nothing.png' does not exist"),
        (['predict', '{trained}', '{empty}'], 'holds no image'),
        (['predict', '{empty}', '{trained}/args.yaml'], 'holds no checkpoint'),
        (['predict', '{trained}', '{trained}/args.yaml', '--use-ema'], 'has no moving average'),
        (['validate', '{trained}', '--data-dir', '{folder}', '--split', 'vall', '-j', '0'], "has no split 'vall'"),
        (['export', '{trained}', '/proc/nothing'], "error: '/proc/nothing"),
        (['export', '{empty}', 'x'], 'holds no checkpoint'),
        (
            ['validate', '{trained}', '--dataset', 'digits', '-j', '0'],
            'The embedded digits have the classes 0 to 9, in this order, and not those of the model',
        ),
    ],
)
def test_bad_input_is_one_sentence(argv, message, run_cli, trained, folder, workdir):
    (workdir / 'empty').mkdir()
    argv = [word.format(trained=trained, empty=workdir / 'empty', folder=folder) for word in argv]
    code, out, err = run_cli('ccl-timm', *argv)
    assert code == 2 and message in err.splitlines()[-1]
