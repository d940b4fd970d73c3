"""What other people's config.json may do: describe a model and nothing else. Each mistake in it is one sentence."""

import json
import pickle

import pytest
import timm
import torch

import ccl_timm
from ccl_timm.models import builder
from ccl_timm.training.checkpoints import build_model, load_trained


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
    folders = {}
    for name in ('test_resnet', 'test_resnet_cam'):
        folders[name] = tmp_path_factory.mktemp(name)
        model = ccl_timm.create_model(name, num_classes=3)
        timm.models.save_for_hf(model, str(folders[name]), safe_serialization=True)
    return folders


@pytest.fixture(params=['test_resnet', 'test_resnet_cam'])
def folder(request, exports, tmp_path):
    for file in exports[request.param].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


MERGED = ('pretrained_cfg', 'model_args')


def change(folder, **changes):
    """Change the config; a dict is merged into that of the same name."""
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in MERGED else value
    path.write_text(json.dumps(config))


def test_the_config_does_not_say_where_weights_lie(folder):
    expected = load_trained(folder).model.state_dict()
    other = {key: torch.zeros_like(value) for key, value in expected.items()}
    torch.save(other, folder / 'evil.bin')
    evil = str(folder / 'evil.bin')
    change(
        folder,
        pretrained_cfg={
            'file': evil,
            'url': f'file://{evil}',
            'hf_hub_id': 'me/evil',
            'hf_hub_filename': 'evil.bin',
            'custom_load': 'hf',
            'source': '',
            'state_dict': {'conv1.0.weight': 0},
            'field_of_the_future': 1,
        },
    )
    for model in (load_trained(folder).model, build_model({'model': f'local-dir:{folder}'}, pretrained=True)):
        actual = model.state_dict()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize('pretrained', [False, True])
@pytest.mark.parametrize(
    'name', ['checkpoint_path', 'pretrained_cfg_overlay', 'cache_dir', 'features_only', 'device', 'dtype', 'scriptable',
             'exportable', 'model_name', 'self', 'pretrained', 'pretrained_cfg', 'feature_cls']
)  # fmt: skip
def test_arguments_that_are_no_options_of_an_architecture_are_refused(name, pretrained, folder):
    change(folder, model_args={name: 'x'})
    with pytest.raises(ccl_timm.UserError, match=f"its model_args set '{name}'"):
        build_model({'model': f'local-dir:{folder}'}, pretrained=pretrained)


def test_timms_create_model_does_not_pass_them_to_our_models_either(exports, tmp_path):
    for file in exports['test_resnet_cam'].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path, model_args={'checkpoint_path': 'x'})
    with pytest.raises(ccl_timm.UserError, match='checkpoint_path'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


def test_of_a_cfg_from_the_hub_the_repositorys_weights_count(tmp_path, monkeypatch):
    model = timm.create_model('test_resnet_cam', num_classes=5)
    monkeypatch.setattr(builder, 'read_hub_weights', lambda name, cache_dir: {'me/mine': model.state_dict()}[name])
    torch.save({'x': torch.zeros(1)}, tmp_path / 'planted.pth')
    cfg = {**model.pretrained_cfg, 'source': 'hf-hub', 'hf_hub_id': 'me/mine', 'file': str(tmp_path / 'planted.pth')}
    loaded = timm.create_model('test_resnet_cam', pretrained=True, pretrained_cfg={**cfg, 'num_classes': 5})
    assert torch.equal(loaded.fc.out.weight, model.fc.out.weight)


def test_other_formats_are_not_opened(folder):
    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps({}))
    with pytest.raises(
        ccl_timm.UserError, match='has no model.safetensors.* give safe_serialization=True to save_for_hf'
    ):
        load_trained(folder)


@pytest.mark.parametrize('asked', [{}, {'num_classes': 3}, {'num_classes': 7}])
def test_a_number_of_classes_that_is_not_that_of_the_weights_is_refused(asked, folder):
    change(folder, num_classes=4)
    with pytest.raises(ccl_timm.UserError, match='says 4 classes, its weights have 3'):
        ccl_timm.create_model(f'local-dir:{folder}', pretrained=True, **asked)


WRONG = [None, 7, -1, 0.5, True, 'x', [], ['x', 3], {}, {'a': 1}, [1, 2, 3], 10**30]
KEYS = ['input_size', 'mean', 'std', 'crop_pct', 'interpolation', 'num_classes', 'label_names', 'classifier',
        'first_conv', 'pool_size', 'fixed_input_size', 'test_input_size', 'crop_mode']  # fmt: skip


@pytest.mark.parametrize('place', ['', 'pretrained_cfg', 'model_args'])
def test_wrong_values_are_a_sentence_or_change_nothing(place, exports, tmp_path):
    for file in exports['test_resnet_cam'].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    good = (tmp_path / 'config.json').read_text()
    keys = {'': ['architecture', 'pretrained_cfg', 'model_args', 'ccl_timm', 'num_classes', 'label_names']}
    args = ['in_chans', 'img_size', 'global_pool', 'hidden_features', 'block_args', 'small_input', 'no_such_option']
    for key in keys.get(place, KEYS if place == 'pretrained_cfg' else args):
        for value in WRONG:
            (tmp_path / 'config.json').write_text(good)
            change(tmp_path, **({place: {key: value}} if place else {key: value}))
            try:
                trained = load_trained(tmp_path)
                timm.data.create_transform(**trained.data_config)
            except ccl_timm.UserError as error:
                assert str(tmp_path) in str(error) and '\n' not in str(error)


@pytest.mark.parametrize(
    'text', ['', '{', '[]', '7', '[' * 100_000, '{"architecture": "nonet", "ccl_timm": {"plugins": 7}}']
)
def test_files_that_are_no_config_are_a_sentence(text, folder):
    (folder / 'config.json').write_text(text)
    with pytest.raises(ccl_timm.UserError):
        load_trained(folder)


def test_a_damaged_initial_checkpoint_is_a_sentence(tmp_path):
    (tmp_path / 'fake.safetensors').write_bytes(b'x' * 100)
    with pytest.raises(ccl_timm.UserError, match='cannot be built'):
        build_model({'model': 'test_resnet'}, checkpoint_path=str(tmp_path / 'fake.safetensors'))
