"""compare: what it trains, tunes, resumes, measures, prints and refuses."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from ccl_timm.errors import UnknownNameError, UserError
from ccl_timm.experiments import compare, tables, trial, tuning
from ccl_timm.experiments.compare import Comparison, entries_of, final_runs, read_records, run_comparison
from ccl_timm.experiments.compare_result import compare_runs, epochs_to, show_comparison
from ccl_timm.experiments.trial import run_trial
from ccl_timm.heads import head_class
from ccl_timm.losses import Range, list_losses, loss_class
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.folder_lock import FolderLock
from ccl_timm.training.frozen import Features, features_of
from ccl_timm.training.measures import retrieval
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.trainer import Trainer

from ..conftest import write_folder

PROBE = ('--config', 'probe', '--img-size', '16', '--crop-pct', '1.0', '--batch-size', '8', '--workers', '0')


@pytest.fixture
def settings(folder, workdir, monkeypatch):
    """Arguments of small runs on frozen features of a network without pretrained weights."""
    monkeypatch.setenv('CCL_TIMM_CACHE', str(workdir / 'cache'))
    weights = workdir / 'weights.safetensors'
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet').state_dict(), weights)
    return (*PROBE, '--epochs', '2', '--data-dir', str(folder), '--pretrained-path', str(weights))


@pytest.fixture
def trials(monkeypatch):
    """Runs are not trained: ``trials.score`` gives top-1 from their settings; ``trials.argv`` has their arguments."""

    class Trials:
        argv: list = []

        @staticmethod
        def score(argv):
            return 50.0

        def __call__(self, argv, complete=False, unseen=None):
            self.argv = [*self.argv, argv]
            return {'top1': self.score(argv), 'curve': [], 'seconds': 0.1, 'ms_per_step': 1.0}

    found = Trials()
    monkeypatch.setattr(compare, 'run_trial', found)
    return found


def value_of(argv, flag):
    return argv[len(argv) - 1 - argv[::-1].index(flag) + 1]


def comparison(settings, losses=('cc', 'arcface'), trials=3, seeds=2, output='compared', **more):
    return Comparison('test_resnet', entries_of([*losses]), settings, Path(output), trials, seeds, **more)


def test_cross_entropy_is_trained_on_every_head():
    names = [entry.name for entry in entries_of(['focal', 'arcface', 'pod', 'ce', 'bce'])]
    controls = ['linear:ce', 'cosine:ce', 'mlp:ce', 'pedcc:ce']
    assert names == [*controls, 'linear:focal', 'cosine:arcface', 'pedcc:pod', 'linear:bce']


def test_a_loss_is_put_on_the_head_that_is_named_before_it():
    entries = entries_of(['cam:focal', 'cosine:pml:SupConLoss', 'pml:SupConLoss'])[4:]
    assert [(entry.head, entry.loss) for entry in entries] == [
        ('cam', 'focal'), ('cosine', 'pml:SupConLoss'), ('linear', 'pml:SupConLoss'),
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match="There is no head 'cma'; did you mean 'cam'"):
        entries_of(['cma:focal'])
    with pytest.raises(UserError, match="'cam:' names no loss: give HEAD:LOSS, such as cam:ce"):
        entries_of(['cam:'])


def test_every_loss_is_tuned_with_equal_effort_on_a_share_held_out_of_training(settings, trials):
    """The best of its own trials is trained with new seeds on all training images, and measured once."""
    trials.score = lambda argv: 90.0 if float(value_of(argv, '--lr')) == 1e-3 else 80.0  # the recipe's rate is best
    made = comparison(settings)
    run_comparison(made, 1)
    records = read_records(made.file)
    assert records[0]['versions'] and records[0]['args'] == [*settings]
    for entry in made.entries:
        own = [line for line in records if line.get('entry') == entry.name]
        assert [line['trial'] for line in own if 'trial' in line] == [0, 1, 2]
        final = [line for line in own if 'seed' in line]
        assert [line['seed'] for line in final] == [1000, 1001]
        assert all(line['params'] == own[0]['params'] for line in final)
        options = {name: value for name, value in own[0]['params'].items() if name not in ('lr', 'weight_decay')}
        assert options.keys() == ({'smoothing'} if entry.loss == 'ce' else loss_class(entry.loss).search_space.keys())
    tuned = [argv for argv in trials.argv if '--val-fraction' in argv]
    final = [argv for argv in trials.argv if '--val-fraction' not in argv]
    assert len(tuned) == len(made.entries) * 3 and len(final) == len(made.entries) * 2
    assert {value_of(argv, '--val-fraction') for argv in tuned} == {'0.2'} and not any('--seed' in a for a in tuned)
    assert {value_of(argv, '--val-interval') for argv in final} == {'2'}  # validated after the last epoch alone


def test_finished_runs_are_not_repeated(settings, trials):
    whole, cut = comparison(settings, output='whole'), comparison(settings, output='cut')
    run_comparison(whole, 1)
    lines = whole.file.read_text().splitlines(keepends=True)
    for kept in (1, 2, 9, len(lines) - 1):
        cut.output.mkdir(exist_ok=True)
        cut.file.write_text(''.join(lines[:kept]) + lines[kept][:20])  # killed while it wrote a line
        trials.argv = []
        run_comparison(cut, 1)
        assert len(trials.argv) == len(lines) - kept
        runs = [{line['entry']: line for line in read_records(made.file) if 'seed' in line} for made in (whole, cut)]
        assert runs[0] == runs[1]
    trials.argv = []
    run_comparison(comparison(settings, output='whole', seeds=3), 1)
    assert len(trials.argv) == len(whole.entries)  # further seeds
    other = comparison((*settings, '--lr', '0.5'), output='whole')
    run_comparison(other, 1)
    assert value_of(trials.argv[-1], '--lr') != '0.001' and len(read_records(other.file, other.key)) == len(lines)


def test_one_process_at_a_time_writes_records(settings, trials):
    made = comparison(settings)
    made.output.mkdir()
    with FolderLock() as lock:
        assert lock.take(made.output)
        with pytest.raises(UserError, match="Another process is writing into 'compared'"):
            run_comparison(made, 1)
    assert not trials.argv and run_comparison(made, 1) is None
    other = comparison(settings, trials=2)
    run_comparison(other, 1)
    assert len(final_runs(read_records(other.file, other.key))) == len(other.entries)


def test_a_trial_that_fails_counts_as_the_worst(settings, trials, monkeypatch):
    """A rate that makes the weights NaN is a poor one; a loss that can never be trained ends the comparison."""
    made = comparison(settings, losses=['cc'])

    def first_fails(argv, *rest):
        found = trials(argv, *rest)
        return {'error': 'NaN'} if len(trials.argv) == 1 else found

    monkeypatch.setattr(compare, 'run_trial', first_fails)
    run_comparison(made, 1)
    first, *others = [line for line in read_records(made.file) if line.get('entry') == 'linear:ce']
    assert first['error'] == 'NaN' and first['params'] not in [line['params'] for line in others]
    monkeypatch.setattr(compare, 'run_trial', lambda *rest: {'error': 'NaN'})
    with pytest.raises(UserError, match="No trial of 'linear:ce' could be trained"):
        run_comparison(comparison(settings, output='other'), 1)


def test_a_final_run_that_failed_is_made_again(settings, trials, monkeypatch):
    made = comparison(settings, losses=['cc'], trials=0)
    monkeypatch.setattr(compare, 'run_trial', lambda argv, *rest: {'error': 'no memory'})
    with pytest.raises(UserError, match="'linear:ce' cannot be trained: no memory"):
        run_comparison(made, 1)
    monkeypatch.setattr(compare, 'run_trial', trials)
    run_comparison(made, 1)
    assert {name: [*own] for name, own in final_runs(read_records(made.file)).items()} == {
        entry.name: [1000, 1001] for entry in made.entries
    }


def test_another_seed_searches_other_values(settings, trials):
    found = [comparison((*settings, *more), losses=['cc'], trials=4, output=str(i)) for i, more in enumerate(
        ((), ('--seed', '42'), ('--seed', '43'))
    )]  # fmt: skip
    for made in found:
        run_comparison(made, 1)
    lines = [[line for line in read_records(made.file) if line.get('entry') == 'cam:cc'] for made in found]
    tried = [[line['params'] for line in own if 'trial' in line] for own in lines]
    assert tried[0] == tried[1] and tried[0][0] == tried[2][0]  # the first is the recipe's
    assert all(one != other for one, other in zip(tried[0][1:4], tried[2][1:4], strict=True))


def test_a_search_finds_better_values_than_its_start():
    """A peak away from the first values: 40 trials come near; the same questions get the same answers."""
    space = {'lr': Range(1e-4, 1.0, log=True), 'smoothing': Range(0.0, 0.3)}

    def search():
        tried = []
        for _ in range(40):
            params = tuning.suggest(space, {'lr': 1e-3, 'smoothing': 0.0}, tried, 42)
            tried.append((params, -((np.log10(params['lr']) + 1) ** 2) - 100 * (params['smoothing'] - 0.1) ** 2))
        return tried

    tried = search()
    assert tried[0][0] == {'lr': 1e-3, 'smoothing': 0.0}
    best = tuning.best_params(tried)
    assert 0.03 < best['lr'] < 0.3 and 0.05 < best['smoothing'] < 0.15
    assert search() == tried


def test_every_loss_declares_what_is_tuned():
    assert [name for name in list_losses() if not loss_class(name).search_space] == ['cosine']  # which has no options
    assert [*tuning.search_space('ce', 0.01)] == ['lr', 'weight_decay', 'smoothing']
    assert tuning.search_space('cc', 1.0)['lr'] == Range(1 / 30, 30.0, log=True)


def test_a_run_of_a_comparison_is_a_run_of_the_training_script(settings, run_cli, workdir):
    argv = [*settings, '--model', 'test_resnet_cam', '--loss', 'cc', '--seed', '3']
    found = run_trial(argv, complete=True)
    code, out, err = run_cli('timm', 'train.py', *argv, '--output', 'runs', '--experiment', 'one')
    assert code == 0, err
    with open('runs/one/summary.csv') as file:
        top1 = [float(row['eval_top1']) for row in csv.DictReader(file)]
    assert found['curve'] == pytest.approx(top1, abs=1e-4) and found['top1'] == found['curve'][-1]
    assert (
        found.keys() >= {'nll', 'ece', 'recall_at_1', 'map_at_r'} and [path.name for path in workdir.glob('no*')] == []
    )
    assert run_trial([*argv, '--lr', '1e30']).keys() == {'error'}


def test_retrieval_of_unseen_classes(settings, folder, workdir):
    """Linear head on a frozen backbone: the features are the backbone's, whatever was trained."""
    argv = [*settings, '--model', 'test_resnet_linear', '--loss', 'ce']
    found = run_trial(argv, True, str(folder / 'validation'))
    trainer = Trainer(TrainConfig.resolve(argv), RunDir('none'))
    features = features_of(trainer.config, trainer.task.get_eval_model(), trainer.device, trainer.setup.data_config,
                           trainer.splits.validation)  # fmt: skip
    expected = retrieval(features.views[0], features.labels)
    assert found['unseen_recall_at_1'] == pytest.approx(expected['recall_at_1'], abs=1e-3)
    assert found['unseen_map_at_r'] == pytest.approx(expected['map_at_r'], abs=1e-3)


