"""The benchmark measures what it says; no test looks at a clock."""

import json
from pathlib import Path

import pytest
import torch

from ccl_timm.experiments.bench import paper_form, ratios
from ccl_timm.losses import channel_correlation
from ccl_timm.training.step_timing import list_dtypes


def test_the_papers_form_is_what_ours_computes():
    attention = torch.rand(12, 5, dtype=torch.float64, requires_grad=True)
    target = torch.arange(12) % 4
    values = [form(attention, target, 4) for form in (paper_form, channel_correlation)]
    assert torch.allclose(*values, rtol=1e-9)
    assert torch.allclose(*(torch.autograd.grad(value, attention)[0] for value in values), rtol=1e-6, atol=1e-12)


def test_actions_take_turns():
    calls = []
    found = ratios({name: lambda name=name: calls.append(name) for name in 'ab'}, 3, torch.device('cpu'))
    assert ''.join(calls) == 'ab' * 4 and found['a'][1] == 1.0 and set(found) == {'a', 'b'}


LAYOUTS = 2 * len(list_dtypes(torch.device('cpu')))
CASES = {
    'cc': (['--samples', '64', '--width', '8', '--classes', '4'], 2),
    'steps': (['--losses', 'cc', 'pod', '--backbone', 'test_resnet', '-b', '4', '--classes', '4'], 3),
    'loaders': (['--images', '64', '-b', '16', '-j', '0'], 2),
    'layouts': (['--backbone', 'test_resnet_cam', '-b', '2', '--classes', '4'], LAYOUTS),
    'import': ([], 3),
    'predict': (['--backbone', 'test_resnet_cam', '--images', '4', '-b', '2', '-j', '1', '--img-size', '64'], 2),
    'photos': (['--images', '6', '-b', '3', '-j', '1', '--img-size', '64'], 3),
}


@pytest.mark.parametrize(
    'what', [*[name for name in CASES if name != 'import'], pytest.param('import', marks=pytest.mark.slow)]
)
def test_command_prints_ratios(what, run_cli):
    argv, lines = CASES[what]
    code, out, err = run_cli('ccl-timm', 'bench', what, *argv, '--rounds', '1', '--json', '--device', 'cpu')
    assert code == 0, err
    rows = json.loads(out)
    assert len(rows) == lines and rows[0]['ratio'] == 1.0 and all(row['seconds'] > 0 for row in rows)
    if what == 'cc':
        assert rows[1]['kept_mib'] == pytest.approx(2 * rows[1]['kept_at_half_mib'], rel=0.3)
        assert rows[0]['kept_mib'] == pytest.approx(4 * rows[0]['kept_at_half_mib'], rel=0.3)


def test_the_fastest_step_is_compiled_too(run_cli):
    argv = [*CASES['layouts'][0], '--torchcompile', 'eager', '--rounds', '1', '--json', '--device', 'cpu']
    code, out, err = run_cli('ccl-timm', 'bench', 'layouts', *argv)
    assert code == 0, err
    *rows, compiled = json.loads(out)
    assert len(rows) == LAYOUTS and compiled['name'] == f'{min(rows, key=lambda row: row["seconds"])["name"]}, compiled'


def test_an_unknown_backend_is_one_sentence(run_cli):
    argv = [*CASES['layouts'][0], '--torchcompile', 'inductr', '--device', 'cpu']
    code, out, err = run_cli('ccl-timm', 'bench', 'layouts', *argv)
    assert code == 2 and "--torchcompile 'inductr' does not work" in err


# in the place of timm's train.py: takes the same arguments, writes the same file
_SCRIPT = """
import argparse, pathlib
parser = argparse.ArgumentParser()
for name in ('--output', '--experiment', '--model', '--epochs'):
    parser.add_argument(name)
args, _ = parser.parse_known_args()
folder = pathlib.Path(args.output, args.experiment)
folder.mkdir()
(folder / 'summary.csv').write_text('epoch,eval_top1\\n0,50.0\\n1,75.0\\n')
"""


@pytest.mark.slow
def test_whole_runs_have_the_same_arguments(run_cli, workdir):
    Path('other.py').write_text(_SCRIPT)
    shared = ['--model', 'test_resnet', '--loss', 'ce', '--epochs', '1', '-j', '0', '--img-size', '16']
    command = ['ccl-timm', 'bench', 'train', '--script', 'other.py', '--rounds', '1', '--json', '--', *shared]
    code, out, err = run_cli(*command)
    assert code == 0, err
    theirs, ours = json.loads(out)
    assert theirs['top1'] == 75.0 and 0 < ours['top1'] < 75.0 and ours['ratio'] > theirs['ratio'] == 1.0


def test_arguments_of_a_script_are_for_train_only(run_cli):
    code, out, err = run_cli('ccl-timm', 'bench', 'cc', '--', '--model', 'resnet18')
    assert code == 2 and 'leave out --model resnet18 after --' in err


def test_a_script_that_fails_is_one_sentence(run_cli, workdir):
    Path('other.py').write_text('raise ValueError("no such model")')
    code, out, err = run_cli(
        'ccl-timm', 'bench', 'train', '--script', 'other.py', '--device', 'cpu', '--', '--epochs', '1'
    )
    assert code == 2 and err.splitlines()[-1] == "error: timm's train.py failed: ValueError: no such model"


def test_whole_runs_need_a_script(run_cli, workdir):
    code, out, err = run_cli('ccl-timm', 'bench', 'train', '--script', 'none.py')
    assert code == 2 and 'give its path with --script' in err
