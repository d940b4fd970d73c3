"""Every command and every piece of Python in the README runs."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from ccl_timm.data import datasets
from ccl_timm.heads import HEADS
from ccl_timm.losses import LOSSES

from .conftest import write_folder
from .standin_hub import StandInHub, take_for_the_hub

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / 'README.md').read_text()
BASH = [line for block in re.findall(r'```bash\n(.*?)```', TEXT, re.S) for line in block.splitlines() if line.strip()]
PYTHON = re.findall(r'```python\n(.*?)```', TEXT, re.S)
INSTALLS = [line for line in BASH if 'pip install' in line]
COMMANDS = [line for line in BASH if line not in INSTALLS]


@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
    """A folder with what the README speaks of; the commands run in it one after another."""
    root = tmp_path_factory.mktemp('readme')
    write_folder(root / 'my_images')
    shutil.copytree(root / 'my_images' / 'train', root / 'photos')
    (root / 'path' / 'to').mkdir(parents=True)
    shutil.copy(ROOT / 'tests' / 'upstream_train.py', root / 'path' / 'to' / 'train.py')
    return root


@pytest.fixture(scope='module')
def standin():
    with StandInHub() as hub:
        yield hub


@pytest.fixture
def online(standin, monkeypatch, tmp_path):
    """What one command sends to the Hub, another finds there."""
    yield from take_for_the_hub(standin, monkeypatch, tmp_path)


@pytest.fixture
def few_digits(monkeypatch):
    """An eighth of the digits: what is tested is that commands run."""

    class FewDigits(datasets.Digits):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.images, self.targets = self.images[::8], self.targets[::8]

    monkeypatch.setattr(datasets, 'Digits', FewDigits)


@pytest.mark.parametrize('line', COMMANDS)
def test_command(line, workshop, words, monkeypatch, online, few_digits):
    monkeypatch.chdir(workshop)
    program, *argv = shlex.split(line)
    if any(word.endswith('train.py') for word in argv):
        argv += ['--epochs', '1']
    code, out, err = words(program, *argv)
    assert code == 0, err


@pytest.mark.parametrize('code', PYTHON)
def test_python(code, workshop, monkeypatch, online):
    monkeypatch.chdir(workshop)
    names = {'__name__': 'readme'}
    exec(compile(code, 'README.md', 'exec'), names)
    for name in [name for name in names if name.startswith('test_')]:
        names[name]()


def test_every_loss_and_head_is_spoken_of():
    assert all(f'`{name}`' in TEXT for name in [*LOSSES, *HEADS])


def test_two_commands_install():
    assert len(INSTALLS) == 2
    assert INSTALLS[0].endswith('timm train.py --model resnet18_cam --loss cc')
    assert INSTALLS[1].endswith('pytest -n auto --dist loadscope')
    assert INSTALLS[1] in (ROOT / '.ci' / 'run').read_text()