def test_retrieval_where_no_class_has_two_images(settings, run_cli, workdir):
    write_folder(workdir / 'few', train=4, validation=1)
    argv = ['--backbone', 'test_resnet', '--seeds', '1', '--losses', 'cc', '--config', settings[1], '--', *settings[2:]]
    argv += ['--data-dir', 'few']
    code, out, err = run_cli('ccl-timm', 'compare', '--metric', 'recall_at_1', *argv)
    assert code == 2 and 'recall_at_1 cannot be measured: among the images of the validation split no class' in err
    code, out, err = run_cli('ccl-timm', 'compare', *argv)
    assert code == 0 and 'NLL' in out and 'R@1' not in out, err


def test_unseen_features_and_labels_are_on_one_device(folder, monkeypatch):
    views, device = torch.zeros(1, 2, 3, device='meta'), torch.device('meta')
    monkeypatch.setattr(trial, 'features_of', lambda *args: Features(views, torch.tensor([0, 1])))
    task = SimpleNamespace(get_eval_model=lambda: None)
    config = TrainConfig.resolve(['--freeze-backbone'])
    trainer = SimpleNamespace(config=config, task=task, device=device, setup=SimpleNamespace(data_config={}))
    ((features, labels),) = trial._unseen_loader(trainer, str(folder / 'validation'))
    assert features.device == labels.device == device


