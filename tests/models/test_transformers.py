"""What export writes loads in Hugging Face's transformers, also with other classes. Nothing is downloaded."""

import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import ccl_timm
from ccl_timm.hub.publish import export

transformers = pytest.importorskip('transformers')

HEADS = ['cam', 'cosine', 'linear', 'mc', 'mlp', 'pedcc']
PYTORCH = {'format': 'pt'}
NAMES = ['ant', 'bee', 'cat', 'dog', 'eel']


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Head -> folder of an export. Do not change it."""
    root = tmp_path_factory.mktemp('exports')
    for head in HEADS:
        options = {'scale': 7.0, 'feature_dim': 64} if head == 'cosine' else {}
        model = ccl_timm.create_model(f'test_resnet_{head}', num_classes=5, **options)
        if head == 'cosine':
            model.fc.scale.fill_(9)
        facts = {'model_config': {'label_names': NAMES}}
        timm.models.save_for_hf(model, str(root / 'saved' / head), safe_serialization=True, **facts)
        export(root / 'saved' / head, root / head)
    return {head: root / head for head in HEADS}


def _load(folder, kind=transformers.AutoModelForImageClassification, **kwargs):
    return kind.from_pretrained(folder, **kwargs).eval()


@pytest.mark.parametrize('head', HEADS)
def test_export_gives_the_same_logits_and_class_names(exported, head):
    images = torch.randn(2, 3, 160, 160)
    ours = timm.create_model(f'local-dir:{exported[head]}', pretrained=True).eval()
    theirs = _load(exported[head])
    assert torch.equal(theirs(images).logits, ours(images))
    assert list(theirs.config.id2label.values()) == NAMES
    features = _load(exported[head], transformers.AutoModel)(images)
    feature_map = ours.forward_features(images)
    if head != 'mc':  # which has another feature map without its classes
        assert torch.equal(features.last_hidden_state, feature_map)
        assert torch.equal(features.pooler_output, ours.forward_head(feature_map, pre_logits=True))


@pytest.mark.parametrize('head', HEADS)
def test_a_copy_saved_by_transformers_loads_in_timm(exported, head, tmp_path):
    _load(exported[head]).save_pretrained(tmp_path)
    copy, before = (
        timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict() for folder in (tmp_path, exported[head])
    )
    assert copy.keys() == before.keys() and all(torch.equal(copy[name], before[name]) for name in before)


def test_export_predicts_in_a_pipeline(exported):
    image = Image.effect_noise((200, 200), 60).convert('RGB')
    found = transformers.pipeline('image-classification', model=str(exported['cam']))(image, top_k=5)
    model = timm.create_model(f'local-dir:{exported["cam"]}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    expected = model(transform(image)[None]).softmax(1)[0]
    assert {row['label']: row['score'] for row in found} == pytest.approx(
        dict(zip(NAMES, expected.tolist(), strict=True))
    )


REMOTE = """
import sys
from transformers import AutoModel, AutoModelForImageClassification, pipeline
if sys.argv[2:]:  # a package that is to look as if it were not installed
    class Finder:
        def find_spec(name, path=None, target=None):
            if name == sys.argv[2]:
                raise ModuleNotFoundError(f'No module named {name!r}')
    sys.meta_path.insert(0, Finder)
folder, trust = sys.argv[1], {'trust_remote_code': True}
model = AutoModelForImageClassification.from_pretrained(folder, **trust)
made = AutoModel.from_pretrained(folder, **trust), model, model.timm_model.fc
print(*(type(module).__name__ for module in made))
print(pipeline('image-classification', folder, **trust).model.config.id2label)
"""


def _run_remote(*args, cache):
    env = {**os.environ, 'HF_MODULES_CACHE': str(cache), 'TRANSFORMERS_VERBOSITY': 'error'}
    return subprocess.run([sys.executable, '-c', REMOTE, *map(str, args)], capture_output=True, text=True, env=env)


def test_export_loads_without_an_import_where_its_code_is_trusted(exported, tmp_path):
    done = _run_remote(exported['cam'], cache=tmp_path)
    kinds, labels = done.stdout.splitlines()
    assert kinds == 'TimmWrapperModel TimmWrapperForImageClassification CAMHead'
    assert labels == str(dict(enumerate(NAMES)))


def test_trusted_code_names_the_package_that_it_needs(exported, tmp_path):
    done = _run_remote(exported['cam'], 'ccl_timm', cache=tmp_path)
    assert done.returncode and 'packages that were not found in your environment: ccl_timm' in done.stderr


@pytest.mark.parametrize('head', HEADS)
def test_other_classes_get_initial_values_and_the_rest_is_kept(exported, head, monkeypatch):
    _fill_new_memory(monkeypatch)
    model = _load(exported[head], num_labels=3, ignore_mismatched_sizes=True).timm_model
    monkeypatch.undo()
    before = timm.create_model(f'local-dir:{exported[head]}', pretrained=True).state_dict()
    after = model.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    same = {name for name in before if before[name].shape == after[name].shape}
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert before.keys() - same
    if head == 'pedcc':
        assert torch.equal(model.fc.weight, ccl_timm.pedcc_centroids(3, 512).float())
    if head == 'cosine':
        assert model.fc.scale == 9 and 0.5 < model.fc.weight.norm(dim=1).mean() < 2


@pytest.mark.parametrize('head', HEADS)
def test_weights_of_a_backbone_leave_a_head_with_initial_values(exported, head, tmp_path, monkeypatch):
    shutil.copy(exported[head] / 'config.json', tmp_path)
    save_file(timm.create_model('test_resnet', num_classes=0).state_dict(), tmp_path / 'model.safetensors', PYTORCH)
    _fill_new_memory(monkeypatch)
    model = _load(tmp_path)
    monkeypatch.undo()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    if head == 'cosine':
        assert model.timm_model.fc.scale == 7


def _fill_new_memory(monkeypatch):
    """Let memory that is never written show as NaN."""
    for name in ('empty', 'empty_like'):
        monkeypatch.setattr(torch, name, _filled(getattr(torch, name)))


def _filled(function):
    def fill(*args, **kwargs):
        tensor = function(*args, **kwargs)
        return tensor.fill_(float('nan')) if tensor.is_floating_point() and not tensor.is_meta else tensor

    return fill
