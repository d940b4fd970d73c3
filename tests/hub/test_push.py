"""Runs to the Hub and back, against a Hub on loopback; and their cards."""

import contextlib
import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load, save

import ccl_timm
from ccl_timm import cli, models
from ccl_timm.experiments.results import read_record
from ccl_timm.hub import card, publish
from ccl_timm.hub.release import read_release
from ccl_timm.models import checkpoints
from ccl_timm.training import recipes
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.run_dir import RunDir

from ..conftest import TINY
from ..fake_hub import Fault, short_patience

ROOT = Path(__file__).resolve().parents[2]
FILES = ['README.md', 'args.yaml', 'config.json', 'model.safetensors', 'modeling_ccl_timm.py', 'summary.csv']
REPO = 'me/test_resnet_cam.cc_bees'


def _with_settings(run, folder, **changes):
    """A copy of a run with other settings in its args.yaml."""
    shutil.copytree(run, folder)
    settings = yaml.safe_load((run / 'args.yaml').read_text())
    (folder / 'args.yaml').write_text(yaml.safe_dump({**settings, **changes}))
    return folder


@pytest.fixture(scope='module')
def run(folder, tmp_path_factory):
    """A run of a tiny model. Do not change it."""
    output = tmp_path_factory.mktemp('runs')
    argv = ['train.py', *TINY, '--model', 'test_resnet_cam', '--data-dir', str(folder), '--output', str(output)]
    assert cli.timm([*argv, '--experiment', 'cc', '--mean', '0.4', '--std', '0.2']) == 0
    return output / 'cc'


@pytest.fixture(scope='module')
def baseline(run, tmp_path_factory):
    """What a run with cross-entropy and another seed would record; a card reads no more of it."""
    return _with_settings(run, tmp_path_factory.mktemp('runs') / 'ce', loss='ce', seed=7)


@pytest.fixture
def pushed(online, run):
    """The stand-in Hub with the run in REPO."""
    publish.push(run, REPO)
    return online


def test_push_creates_a_repository_with_weights_config_card_settings_results(run_cli, online, run):
    code, out, err = run_cli('ccl-timm', 'push', run, '--repo-id', REPO)
    assert code == 0, err
    files = online.files(REPO)
    assert sorted(files) == ['.gitattributes', *FILES]
    assert len(files['model.safetensors']) >= 100_000 and online.large  # through large-file storage, the rest in git
    assert len(online.repositories[REPO].commits) == 2 and not online.repositories[REPO].private
    config = json.loads(files['config.json'])
    assert config['architecture'] == 'test_resnet_cam' and config['label_names'] == ['ant', 'bee', 'cat']
    assert config['ccl_timm']['package'] == 'ccl-timm' and config['ccl_timm']['version'] == ccl_timm.__version__
    metadata = json.loads(files['model.safetensors'][8:].split(b'}', 1)[0] + b'}}')['__metadata__']
    assert (
        metadata['loss'] == 'cc' and metadata['version'] == ccl_timm.__version__ and list(metadata) == sorted(metadata)
    )
    assert config['ccl_timm']['cost']['parameters'] == sum(p.numel() for p in load_trained(run).model.parameters())
    cfg = config['pretrained_cfg']
    assert cfg['input_size'] == [3, 32, 32] and cfg['mean'] == [0.4] * 3 and cfg['std'] == [0.2] * 3
    assert f'{online.url}/{REPO}/commit/' in out and 'model.safetensors' in err


def test_what_goes_up_names_no_folder_of_this_machine(pushed, folder, run):
    files = pushed.files(REPO)
    texts = b''.join(content for path, content in files.items() if path != 'model.safetensors').decode()
    assert str(folder.parent) not in texts and str(run.parent) not in texts
    assert f'--data-dir {folder.name}' in texts
    assert yaml.safe_load(files['args.yaml'])['data_dir'] == folder.name