def test_a_comparison_is_of_one_data_set(settings, trials, folder, workdir):
    shutil.copytree(folder, workdir / 'images')
    own = (*settings, '--data-dir', 'images')
    run_comparison(comparison(own, trials=0, seeds=1), jobs=1)
    run_comparison(comparison(own, trials=0, seeds=2), jobs=1)
    (workdir / 'images' / 'train' / 'bee' / '0.png').unlink()
    with pytest.raises(UserError, match='no longer those of the runs'):
        run_comparison(comparison(own, trials=0, seeds=3), jobs=1)


def test_a_trial_without_a_hit_is_a_trial(settings, trials):
    trials.score = lambda argv: 0.0
    run_comparison(comparison(settings, ['cc'], trials=2, seeds=1), jobs=1)
    assert len(trials.argv) == 2 * len(entries_of(['cc'])) + len(entries_of(['cc']))


def test_compare_as_a_user_runs_it(settings, run_cli, workdir):
    argv = ['--losses', 'cc', '--backbone', 'test_resnet', '--seeds', '2', '--trials', '1', '--jobs', '1', '--config']
    argv += [*settings[1:2], '--', *settings[2:]]
    code, out, err = run_cli('ccl-timm', 'compare', *argv)
    assert code == 0, err
    assert out.startswith('test_resnet, tuning runs for each loss: 1') and '15/15  ' in err and 'Result: ' in out
    assert 'the runs are in output/compare/compare.jsonl; `ccl-timm compare --show' in err
    rows = {tuple(line.split()[:3]) for line in out.splitlines()}
    assert {('ce', '(control)', 'mlp'), ('ce', '(control)', 'cam'), ('ce', '(control)', 'cosine')} <= rows
    code, again, err = run_cli('ccl-timm', 'compare', *argv)
    assert code == 0 and again == out and '15 of them recorded already' in err
    code, shown, err = run_cli('ccl-timm', 'compare', '--show', 'output/compare', '--plot', 'forest.svg')
    assert (code, shown, err) == (0, out, 'written: forest.svg\n') and '<svg' in Path('forest.svg').read_text()
    records = workdir / 'output' / 'compare' / 'compare.jsonl'
    key = json.loads(records.read_text().splitlines()[0])['key']
    records.write_text(records.read_text() + records.read_text().replace(key, 'other'))
    code, both, err = run_cli('ccl-timm', 'compare', '--show', 'output/compare/compare.jsonl')
    assert code == 0 and both.startswith(out) and both.count('Result: ') == 2
    code, out, err = run_cli('ccl-timm', 'compare', '--dry-run', *argv)
    assert code == 0 and [line.split(':')[0] for line in out.splitlines()] == ['linear', 'cosine', 'mlp', 'cam', 'cam']


