"""Every command and every piece of Python in the README runs, in the README's order."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from ccl_timm.data import datasets
from ccl_timm.heads import HEADS
from ccl_timm.losses import LOSSES

from .conftest import write_folder
from .fake_hub import FakeHub, take_for_the_hub

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(bash|python)\n(.*?)```', TEXT, re.S)
LINES = [line for kind, block in BLOCKS if kind == 'bash' for line in block.splitlines() if line.strip()]
INSTALLS = [line for line in LINES if 'pip install' in line]


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A folder with what the README speaks of, as the working directory."""
    write_folder(tmp_path / 'my_images')
    shutil.copytree(tmp_path / 'my_images' / 'train', tmp_path / 'photos')
    (tmp_path / 'path' / 'to').mkdir(parents=True)
    shutil.copy(ROOT / 'tests' / 'upstream_train.py', tmp_path / 'path' / 'to' / 'train.py')
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def online(monkeypatch, tmp_path_factory):
    """What one command sends to the Hub, another finds there."""
    with FakeHub() as hub:
        yield from take_for_the_hub(hub, monkeypatch, tmp_path_factory.mktemp('hub'))


@pytest.fixture
def few_digits(monkeypatch):
    """An eighth of the digits: what is tested is that commands run."""

    class FewDigits(datasets.Digits):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.images, self.targets = self.images[::8], self.targets[::8]

    monkeypatch.setattr(datasets, 'Digits', FewDigits)


@pytest.mark.usefixtures('workshop', 'online', 'few_digits', 'started')
def test_readme_runs_from_top_to_bottom(words, subtests):
    """One test, since a command uses what earlier ones made."""
    for kind, block in BLOCKS:
        for item in [block] if kind == 'python' else filter(str.strip, block.splitlines()):
            if item not in INSTALLS:
                with subtests.test(item):
                    run_python(item) if kind == 'python' else run_command(item, words)


def run_command(line, words):
    program, *argv = shlex.split(line)
    if any(word.endswith('train.py') for word in argv):  # the smallest ResNet and one epoch: users need not read that
        argv = [word.replace('resnet18_', 'test_resnet_') for word in argv] + ['--epochs', '1']
    code, out, err = words(program, *argv)
    assert code == 0, err


def run_python(code):
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
