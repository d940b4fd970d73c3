"""Layout and precision of a long run are the fastest of those timed. Clocks are replaced: no test looks at one."""

import copy
import json

import pytest
import torch

import ccl_timm
from ccl_timm.training import step_timing
from ccl_timm.training.prediction import predict
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.step_timing import LAYOUTS, Choice, fastest_choice, likely_layout, time_choices

from ..conftest import TINY

SIZE = (3, 16, 16)


@pytest.fixture
def task():
    return ccl_timm.create_task(ccl_timm.create_model('test_resnet_cam', num_classes=3), 'cc')


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Seconds of a step on one image, by choice; with the calls so far."""
    monkeypatch.setenv('CCL_TIMM_CACHE', str(tmp_path))
    seconds = {Choice(layout, dtype): 1.0 for layout in LAYOUTS for dtype in ('float32', 'bfloat16', 'float16')}
    calls = []

    def step(task, choice, count, size, soft_targets):
        calls.append((choice, count))
        return seconds[choice] * count

    monkeypatch.setattr(step_timing, 'time_step', step)
    monkeypatch.setattr(step_timing, 'time_choices', time_choices)  # which other tests do without
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512')
    return seconds, calls


def fastest_of(task, dtype='float32', batch_size=32, images=10**6, **allowed):
    facts = {'batch_size': batch_size, 'soft_targets': False}
    return fastest_choice(task, facts, SIZE, images, Choice('channels_last', dtype), **allowed)


def fastest(task, *args, **options):
    return fastest_of(task, *args, **options).layout


def test_steps_are_timed_as_they_are_trained(task):
    state, random = copy.deepcopy(task.state_dict()), torch.get_rng_state()
    found = time_choices(task, SIZE, 4)
    assert list(found) == [Choice(layout, dtype) for dtype in ('float32', 'bfloat16') for layout in LAYOUTS]
    assert all(seconds > 0 for seconds in found.values())
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_fastest_is_chosen_and_kept(task, clock, capsys):
    seconds, calls = clock
    seconds[Choice('contiguous', 'float32')] = 0.5
    assert fastest(task) == 'contiguous'
    assert 'steps are 2.00 times as fast with --memory-format contiguous' in capsys.readouterr().err
    made = len(calls)
    assert fastest(task) == 'contiguous' and len(calls) == made
    assert fastest(task, batch_size=16) == 'contiguous' and len(calls) > made


def test_small_gains_change_nothing(task, clock, capsys):
    seconds, _ = clock
    seconds[Choice('contiguous', 'float32')] = 0.97
    assert fastest(task) == 'channels_last' and not capsys.readouterr().err


def test_another_precision_is_recommended_not_taken(task, clock, capsys):
    seconds, _ = clock
    seconds[Choice('channels_last', 'bfloat16')] = 0.4
    assert fastest(task) == 'channels_last'
    assert 'steps would be 2.50 times as fast in bfloat16: --amp auto' in capsys.readouterr().err
    seconds[Choice('contiguous', 'float16')] = 5.0
    assert fastest(task, dtype='float16') == 'channels_last'
    assert 'fast in bfloat16: --amp auto' in capsys.readouterr().err
    seconds[Choice('channels_last', 'bfloat16')] = 4.0
    assert fastest(task, dtype='bfloat16') == 'contiguous'
    assert '4.00 times as fast with --memory-format contiguous' in capsys.readouterr().err


def test_a_precision_that_is_left_open_is_taken(task, clock, capsys):
    seconds, _ = clock
    seconds[Choice('contiguous', 'bfloat16')] = 0.4
    assert fastest_of(task, dtypes=['float32', 'bfloat16']) == Choice('contiguous', 'bfloat16')
    said = 'steps are 2.50 times as fast with --memory-format contiguous and bfloat16, which is chosen'
    assert said in capsys.readouterr().err
    only = fastest_of(task, layouts=['channels_last'], dtypes=['float32', 'bfloat16'])
    assert only == Choice('channels_last', 'float32')
    said = 'timed in float32 and bfloat16: none is clearly faster than float32'
    assert said in capsys.readouterr().err
    assert fastest_of(task, batch_size=8, images=1, dtypes=['float32', 'bfloat16']).dtype == 'bfloat16'  # a short run


def test_without_mixed_precision_it_may_be_faster(task, clock, capsys):
    seconds, _ = clock
    for layout in LAYOUTS:
        seconds[Choice(layout, 'float32')] = 0.5
    fastest(task, dtype='bfloat16')
    assert 'steps would be 2.00 times as fast without --amp' in capsys.readouterr().err


def test_hopeless_choices_are_timed_on_few_images(task, clock):
    seconds, calls = clock
    for choice in seconds:
        seconds[choice] = 1e-4 if choice.dtype == 'float32' else 1.0
    fastest(task, images=10**8)
    assert max(count for choice, count in calls if choice.dtype == 'bfloat16') == 8
    assert max(count for choice, count in calls if choice.dtype == 'float32') == 32


def test_slow_networks_take_few_steps(task, clock):
    seconds, calls = clock
    fastest(task)
    assert [count for _, count in calls] == [8] * 20  # two of each choice, then three rounds
    calls.clear()
    seconds |= dict.fromkeys(seconds, 1 / 64)
    fastest(task, batch_size=64)
    assert [count for _, count in calls] == [8] * 8 + [16] * 16  # as many images are new: one round more


def test_precisions_that_a_processor_emulates_are_not_timed(task, clock, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX2')
    assert fastest(task) == 'channels_last' and {choice.dtype for choice, _ in clock[1]} == {'float32'}
    assert fastest_of(task, dtypes=step_timing.list_dtypes(torch.device('cpu'))).dtype == 'float32'
    assert 'float32 is taken: this processor is slower in other precisions' in capsys.readouterr().err
    assert step_timing.list_dtypes(torch.device('cuda')) == ['float32', 'bfloat16', 'float16']


def test_steps_that_do_not_work_are_not_chosen(task, clock, capsys, monkeypatch):
    seconds, _ = clock
    seconds[Choice('channels_last', 'float32')] = 2.0
    working = step_timing.time_step

    def step(task, choice, *args, **options):
        if choice.layout == 'contiguous':
            raise torch.OutOfMemoryError('out of memory')
        return working(task, choice, *args, **options)

    monkeypatch.setattr(step_timing, 'time_step', step)
    assert fastest(task, batch_size=8) == 'channels_last'
    assert 'steps would be 2.00 times as fast in bfloat16: --amp auto' in capsys.readouterr().err
    for choice in seconds:
        seconds[choice] = float('inf')
    assert fastest(task, 'bfloat16', batch_size=16) == 'channels_last' and not capsys.readouterr().err


def test_short_runs_are_not_timed(task, clock, capsys):
    seconds, calls = clock
    assert fastest(task, images=100) == 'channels_last'
    assert len(calls) == 2 and not capsys.readouterr().err


def test_a_damaged_file_is_measured_again(task, clock, tmp_path):
    fastest(task)
    (path,) = (tmp_path / 'steps').glob('*.json')
    path.write_text('{"contiguous": 1}')
    assert fastest(task) == 'channels_last' and len(json.loads(path.read_text())) == 4


@pytest.mark.parametrize(
    'argv, timed',
    [
        ([], True),
        (['--memory-format', 'contiguous'], False),
        (['--deterministic'], False),
        (['--freeze-backbone'], False),
    ],
)
def test_runs_time_what_is_free_to_choose(argv, timed, clock, folder, run_cli, workdir):
    seconds, calls = clock
    for choice in seconds:
        seconds[choice] = 50.0 if choice.layout == 'contiguous' else 100.0
    shared = ['--model', 'test_resnet_cam', '--loss', 'cc', '--img-size', '32', '-b', '8', '-j', '0', '--epochs', '1']
    code, out, err = run_cli('timm', 'train.py', '--data-dir', folder, *shared, '--device', 'cpu', *argv)
    assert code == 0, err
    assert bool(calls) == ('which is chosen' in err) == timed
    assert ('channels last' in err) == (argv == ['--deterministic'])


def test_a_run_takes_the_fastest_precision_and_records_it(clock, folder, run_cli, workdir):
    seconds, _ = clock
    for choice in seconds:
        seconds[choice] = {'channels_last': 1.0, 'contiguous': 1.1}[choice.layout] * (1 + (choice.dtype == 'float32'))
    argv = ['--amp', 'auto', '--experiment', 'run']
    code, out, err = run_cli('timm', 'train.py', '--data-dir', folder, *TINY, *argv)
    assert code == 0, err
    assert 'steps are 2.00 times as fast with bfloat16' in err and 'mixed bfloat16' in err
    assert RunDir('output/train/run').environment()['precision'] == 'bfloat16'
    for flag in ('--freeze-backbone', '--deterministic'):
        code, out, err = run_cli('timm', 'train.py', '--data-dir', folder, *TINY, *argv[:2], flag)
        assert code == 2 and '--amp auto times steps of one process that trains on images' in err


@pytest.mark.parametrize('use', [
    lambda run, image: run.evaluate(),
    lambda run, image: run.evaluate(recall=True),
    lambda run, image: run.predict(image),
    lambda run, image: predict(run.trained, [image]),
])  # fmt: skip
def test_trained_models_compute_in_the_layout_that_is_usually_faster(use, trained, folder):
    run, seen = ccl_timm.load(trained, device='cpu'), []
    run.model.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    use(run, next(folder.rglob('*.png')))
    assert seen and all(images.is_contiguous(memory_format=torch.channels_last) for images in seen)
    weight = run.model.conv1.weight
    assert weight.is_contiguous(), 'others save the model, which takes contiguous weights'


def test_a_network_without_convolutions_keeps_its_layout():
    model, cpu = ccl_timm.create_model('test_vit_cam', num_classes=3), torch.device('cpu')
    assert likely_layout(model, cpu) == torch.contiguous_format
    assert likely_layout(ccl_timm.create_model('test_resnet_cam', num_classes=3), cpu) == torch.channels_last