@pytest.mark.parametrize('name', tables.list_benchmarks())
def test_benchmarks_have_all_losses_and_controls(name, run_cli, folder, workdir):
    argv = ['--table', name, '--data-dir', folder, '--unseen', folder / 'validation', '--dry-run']
    code, out, err = run_cli('ccl-timm', 'compare', *argv)
    assert code == 0, err
    commands = dict(line.split(': timm train.py ') for line in out.splitlines())
    embedding = 'embedding' in name  # of head cosine, for its losses and others on it
    expected = {loss for loss in list_losses() if not embedding or loss_class(loss).head == 'cosine'} | {'ce'}
    if embedding:
        peers = ('ProxyAnchor', 'SupCon', 'MultiSimilarity', 'SubCenterArcFace')
        expected |= {'center', *(f'pml:{peer}Loss' for peer in peers)}
    assert {entry.split(':', 1)[1] for entry in commands} == expected - {'mc'}
    heads = {'linear', 'cosine', 'mlp'} | (set() if embedding else {'cam', 'pedcc'})
    assert {f'{head}:ce' for head in heads} <= commands.keys()
    assert all('--config probe' in command for command in commands.values())
    for entry, command in commands.items():
        own = TrainConfig.resolve(shlex.split(command)).model_kwargs
        wide = {'feature_dim': 512} if embedding and entry.startswith('cosine:') else {}
        assert own == {'pad_type': 'same', 'bn_eps': 0.001} | wide