def test_examples_go_up_without_their_metadata_and_are_shown_with_scores(run_cli, online, run, workdir):
    photo, drawing = workdir / 'ant in a park.jpg', workdir / 'bee.png'
    exif = Image.Exif()
    exif[0x8825] = {1: 'N', 2: (52.0, 31.0, 12.0)}  # the place
    Image.effect_noise((40, 50), 60).convert('RGB').save(photo, exif=exif)
    Image.new('L', (33, 20), 90).save(drawing)
    code, _, err = run_cli('ccl-timm', 'push', run, '--repo-id', REPO, '--examples', photo, drawing)
    assert code == 0 and 'examples/1.png' in err, err
    files = online.files(REPO)
    assert files.keys() == {'.gitattributes', *FILES, 'examples/1.png', 'examples/2.png'}
    widget = ModelCard(files['README.md'].decode()).data.widget
    assert [(row['src'], row['example_title']) for row in widget] == [
        ('examples/1.png', 'ant in a park'), ('examples/2.png', 'bee'),
    ]  # fmt: skip
    model = ccl_timm.load(run)
    for row in widget:
        shown = Image.open(BytesIO(files[row['src']]))
        assert not shown.getexif() and shown.mode == 'RGB'
        (best,) = model.predict(shown, topk=3)
        assert row['output'] == [{'label': p['class'], 'score': round(p['probability'], 4)} for p in best]
    code, _, err = run_cli('ccl-timm', 'push', run, '--repo-id', REPO, '--examples', photo, run / 'summary.csv')
    assert code == 2 and err.startswith("error: The example '") and 'summary.csv' in err and 'not an image' in err


def test_second_push_changes_nothing(run_cli, pushed, run):
    before = pushed.files(REPO), len(pushed.requests)
    code, out, err = run_cli('ccl-timm', 'push', run, '--repo-id', REPO)
    assert code == 0 and 'nothing to send' in err
    assert pushed.files(REPO) is before[0]
    assert not [line for line in pushed.requests[before[1] :] if 'PUT' in line or '/commit/' in line]


def test_dry_run_sends_nothing(run_cli, online, run):
    code, out, err = run_cli('ccl-timm', 'push', run, '--repo-id', REPO, '--dry-run')
    assert code == 0 and 'nothing was sent' in err and all(name in err for name in FILES)
    assert online.requests == [] and out == ''


def test_private_and_revision(run_cli, online, run):
    assert run_cli('ccl-timm', 'push', run, '--repo-id', 'me/secret', '--private', '--revision', 'v2')[0] == 0
    assert online.repositories['me/secret'].private
    assert sorted(online.files('me/secret', 'v2')) == ['.gitattributes', *FILES]
    assert 'model.safetensors' not in online.files('me/secret')
    ccl_timm.create_model('hf-hub:me/secret@v2', pretrained=True)
    online.add('me/open')
    code, out, err = run_cli('ccl-timm', 'push', run, '--repo-id', 'me/open', '--private')
    assert code == 2 and 'exists and is public' in err


def test_a_card_written_by_hand_stays_without_replace_card(run_cli, pushed, run, baseline):
    repository = pushed.repositories[REPO]
    repository.commit('main', {**pushed.files(REPO), 'README.md': pushed.files(REPO)['README.md'] + b'My words.\n'})
    code, out, err = run_cli('ccl-timm', 'push', run, '--repo-id', REPO)
    assert code == 0 and 'by hand and stays' in err
    assert pushed.files(REPO)['README.md'].endswith(b'My words.\n')
    assert run_cli('ccl-timm', 'push', run, '--repo-id', REPO, '--replace-card')[0] == 0
    assert card.is_unedited(pushed.files(REPO)['README.md'].decode())
    # a card of ours follows what it tells of
    assert run_cli('ccl-timm', 'push', run, '--repo-id', REPO, '--baseline', baseline)[0] == 0
    assert b'`test_resnet_cam`, seed 7' in pushed.files(REPO)['README.md']


