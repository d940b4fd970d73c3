"""Python's way to what the commands do: train, load, and a run's methods."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ccl_timm

from .conftest import results

SETTINGS = dict(model='test_resnet_cam', loss='cc', img_size=32, batch_size=8, workers=0, epochs=1)


@pytest.fixture
def run(trained):
    return ccl_timm.load(trained)


def test_a_trained_run_answers_as_the_commands_do(run, trained, folder, run_cli):
    images = sorted((folder / 'validation').rglob('*.png'))
    found = run.evaluate(batch_size=8)
    printed = results(run_cli('timm', 'validate.py', trained, '-b', '8', '-j', '0')[1])
    assert {name: printed[name] for name in found.metrics} == found.metrics
    (first, *_), *_ = predictions = run.predict(images, topk=2)
    assert len(predictions) == len(images) and first['class'] in run.labels and first['probability'] > 0
    assert run.predict(Image.open(images[0]))[0][:2] == predictions[0]
    assert repr(run).startswith('<Run ') and 'resnet18_cam, 3 classes' in repr(run)


def test_mistakes_of_a_run_are_sentences(run, workdir):
    with pytest.raises(ccl_timm.UserError, match="'nowhere.jpg' cannot be read: No such file or directory"):
        run.predict('nowhere.jpg')
    with pytest.raises(ccl_timm.UserError, match="no form 'pt' of an export; there are timm and onnx"):
        run.export('exported', 'pt')


def test_outputs_are_those_of_the_head(run, folder):
    images = [Image.open(path) for path in sorted((folder / 'validation').rglob('*.png'))[:5]]
    outputs = run.outputs(images)
    assert outputs.attention.shape == (5, 512) and ((outputs.attention > 0) & (outputs.attention < 1)).all()
    torch.testing.assert_close(run.embed(images, batch_size=2), outputs.features, rtol=1e-4, atol=1e-4)


def test_train_fit_export_and_load(folder, workdir):
    run = ccl_timm.train(**SETTINGS, data_dir=str(folder), experiment='a', smoothing=0.0)
    assert Path(run.source) == Path('output/train/a') and run.trained.settings['loss'] == 'cc'
    again = run.fit(epochs=2, experiment='b', lr=0.001)
    assert again.trained.settings['initial_checkpoint'].startswith('output/train/a/')
    assert (again.trained.settings['epochs'], again.trained.settings['batch_size']) == (2, 8)
    assert {path.name for path in again.export('exported')} == {
        'model.safetensors',
        'config.json',
        'modeling_ccl_timm.py',
    }
    image = next((folder / 'validation').rglob('*.png'))
    assert ccl_timm.load('exported').predict(image) == again.predict(image)
    with pytest.raises(ccl_timm.UserError, match="'exported' is no run"):
        ccl_timm.load('exported').fit(epochs=1)


def test_fit_goes_on_with_all_weights_unless_data_are_named(run, folder, workdir):
    begun = run.model.get_classifier().state_dict()
    still = {'epochs': 1, 'lr': 1e-12, 'warmup_epochs': 0}
    same = run.fit(**still, experiment='same')
    ended = same.model.get_classifier().state_dict()
    assert all(
        torch.allclose(ended[name], value, atol=1e-6) for name, value in begun.items() if value.is_floating_point()
    )
    for split in ('train', 'validation'):
        for name in ('cat', 'dog'):
            shutil.copytree(next((folder / split).iterdir()), Path('pets', split, name))
    other = same.fit(**still, data_dir='pets', experiment='other')
    assert other.trained.class_names == ['cat', 'dog'] and other.model.num_classes == 2


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'modle': 'resnet18'}, "Unknown setting 'modle'; did you mean 'model'?"),
        ({'epochs': 1.5}, "'epochs=1.5' does not fit: '1.5' is not a whole number"),
        ({'lr': -1.0}, "'lr=-1.0' does not fit"),
        ({'loss': 'cd', 'data_dir': 'x'}, "Unknown loss 'cd'"),
    ],
)
def test_mistakes_are_sentences(settings, message, workdir):
    with pytest.raises(ccl_timm.UserError) as caught:
        ccl_timm.train(**settings)
    assert message in str(caught.value) and not any(workdir.iterdir())


def test_the_import_loads_neither_data_nor_training():
    code = 'import sys, ccl_timm; print([m for m in sys.modules if m.startswith("ccl_timm.")])'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert 'ccl_timm.task' in loaded and not any(
        f'ccl_timm.{room}' in loaded for room in ('data', 'training', 'hub', 'cli')
    )