def test_an_embedding_is_put_before_the_cosines_only(run_cli, folder, workdir):
    argv = ['--losses', 'arcface', 'cc', '--backbone', 'test_resnet', '--embedding', '64', '--data-dir', folder]
    code, out, err = run_cli('ccl-timm', 'compare', *argv, '--freeze-backbone', '--dry-run')
    assert code == 0, err
    wide = [line.split(':')[:2] for line in out.splitlines() if 'feature_dim=64' in line]
    assert [(head, loss.split()[0]) for head, loss in wide] == [('cosine', 'ce'), ('cosine', 'arcface')]


def records_of(values):
    """Records of final runs, from values by entry."""
    header = {'key': 'k', 'backbone': 'network', 'trials': 0, 'metric': 'top1'}
    return [header] + [
        {'key': 'k', 'entry': name, 'seed': 1000 + seed, 'top1': float(value), 'params': {}}
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]


def test_nothing_is_claimed_where_nothing_differs_and_intervals_cover_what_is_there():
    """Simulated truth: five losses that are equal by construction, one that is 1.5 points better; ten seeds.

    In 100 repetitions 95 are expected, in most of 10 seeds 93 or more.
    """
    random, silent, covered, found = np.random.default_rng(1), 0, 0, 0
    names = ['linear:ce', *(f'linear:loss{number}' for number in range(4))]
    for _ in range(100):
        seeds = random.normal(0, 0.5, 10)  # what seeds have in common: data order and first weights
        values = {name: 70 + seeds + random.normal(0, 0.5, 10) for name in names}
        lines = compare_runs(final_runs(records_of(values)), 'top1')
        silent += not [line for line in lines if line.plain and line.plain.verdict in ('better', 'worse')]
        better = values | {'linear:loss0': values['linear:loss0'] + 1.5}
        (line,) = [line for line in compare_runs(final_runs(records_of(better)), 'top1') if line.name == 'linear:loss0']
        low, high = line.plain.interval
        covered += low <= 1.5 <= high
        found += line.plain.verdict == 'better'
    assert silent >= 95 and covered >= 90 and found >= 90