def test_loads_by_both_ways_in_a_fresh_process_and_offline(pushed, run, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, tmp_path / 'images.pt')
    code = f"""
from tests.fake_hub import left_loopback, stay_on_loopback
stay_on_loopback()
import ccl_timm, timm, torch
torch.set_num_threads({torch.get_num_threads()})
ours = ccl_timm.create_model('hf-hub:{REPO}', pretrained=True).eval()
ccl_timm.register_variant('test_resnet', 'cam')
timms = timm.create_model('hf-hub:{REPO}', pretrained=True).eval()
other = timm.create_model('hf-hub:{REPO}', pretrained=True, num_classes=7).eval()
images = torch.load('images.pt', weights_only=True)
assert torch.equal(ours(images), timms(images)) and other(images).shape == (2, 7)
assert torch.equal(other.get_classifier().hidden.weight, ours.get_classifier().hidden.weight)
assert left_loopback == []
torch.save(ours(images), 'logits.pt')
"""
    environment = {
        **os.environ,
        'HF_ENDPOINT': pushed.url,
        'HF_HOME': str(tmp_path / 'home'),
        'HF_HUB_DISABLE_XET': '1',
        'HF_TOKEN': '',
        'PYTHONPATH': f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}',
    }
    for offline in ('0', '1'):
        environment['HF_HUB_OFFLINE'] = offline
        requests = len(pushed.requests)
        result = subprocess.run(
            [sys.executable, '-c', code], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert (len(pushed.requests) > requests) == (offline == '0')
        assert torch.equal(torch.load(tmp_path / 'logits.pt'), load_trained(run).model(images))


def test_validate_and_predict_take_a_repository(run_cli, pushed, run, folder):
    code, out, err = run_cli('timm', 'validate.py', run, '-j', '0')
    assert code == 0, err
    code, again, err = run_cli('timm', 'validate.py', f'hf-hub:{REPO}', '--data-dir', folder, '-j', '0')
    assert code == 0 and again == out, err
    assert run_cli('ccl-timm', 'predict', f'hf-hub:{REPO}', folder / 'validation' / 'cat')[0] == 0


def test_training_goes_on_from_a_repository(run_cli, pushed, folder, workdir):
    argv = [*TINY, '--model', f'hf-hub:{REPO}', '--pretrained', '--data-dir', folder, '--experiment', 'tuned']
    code, out, err = run_cli('timm', 'train.py', *argv)
    assert code == 0, err
    code, out, err = run_cli('ccl-timm', 'card', workdir / 'output' / 'train' / 'tuned')
    assert code == 0 and f'base_model: {REPO}\n' in out


@pytest.mark.parametrize(
    'fault, message',
    [
        (('POST /api/repos/create', 500), 'the Hub answered 500'),
        (('POST /api/repos/create', 'hang'), 'does not answer in time'),
        (('POST .*/preupload/', 500), 'the Hub answered 500'),
        (('POST .*/commit/', 409), 'somebody else changes it'),
        (('POST .*/commit/', 412), 'changed meanwhile'),
        (('POST .*/commit/', 'hang'), 'does not answer in time'),
        (('PUT /lfs/', 'drop'), 'cannot be reached'),
        (('PUT /lfs/', 500), 'the Hub answered 500'),
    ],
)
def test_an_interrupted_push_changes_nothing_and_can_be_repeated(fault, message, run_cli, online, run):
    online.add(REPO)
    before = online.files(REPO)
    online.faults = [Fault(*fault)]
    with short_patience() if fault[1] == 'hang' else contextlib.nullcontext():
        code, out, err = run_cli('ccl-timm', 'push', run, '--repo-id', REPO)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith(f"error: '{REPO}' was not pushed: ") and message in last
    assert online.files(REPO) is before
    online.faults = []
    assert run_cli('ccl-timm', 'push', run, '--repo-id', REPO)[0] == 0
    assert sorted(online.files(REPO)) == ['.gitattributes', *FILES]


@pytest.mark.parametrize(
    'token, repo_id, message',
    [
        ('', 'me/x', 'the Hub does not know you: log in with `hf auth login`'),
        ('hf_other', 'me/x', 'your token may not do this'),
        ('hf_me', '../x', 'names no repository'),
        ('hf_me', '/tmp/x', 'names no repository'),
        ('hf_me', 'x', 'names no repository'),
        ('hf_me', 'a/b/c', 'names no repository'),
    ],
)
def test_push_to_where_one_may_not(token, repo_id, message, run_cli, online, run, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', token)
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', '/nonexistent')
    code, out, err = run_cli('ccl-timm', 'push', run, '--repo-id', repo_id)
    assert code == 2 and message in err.strip().splitlines()[-1]
    assert online.repositories == {}


def test_push_takes_only_runs(run_cli, online, run, exported_run, workdir):
    for source, message in ((exported_run, 'is an exported model'), (workdir / 'none', 'does not exist')):
        code, out, err = run_cli('ccl-timm', 'push', source, '--repo-id', REPO)
        assert code == 2 and message in err.strip().splitlines()[-1]
    assert online.requests == []


@pytest.fixture
def exported_run(run, tmp_path):
    publish.export(run, tmp_path / 'exported')
    return tmp_path / 'exported'


def test_results_and_weights_belong_together(run_cli, run, workdir):
    averaged = _with_settings(run, workdir / 'averaged', model_ema=True)
    for argv, message in (([averaged], 'give --use-ema'), ([run, '--use-ema'], 'has no moving average')):
        code, out, err = run_cli('ccl-timm', 'card', *argv)
        assert code == 2 and message in err


def _with_config(**changes):
    def change(files):
        config = {**json.loads(files['config.json']), **changes}
        return {**files, 'config.json': json.dumps({k: v for k, v in config.items() if v is not None}).encode()}

    return change


def _with_tensor(files):
    tensors = load(files['model.safetensors'])
    name = next(name for name in tensors if name.endswith('hidden.weight'))
    return {**files, 'model.safetensors': save({**tensors, name: torch.zeros(3, 5)})}


def _pickled(files):
    files = {**files, 'pytorch_model.bin': files['model.safetensors']}
    del files['model.safetensors']
    return files


_PLUGIN = {'kind': 'model', 'name': 'toy_net', 'value': 'toy.net:toy_net', 'distribution': 'toy-nets', 'version': '1.2'}


@pytest.mark.parametrize(
    'change, message',
    [
        (_pickled, 'has no model.safetensors, and weights in other formats are not read'),
        (_with_tensor, 'does not fit'),
        (lambda files: {**files, 'model.safetensors': files['model.safetensors'][:-5000]}, 'weights are damaged'),
        (lambda files: {'README.md': b''}, 'it has no file config.json'),
        (lambda files: {**files, 'config.json': b'{"model_type": "vit"}'}, 'another library wrote it'),
        (lambda files: {**files, 'config.json': b'{"architec'}, 'is not JSON'),
        (_with_config(architecture='toy_net', ccl_timm=None), 'import the package that has it before'),
        (
            _with_config(architecture='toy_net', ccl_timm={'plugins': [_PLUGIN]}),
            '`pip install toy-nets`, or import toy.net before',
        ),
        (
            _with_config(architecture='new_net', ccl_timm={'package': 'ccl-timm', 'version': '9.0'}),
            'it was written by ccl-timm 9.0',
        ),
    ],
)
def test_repositories_that_cannot_be_loaded_say_why(change, message, pushed):
    pushed.add('me/odd', change(pushed.files(REPO)))
    with pytest.raises(ccl_timm.UserError) as caught:
        ccl_timm.create_model('hf-hub:me/odd', pretrained=True)
    assert message in str(caught.value) and '\n' not in str(caught.value)


def test_timms_own_create_model_reads_no_pickle_into_our_models(pushed):
    models.register_variant('test_resnet', 'cam')
    pushed.add('me/odd', _pickled(pushed.files(REPO)))
    with pytest.raises(ccl_timm.UserError, match='not read'):
        timm.create_model('hf-hub:me/odd', pretrained=True)


@pytest.mark.parametrize(
    'name, fault, message',
    [
        ('me/nothing', None, 'no such repository, or it is private'),
        ('other/secret', None, 'no such repository, or it is private'),
        (f'{REPO}@v9', None, 'no such revision'),
        ('../x', None, 'names no repository'),
        ('a/b/c', None, 'names no repository'),
        (REPO, 500, 'not in the cache, and the Hub answered 500'),
        (REPO, 401, 'the Hub does not know you'),
        (REPO, 'hang', 'not in the cache, and .* does not answer in time'),
        (REPO, 'offline', 'not in the cache, and HF_HUB_OFFLINE'),
    ],
)
def test_repositories_out_of_reach_say_why(name, fault, message, pushed, monkeypatch):
    pushed.add('other/secret', private=True)
    if fault == 'offline':
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    elif fault:
        pushed.faults = [Fault('(HEAD|GET) .*config.json', fault)]
    with short_patience(), pytest.raises(ccl_timm.UserError, match=message) as caught:
        ccl_timm.create_model(f'hf-hub:{name}', pretrained=True)
    assert '\n' not in str(caught.value)


def test_a_download_that_breaks_off_is_reported(pushed):
    pushed.faults = [Fault('GET .*model.safetensors', 'drop')]
    with pytest.raises(ccl_timm.UserError, match=f"'{REPO}' cannot be loaded"):
        ccl_timm.create_model(f'hf-hub:{REPO}', pretrained=True)


def test_card_parses_back_to_its_results(run_cli, run, baseline):
    code, out, err = run_cli('ccl-timm', 'card', run, '--repo-id', REPO, '--baseline', baseline)
    assert code == 0, err
    read = ModelCard(out)
    top1 = float(list(csv.DictReader((run / 'summary.csv').open()))[-1]['eval_top1'])
    assert [(r.metric_type, r.metric_value) for r in read.data.eval_results][0] == ('accuracy', round(top1, 3))
    assert ModelCard(str(read)).data.eval_results == read.data.eval_results
    assert read.data.library_name == 'timm' and read.data.pipeline_tag == 'image-classification'
    assert 'ccl-timm' in read.data.tags and read.data.license == 'apache-2.0'
    assert read.data.model_name == REPO.partition('/')[2] and read.data.eval_results[0].dataset_split == 'validation'
    assert re.search(r'cross-entropy, same recipe: `test_resnet_cam`, seed 7 \| \d', out)
    for part in ('2010.05469', '32 x 32 px', "the backbone's own", '| seed | 42 |', '--loss cc'):
        assert part in out


@pytest.mark.parametrize(
    'own, shown', [((70, 60), 'seed 7 | 90.00'), ((60, 70), 'seed 7, after epoch 1 | 62.00')], ids=['best', 'not best']
)
def test_a_card_compares_best_with_best_and_else_the_same_epoch(own, shown, run_cli, run, baseline, workdir):
    folders = [Path(shutil.copytree(source, workdir / source.name)) for source in (run, baseline)]
    for folder, values in zip(folders, (own, (62, 90)), strict=True):
        rows = list(csv.DictReader((folder / 'summary.csv').open()))
        with (folder / 'summary.csv').open('w') as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({**rows[-1], 'epoch': epoch, 'eval_top1': value} for epoch, value in enumerate(values))
    code, out, err = run_cli('ccl-timm', 'card', folders[0], '--baseline', folders[1])  # the weights are of epoch 1
    assert code == 0 and shown in out, err


def test_card_and_record_of_hostile_names_and_private_settings(run_cli, run, workdir):
    """Names cannot act as markup or code, and no folder, account or password of this machine goes up."""
    folder = _with_settings(
        run,
        workdir / 'hostile',
        data_dir='/home/alice/b\n# [x](javascript:y) `|',
        model_kwargs={'cache_dir': '/home/alice/c'},
        wandb_project='alice-secret',
        wandb_tags=['/home/alice/t'],
        train_split='/home/alice/train',
    )
    command = ['timm', 'train.py', '--wandb-tags', 'alice-tag', '--data-dir', '/home/alice/a\n```\n# b']
    command += ['--model-kwargs', 'x=https://bob:PASSWORD@host/y']
    environment = json.loads((folder / 'environment.json').read_text())
    record = {**environment, 'command': shlex.join(command), 'recipe': '/home/alice/`r`.yaml'}
    (folder / 'environment.json').write_text(json.dumps(record))
    code, out, err = run_cli('ccl-timm', 'card', folder, '--output', 'card')
    assert code == 0, err
    texts = out + ''.join(path.read_text() for path in (workdir / 'card').iterdir())
    assert not re.search('alice|bob|PASSWORD|wandb_', texts)
    assert r'| data | b&#92;n\# [x\](javascript:y) \`\|, 3 classes |' in out
    assert 'trained with cc on b&#92;n\\# [x\\](javascript:y)' in out
    assert "--data-dir $'a\\n```\\n# b' --model-kwargs x=https://host/y\n```" in out
    assert r'| recipe | <code>\`r\`.yaml</code> |' in out
    config = json.loads((workdir / 'card' / 'config.json').read_text())
    config['label_names'] = ['<script>x</script>', '[x](javascript:y)', '\x1b[31m\n# z']
    text = card.render(config, *read_record(workdir / 'card' / 'runs.jsonl'), REPO)
    assert r'3 classes: &lt;script&gt;x&lt;/script&gt;, [x\](javascript:y), &#92;x1b[31m&#92;n\# z.' in text
    assert ModelCard(text).data.model_name == REPO.partition('/')[2]


@pytest.mark.parametrize('repo_id', ["me/x'; import os #", '../x', 'x', 'me/' + 100 * 'x'])
def test_card_is_for_a_repository(repo_id, run_cli, run):
    code, out, err = run_cli('ccl-timm', 'card', run, '--repo-id', repo_id)
    assert code == 2 and 'names no repository' in err and out == ''


def test_default_repository_can_be_one(run_cli, run, workdir):
    named = _with_settings(run, workdir / 'named', data_dir='Größe/' + 120 * 'ä')
    code, out, err = run_cli('ccl-timm', 'card', named)
    assert code == 0 and "name = 'hf-hub:ccl-timm/test_resnet_cam.cc'" in out, err


def test_official_test_sets_are_called_test_and_by_their_repository(run_cli, run, workdir):
    own = _with_settings(run, workdir / 'own', dataset='torch/cifar10')
    read = ModelCard(run_cli('ccl-timm', 'card', own)[1]).data
    (result, *_) = read.eval_results
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ('uoft-cs/cifar10', 'CIFAR-10', 'test')
    assert read.datasets == ['uoft-cs/cifar10'] and read.model_name == 'test_resnet_cam.cc_cifar10'
    hub = _with_settings(run, workdir / 'hub', dataset='hfds/me/bees', val_split='valid')
    (result, *_) = ModelCard(run_cli('ccl-timm', 'card', hub)[1]).data.eval_results
    assert (result.dataset_type, result.dataset_split) == ('me/bees', 'valid')
    held = _with_settings(run, workdir / 'held', dataset='torch/cifar10', val_fraction=0.1)
    (result, *_) = ModelCard(run_cli('ccl-timm', 'card', held)[1]).data.eval_results
    assert result.dataset_split == '0.1 of train, held out'


def test_card_states_where_the_weights_are_from(run_cli, run, exported_run, folder, workdir, monkeypatch):
    monkeypatch.delattr(hashlib, 'file_digest', raising=False)  # Python 3.10 has none
    digest = hashlib.sha256((exported_run / 'model.safetensors').read_bytes()).hexdigest()[:12]
    known = f'(`test_resnet_cam`, sha256 `{digest}`)'
    argv = ['timm', 'train.py', *TINY, '--data-dir', folder]
    for name, own, start in (
        (
            'a',
            ['--model', f'local-dir:{exported_run}', '--pretrained'],
            f'from the model in the folder `exported` {known}',
        ),
        ('b', ['--pretrained-path', exported_run / 'model.safetensors'], f'in the file `model.safetensors` {known}'),
        (
            'c',
            ['--initial-checkpoint', run / 'last.pth.tar'],
            'in the file `last.pth.tar` (`test_resnet_cam`, sha256 `',
        ),
        ('d', ['--model', f'local-dir:{exported_run}'], 'from scratch |'),
    ):
        code, out, err = run_cli(*argv, *own, '--experiment', name)
        assert code == 0, err
        code, out, err = run_cli('ccl-timm', 'card', workdir / 'output' / 'train' / name)
        assert code == 0 and start in out and str(workdir) not in out and 'base_model' not in out, err
    Path('output/train/a/environment.json').unlink()  # as of a run of timm's own script
    assert 'from the model in the folder `exported` |' in run_cli('ccl-timm', 'card', 'output/train/a')[1]


@pytest.mark.parametrize('command', ['export', 'card', 'push'])
def test_models_that_are_not_finite_stay_here(command, run_cli, online, run, workdir):
    broken = shutil.copytree(run, workdir / 'broken')
    for path in broken.glob('*.pth.tar'):
        content = torch.load(path, weights_only=False)
        content['state_dict']['fc.out.bias'][1] = float('nan')
        torch.save(content, path)
    argv = {'export': ['exported'], 'card': [], 'push': ['--repo-id', REPO]}[command]
    code, out, err = run_cli('ccl-timm', command, broken, *argv)
    assert code == 2 and "weights that are not finite numbers, such as 'fc.out.bias'" in err
    assert online.requests == [] and not Path('exported').exists()


@pytest.mark.parametrize('status', [200, 409])
@pytest.mark.parametrize('body', [b'{}', b'[]', b'null', b'<html>', b''])
def test_answers_that_make_no_sense_are_one_sentence(status, body, run_cli, online, run):
    online.add(REPO)
    online.faults = [Fault('POST /api/repos/create', status, body)]
    code, out, err = run_cli('ccl-timm', 'push', run, '--repo-id', REPO)
    assert code == 2 and 'gave an answer that huggingface_hub cannot read' in err.strip().splitlines()[-1]


def test_export_prints_a_line_that_loads_it(run_cli, run, workdir):
    code, out, err = run_cli('ccl-timm', 'export', run, "it's")
    line = out.strip().splitlines()[-1].removeprefix('load it: ')
    done = subprocess.run([sys.executable, '-c', line], capture_output=True, text=True)
    assert code == 0 and done.returncode == 0, done.stderr


def test_card_without_a_baseline_states_it(run_cli, run):
    out = run_cli('ccl-timm', 'card', run)[1]
    assert '| cross-entropy, same recipe | not run |' in out and 'not stated |' in out


def test_card_says_what_a_note_says_and_that_a_backbone_was_frozen(run_cli, run, workdir):
    frozen = _with_settings(run, workdir / 'frozen', freeze_backbone=True)
    code, out, err = run_cli('ccl-timm', 'card', frozen, '--note', 'Photos of *one* garden.')
    assert code == 0 and '\nPhotos of \\*one\\* garden.\n' in out, err
    assert '| epochs | 1 of the classifier; the backbone was frozen, batches of ' in out


def test_card_states_what_was_trained_and_measured(run):
    loaded, result = publish.load_run(run)
    rows = [{'epoch': epoch, 'train_loss': 1.0} for epoch in range(4)]
    rows[0]['eval_top1'], rows[3]['eval_top1'] = 60.0, 50.0
    changed = {'epochs': 30, 'grad_accum_steps': 8, 'batch_size': 16, 'dataset': 'torch/mnist', 'val_split': 'train'}
    result = replace(result, rows=rows, settings={**result.settings, **changed})
    text = card.render(publish.model_config(loaded), result, REPO)
    assert '| epochs | 4 of 30, batches of 16 x 8 |' in text
    assert 'as the best of 2 epochs' in text and 'Measured on "train" of MNIST' in text


def test_card_states_whether_probabilities_are_calibrated(run, workdir):
    assert 'Probabilities are not calibrated.' in publish.write_card(run)
    own = _with_settings(run, workdir / 'own')
    fitted = ccl_timm.load(own).evaluate(fit_temperature=True).calibration
    text = publish.write_card(own)
    assert 'not calibrated' not in text and f'divided by {fitted["temperature"]:.4g}, the' in text
    assert f'temperature fitted on {fitted["images"]} images ("validation" of ' in text


def test_images_of_a_folder_are_called_by_its_name(run_cli, run, workdir):
    typed = _with_settings(run, workdir / 'typed', dataset='folder')
    assert run_cli('ccl-timm', 'card', typed)[1] == run_cli('ccl-timm', 'card', run)[1]


def test_card_loads_by_timm_what_timm_knows_by_name(run_cli, run, workdir):
    out = run_cli('ccl-timm', 'card', run)[1]
    assert re.search(
        r"^name = 'hf-hub:ccl-timm/test_resnet_cam.cc_images\d+'\nmodel = timm.create_model\(name", out, re.M
    )
    loaded, result = publish.load_run(run)
    config = {**publish.model_config(loaded), 'architecture': 'of_a_plugin'}
    assert f"name = 'hf-hub:{REPO}'\nmodel = ccl_timm.create_model(name" in card.render(config, result, REPO)


def test_card_states_what_the_papers_print_for_its_row(run_cli, run, workdir, monkeypatch):
    loaded, result = publish.load_run(run)
    result = replace(result, environment={'recipe': 'bees'})
    (workdir / 'recipes' / 'tables').mkdir(parents=True)
    (workdir / 'recipes' / 'bees.yaml').write_text((run / 'args.yaml').read_text())
    monkeypatch.setattr(recipes, 'recipe_folder', lambda: workdir / 'recipes')

    def printed(**changed):
        row = {'model': 'test_resnet_cam', 'loss': 'cc', 'set': {'epochs': 90}, 'paper': {'own': [98.7, 0.2]}}
        content = {'datasets': {'own': {'recipe': 'bees'}}, 'rows': {'a:cc': {**row, **changed}}}
        nine = {'title': 'CC-Loss, table 9', 'seeds': 1, **content}
        (workdir / 'recipes' / 'tables' / 'nine.yaml').write_text(yaml.safe_dump(nine))
        return card.render(publish.model_config(loaded), result, REPO)

    assert '| the paper: CC-Loss, table 9, `a:cc`, 90 epochs | 98.70 ± 0.20 |' in printed()
    for changed in ({'loss': 'ce'}, {'set': {'batch_size': 2}}):  # the value is of other settings
        assert '| the papers, for these settings | not stated |' in printed(**changed)


def test_baseline_of_another_recipe_is_refused(run_cli, run, baseline, folder, workdir):
    for source, message in ((run, 'name a run with --loss ce'), (workdir / 'none', 'not the folder of a run')):
        code, out, err = run_cli('ccl-timm', 'card', run, '--baseline', source)
        assert code == 2 and message in err
    longer = _with_settings(baseline, workdir / 'longer', epochs=9)
    code, out, err = run_cli('ccl-timm', 'card', run, '--baseline', longer)
    assert code == 2 and 'another recipe: epochs was 9, is 1' in err


def test_the_cards_code_runs(pushed, workdir):
    Image.new('RGB', (40, 40), 'red').save('image.png')
    text = pushed.files(REPO)['README.md'].decode()
    code = ''.join(re.findall(r'```python\n(.*?)```', text, re.S))
    assert code.count('urlopen(address)') == 1
    exec(compile(code.replace('urlopen(address)', "'image.png'"), 'README.md', 'exec'), found := {})
    assert found['outputs'].attention.shape == found['outputs'].features.shape == (1, 96)
    assert torch.allclose(found['outputs'].logits.softmax(1)[0], found['probabilities'])
    assert 'The loss `cc` reads `outputs.logits` and `outputs.attention`, not `pooled`.' in text


def test_card_is_written_with_what_it_is_written_from(run_cli, run, baseline, workdir):
    run = _with_settings(run, workdir / 'few', train_fraction=0.25)
    for epoch in (0, 7):
        row = {'split': f'after{epoch}', 'epoch': epoch, 'images': 9, 'top1': 62.5, 'top5': 100.0, 'loss': 1.0}
        RunDir(run).add_extra_split(row)
    own = _with_settings(baseline, workdir / 'own', train_fraction=0.25)
    code, out, err = run_cli('ccl-timm', 'card', run, '--repo-id', REPO, '--baseline', own, '--output', 'card')
    assert code == 0, err
    assert out == Path('card/README.md').read_text() == rendered(Path('card'), REPO)
    assert '25% of the training images' in out and '| this model on "after0", 9 images | 62.50 |' in out
    assert 'after7' not in out  # measured with the weights of another epoch
    code, out, err = run_cli('ccl-timm', 'card', run, '--output', 'card')
    assert code == 2 and "'card' exists already" in err


@pytest.mark.parametrize('folder', sorted(path.parent for path in (ROOT / 'hub_cards').glob('*/config.json')))
def test_our_cards_are_those_of_their_recorded_runs(folder):
    described = read_release(folder.name)
    text = rendered(folder, f'{checkpoints.ORGANISATION}/{folder.name}', described.license, described.note)
    assert text == (folder / 'README.md').read_text(encoding='utf-8')


def test_card_and_readme_cite_the_papers_alike():
    entries = re.findall(r'^@(?!software).*?^}$', (ROOT / 'README.md').read_text(encoding='utf-8'), re.M | re.S)
    template = (ROOT / 'hub_cards' / 'template.md').read_text(encoding='utf-8')
    assert len(entries) == 2 and all('author = ' in entry and entry in template for entry in entries)


def rendered(folder, repo_id, license='apache-2.0', note=''):
    """The card of what a folder has recorded."""
    run, baseline = [*read_record(folder / 'runs.jsonl'), None][:2]
    return card.render(json.loads((folder / 'config.json').read_text()), run, repo_id, baseline, license, note)
