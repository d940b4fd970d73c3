"""Command lines that no other test runs."""

import platform
import subprocess
import sys

import pytest

from ccl_timm import losses
from ccl_timm.cli.dispatch import COMMANDS
from ccl_timm.training import recipes


def test_help_lists_every_command(run_cli):
    code, out, err = run_cli('ccl-timm')
    assert code == 0
    assert all(f'  {name} ' in out for name in COMMANDS)
    assert run_cli('timm')[1].startswith('usage: timm SCRIPT')


@pytest.mark.parametrize('command', sorted(COMMANDS))
def test_every_command_has_help(command, run_cli):
    code, out, err = run_cli('ccl-timm', command, '--help')
    assert code == 0 and out.startswith(f'usage: ccl-timm {command}')


@pytest.mark.parametrize(
    'program, argv, message',
    [
        ('ccl-timm', ['trian'], "Unknown command 'trian'; did you mean 'train'?"),
        ('timm', ['trane.py'], "There is no file 'trane.py'"),
        ('timm', ['train'], "Unknown script 'train'; did you mean 'train.py'?"),
        ('ccl-timm', ['losses', 'ccc'], "Unknown loss 'ccc'; did you mean 'cc'?"),
        ('ccl-timm', ['recipes', 'digit'], "No recipe 'digit'"),
        ('ccl-timm', ['data', 'digit', 'x'], "; did you mean 'digits'?"),
    ],
)
def test_wrong_arguments_get_a_suggestion(program, argv, message, run_cli):
    code, out, err = run_cli(program, *argv)
    assert code == 2 and message in err


def test_losses_are_listed_and_described(run_cli):
    code, out, err = run_cli('ccl-timm', 'losses')
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == losses.list_losses()
    for name in losses.list_losses():
        code, out, err = run_cli('ccl-timm', 'losses', name)
        assert code == 0 and out.startswith(f'{name}(') and 'Terms: ' in out and '\npaper: ' in out


def test_models_are_listed_with_their_losses(run_cli):
    code, out, err = run_cli('ccl-timm', 'models', 'resnet18_*')
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith('resnet18')}
    assert code == 0 and set(rows) == {f'resnet18_{head}' for head in ('cam', 'cosine', 'linear', 'mlp', 'pedcc', 'mc')}
    assert rows['resnet18_pedcc'].endswith('nac, pedcc, pod') and '12.0 M' in rows['resnet18_cam']
    assert run_cli('ccl-timm', 'models', 'nothing*')[0] == 2


def test_recipes_are_listed_and_printed(run_cli):
    lines = run_cli('ccl-timm', 'recipes')[1].splitlines()[1:]
    assert [line.split()[0] for line in lines] == recipes.list_recipes()
    assert any(line.startswith('cc_mnist ') and 'torch/mnist' in line and 'cc-table1 (16)' in line for line in lines)
    assert 'dataset: digits' in run_cli('ccl-timm', 'recipes', 'digits')[1]


def test_data_digits_writes_a_folder(run_cli, workdir):
    code, out, err = run_cli('ccl-timm', 'data', 'digits', 'here')
    assert code == 0 and '1797 images in here' in out
    assert len(list((workdir / 'here').rglob('*.png'))) == 1797
    assert run_cli('ccl-timm', 'data', 'digits', 'here')[0] == 2


def test_version(run_cli):
    import ccl_timm

    assert run_cli('ccl-timm', '--version')[1].strip() == ccl_timm.__version__


def test_reader_that_goes_away_is_no_error(workdir):
    import subprocess
    import sys

    command = f'{sys.executable} -c "from ccl_timm.cli import main; main()" losses | true'
    result = subprocess.run(['bash', '-c', f'set -o pipefail; {command}'], capture_output=True, text=True)
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize(
    'argv',
    [['ccl-timm', '--help'], ['ccl-timm', '--version'], ['ccl-timm', 'lossess'], ['timm', '--help'], ['timm', 'x.py']],
)
def test_lists_and_unknown_commands_do_not_wait_for_torch(argv):
    call = f'import sys; sys.argv = {argv}\nfrom ccl_timm import cli\n'
    call += f'cli.{"main" if argv[0] == "ccl-timm" else "timm"}(); print("torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', call], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == 'False' and len(done.stdout + done.stderr) > len('False\n')


def test_a_commands_process_has_the_public_names():
    call = 'import sys; sys.argv = ["ccl-timm"]; import ccl_timm; print(ccl_timm.Loss.__name__, ccl_timm.create_model)'
    done = subprocess.run([sys.executable, '-c', call], capture_output=True, text=True, check=True)
    assert done.stdout.startswith('Loss <function create_model')


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries have no such setting')
def test_commands_keep_the_memory_of_freed_tensors():
    program = """
import resource, sys
from ccl_timm.cli.dispatch import main
main(['losses'])
import torch
faults = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert int(done.stderr.split()[-1]) < 5 * 16384  # pages of 4 KiB; without it ten times 16,384