def test_a_result_says_what_it_shows():
    random = np.random.default_rng(0)
    base = 70 + random.normal(0, 0.1, 10)
    near = {
        'linear:ce': base, 'cam:ce': base - 3 + random.normal(0, 0.1, 10), 'cam:cc': base + random.normal(0, 0.1, 10),
        'cosine:arcface': base + 2 + random.normal(0, 0.1, 10), 'linear:focal': base + np.linspace(-1, 1, 10),
        'cosine:cm': base,
    }  # fmt: skip
    text = show_comparison(records_of(near))
    lines = {tuple(line.split()[:2]): line for line in text.split('Further')[0].splitlines()}
    assert lines['cc', 'cam'].count('equal within 0.5') == 1 and lines['cc', 'cam'].count('better') == 1
    assert 'would have been' in lines['focal', 'linear'] and 'worse' in lines['ce', '(control)']
    assert (
        'Result: better than cross-entropy on a linear head: arcface on cosine; '
        'worse than cross-entropy on a linear head: ce on cam; as good: cc on cam; identical: cm on cosine; '
        'no difference shown: 1 other.'
    ) in text
    assert 'Settings of the final runs' not in text and 'another search' not in text  # nothing was tuned
    assert 'for the 5 tests of' in text.replace('\n', ' ')
    assert text.startswith('network, tuning runs')
    header, *runs = records_of(near)
    text = show_comparison([header | {'head_options': {'cosine': {'feature_dim': 8}}}, *runs])
    assert text.startswith('network, head cosine with feature_dim=8, tuning runs')
    assert 'another search' in show_comparison([header | {'trials': 3}, *runs])
    assert 'Differences are paired by seed,' in text
    fewer = show_comparison(records_of({**near, 'cam:cc': near['cam:cc'][:5]}))
    assert 'Differences are paired by seed where both have the same,' in fewer
    single = show_comparison(records_of({name: own[:1] for name, own in near.items()}))
    assert single.count('one seed, no test') == 6 and 'better than' not in single


def test_epochs_until_a_curve_is_near_its_end():
    assert epochs_to([10.0, 94.9, 95.0, 99.0, 100.0]) == 3 and epochs_to([5.0]) == 1
    records = records_of({'linear:ce': [70, 71]})
    shown = show_comparison(
        [*records, {'key': 'k', 'entry': 'linear:ce', 'trial': 0, 'params': {}, 'curve': [1, 40, 41]}]
    )
    assert 'epochs to 95%' in shown and 'epochs to 95%' not in show_comparison(records)
    (row,) = [line.split() for line in shown.split('Further')[1].splitlines() if line.startswith('ce')][:1]
    assert row[-1] == '2'


def test_final_runs_leave_failures_out():
    records = [
        {'entry': 'a', 'seed': 1},
        {'entry': 'a', 'seed': 2, 'error': 'x'},
        {'entry': 'a', 'trial': 0},
        {'key': 'k'},
    ]
    assert final_runs(records) == {'a': {1: records[0]}}


def accuracy_with_cross_entropy(head, num_classes, dim=64, images=10):
    """Top-1 in % on new samples of Gaussian classes, after 8 epochs of a small network with this head."""
    torch.manual_seed(0)
    means, target = torch.randn(num_classes, dim), torch.arange(num_classes).repeat_interleave(images)
    samples, unseen = (means[target] + torch.randn(len(target), dim) for _ in range(2))
    body = nn.Sequential(nn.Linear(dim, 256), nn.BatchNorm1d(256), nn.ReLU())
    network = nn.Sequential(body, head_class(head)(256, num_classes))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(8):
        for batch in torch.randperm(len(target)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(samples[batch]), target[batch]).backward()
            optimizer.step()
    return (network.eval()(unseen).argmax(1) == target).float().mean().item() * 100


def test_cross_entropy_trains_as_well_on_the_pedcc_head_as_on_the_linear_one():
    """The control of `compare`: with bare cosines as logits it ends at 2.5 % here, the linear head at 93 %."""
    assert accuracy_with_cross_entropy('pedcc', 196) > accuracy_with_cross_entropy('linear', 196) - 2


def test_pedcc_head_chooses_the_nearest_centroid_and_is_sure_of_a_sample_on_it():
    head = head_class('pedcc')(196, 196, feature_dim=196)
    nn.init.eye_(head.linear.weight)
    nn.init.zeros_(head.linear.bias)
    assert nn.functional.cross_entropy(head(head.weight), torch.arange(196)) < 1e-3  # 4.28 for bare cosines
    outputs = head.outputs(torch.randn(64, 196))
    assert torch.equal(outputs.logits.argmax(1), outputs.cosine.argmax(1))
    assert head_class('pedcc')(8, 4, scale=2.0)(torch.randn(64, 8)).abs().max() <= 2.001


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--losses', 'cc', 'acrface'], "Unknown loss 'acrface'; did you mean 'arcface'?"),
        (['--seeds', '0'], '--seeds: 0 must be at least 1'),
        (['--data-dir', 'nowhere'], "There is no data folder 'nowhere'"),
        ([], 'There is no data folder: give one with --data-dir.'),
        (['--backbone', 'resnett18', '--dry-run'], "Unknown model 'resnett18_linear'"),
        (['--table', 'benchmark-cars'], "Unknown benchmark 'benchmark-cars'; did you mean 'benchmark-cars196'?"),
        (['--metric', 'unseen_recall_at_1', '--dry-run'], 'classes that are not trained: give --unseen DIR.'),
        (['--unseen', 'nowhere', '--dry-run'], "There is no folder 'nowhere': --unseen names one that has a folder"),
        (
            ['--show', 'runs.jsonl'],
            'These are no records of a comparison; for recorded runs there is `ccl-timm report`.',
        ),
        (['--losses', 'mc', '--freeze-backbone', '--dry-run'], "--freeze-backbone does not work with 'resnet18_mc'"),
        (['--show', 'nowhere'], "'nowhere' has no runs of a comparison."),
        (['--trials', '1', '--dry-run', '--', '--val-fraction', '0.2'], 'Tuning would see the images'),
        (['--plot', 'x.gif'], 'must end in .png or .svg'),
    ],
)
def test_compare_refuses(argv, message, run_cli, workdir):
    Path('runs.jsonl').write_text('{"format": "ccl-timm runs"}\n')
    code, out, err = run_cli('ccl-timm', 'compare', *argv)
    assert code == 2 and message in err


def test_a_damaged_file_of_records_is_named(settings):
    made = comparison(settings)
    made.output.mkdir()
    made.file.write_text('{"key": 1}\nnonsense\n')
    with pytest.raises(UserError, match="'compared/compare.jsonl' is a damaged file of records"):
        run_comparison(made, 1)


@pytest.mark.slow
def test_real_kill_of_the_whole_group(workdir):
    """The processes themselves: killed in the middle of a run, started again, and the same runs as without."""
    command = [sys.executable, '-m', 'ccl_timm', 'compare', '--config', 'digits', '--losses', 'cc', '--backbone',
               'test_resnet', '--seeds', '2', '--trials', '2', '--epochs', '2', '--jobs', '2', '--output']  # fmt: skip
    after = ['--', '--input-size', '1', '16', '16', '--batch-size', '32']
    subprocess.run([*command, 'whole', *after], capture_output=True, text=True, check=True)
    process = subprocess.Popen([*command, 'cut', *after], start_new_session=True, stderr=subprocess.DEVNULL)
    records = workdir / 'cut' / 'compare.jsonl'
    while not records.exists() or len(records.read_text().splitlines()) < 8:
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = subprocess.run([*command, 'cut', *after], capture_output=True, text=True, check=True)
    assert ' of them recorded already' in again.stderr and ', 0 of them' not in again.stderr
    made = []
    for name in ('whole', 'cut'):
        lines = [json.loads(line) for line in (workdir / name / 'compare.jsonl').read_text().splitlines()[1:]]
        made.append(
            {(line['entry'], line.get('trial'), line.get('seed')): (line['params'], line['top1']) for line in lines}
        )
    assert made[0] == made[1] and len(made[0]) == 5 * 4
