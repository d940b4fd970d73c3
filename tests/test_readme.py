"""Every command and every piece of Python in the README files runs, in their order.

Users read the commands as they would type them. Here they get small models, small batches and one epoch.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from ccl_timm.data import datasets
from ccl_timm.experiments import bench
from ccl_timm.heads import list_heads
from ccl_timm.losses import list_losses

from .conftest import write_folder
from .fake_hub import FakeHub, take_for_the_hub

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    'README.md',
    'ccl_timm/losses/README.md',
    'ccl_timm/models/README.md',
    'ccl_timm/training/README.md',
    'recipes/README.md',
    'hub_cards/README.md',
]
TEXTS = {page: (ROOT / page).read_text(encoding='utf-8') for page in PAGES}
PICTURE = (ROOT / 'hub_cards' / 'results' / 'benchmark-cars196.svg').read_text(encoding='utf-8')
INSTALLS = re.findall(r'^.*pip install \S.*&& .*$', TEXTS['README.md'], re.M)
PICTURES = ('hub_cards/results/digits_attention.png', 'hub_cards/results/benchmark-cars196.svg')


@pytest.fixture
def workdir(page, tmp_path, monkeypatch):
    """A folder with what a page names, as the working directory."""
    write_folder(tmp_path / 'my_images')
    shutil.copytree(tmp_path / 'my_images' / 'train', tmp_path / 'photos')
    if page == 'README.md':  # it makes this folder
        shutil.rmtree(tmp_path / 'my_images')
    (tmp_path / 'path' / 'to').mkdir(parents=True)
    (tmp_path / 'hub_cards').symlink_to(ROOT / 'hub_cards')
    shutil.copy(ROOT / 'tests' / 'upstream_train.py', tmp_path / 'path' / 'to' / 'train.py')
    save_file(timm.create_model('test_resnet').state_dict(), tmp_path / 'imagenet.safetensors')
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
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


@pytest.fixture
def no_repetition(monkeypatch):
    """A benchmark does once what it times; how often is tested with it."""

    def once(actions, rounds, device, untimed=1):
        for name, action in actions.items():
            if name not in ('import timm', 'import ccl_timm', 'ccl-timm --help'):  # processes, which take long to start
                action()
        return dict.fromkeys(actions, (1.0, 1.0))

    monkeypatch.setattr(bench, 'ratios', once)


@pytest.mark.usefixtures('workdir', 'hub', 'few_digits', 'no_repetition')
@pytest.mark.parametrize('page', PAGES)
def test_documented_commands_and_code_run(page, run_cli, subtests):
    """One test a page, since a command uses what earlier ones made."""
    for kind, block in re.findall(r'```(bash|python)\n(.*?)```', TEXTS[page], re.S):
        for item in [block] if kind == 'python' else filter(str.strip, block.splitlines()):
            if item not in INSTALLS:
                with subtests.test(item):
                    run_python(item, page) if kind == 'python' else run_command(item, run_cli)


def run_python(code, page):
    names = {'__name__': 'readme'}
    exec(compile(code, page, 'exec'), names)
    for name in [name for name in names if name.startswith('test_')]:
        names[name]()


def run_command(line, run_cli):
    code, _, err = run_cli(*cheaper(one_process(shlex.split(line))))
    assert code == 0, err


def one_process(argv):
    """The same command on one process: what several do is tested elsewhere."""
    if argv[:2] == ['timm', '--nproc']:
        return ['timm', *argv[3:]]
    if argv[0] == 'torchrun':
        return ['ccl-timm', *argv[argv.index('ccl_timm') + 1 :]]
    return argv


def cheaper(argv):
    """The same command for a small model, with small batches, few epochs and no further processes."""
    command = argv[1]
    if command == 'train' or any(Path(arg).name == 'train.py' for arg in argv):
        argv = [arg.replace('resnet18_', 'test_resnet_') for arg in argv]
        if command == 'bench':
            argv = [*argv[:3], '--rounds', '1', *argv[3:]]
        argv += ['--epochs', '1', '--batch-size', '8', '--workers', '0']
        if '--data-dir' in argv:
            argv += ['--img-size', '32']
        if 'finetune' in argv:  # from ImageNet weights
            argv += ['--model', 'test_resnet_pedcc', '--pretrained-path', 'imagenet.safetensors']
        if 'probe' in argv or '--freeze-backbone' in argv:
            argv += ['--pretrained-path', 'imagenet.safetensors', '--model', 'test_resnet_cam']
    elif command in ('validate.py', 'features', 'index'):
        argv += ['--workers', '0']
    elif command == 'compare' and '--show' not in argv:
        argv = [arg.replace('resnet34', 'test_resnet') for arg in argv]
        argv = [*argv[:2], '--dry-run', '--backbone', 'test_resnet', *argv[2:]]
    elif command == 'bench':
        argv = [arg.replace('resnet18', 'test_resnet') for arg in argv] + ['--rounds', '1']
        argv += ['--samples', '256', '--width', '32', '--images', '64', '--workers', '1', '--batch-size', '8']
        argv += ['--img-size', '32']
    return argv


def test_commands_are_as_users_type_them():
    """What makes them cheap belongs into this file."""
    commands = [line for text in TEXTS.values() for line in re.findall(r'^(?:ccl-)?timm .*', text, re.M)]
    assert len(commands) > 50
    commands = [line for line in commands if ' bench train ' not in line]  # of two scripts: they train that long
    assert not [line for line in commands if re.search(r' -j | --workers | -b \d| --epochs ', line)]


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    for target, heading in re.findall(r'\]\((?!http)([^)#\s]*)#?([^)\s]*)\)', TEXTS[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not heading or heading in anchors_of(path), f'{target}#{heading}'


def anchors_of(path):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', path.read_text(encoding='utf-8'), re.M)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


def test_every_loss_and_head_is_in_the_readme():
    assert all(f'`{name}`' in TEXTS['README.md'] for name in [*list_losses(), *list_heads()])


def test_losses_and_their_heads_are_those_that_the_command_lists(run_cli):
    code, listed, err = run_cli('ccl-timm', 'losses')
    assert code == 0, err
    heads = dict(line.split()[:2] for line in listed.splitlines()[1:])
    table = re.search(r'\| loss \| idea \| head \|\n\|.*\n((?:\|.*\n)+)', TEXTS['README.md']).group(1)
    shown = {}
    for names, _, head in (line.strip('|').split('|') for line in table.splitlines()):
        shown |= dict.fromkeys(re.findall(r'`(\w+)`', names), head.strip(' `'))
    assert shown.pop('ce') == 'any'
    assert shown == heads


def test_two_commands_install():
    assert len(INSTALLS) == 2
    assert INSTALLS[0].endswith('timm train.py --model resnet18_cam --loss cc')
    assert INSTALLS[1].endswith('pytest -n auto --dist worksteal')
    assert INSTALLS[1] in (ROOT / '.ci' / 'run').read_text()


def test_the_readme_is_short_and_its_pictures_are_small():
    assert len(TEXTS['README.md'].splitlines()) <= 240
    assert all((ROOT / picture).stat().st_size <= 120_000 for picture in PICTURES)


def test_results_in_the_readme_are_those_of_the_records(run_cli, monkeypatch):
    """A table below a comment with a command has some of the rows and columns that it prints."""
    monkeypatch.chdir(ROOT)
    found = re.findall(r'<!-- from: (ccl-timm compare .*) -->\n\n((?:\|.*\n)+)', TEXTS['README.md'])
    assert found
    for command, shown in found:
        code, printed, err = run_cli(*shlex.split(command))
        assert code == 0, err
        header, *lines = (re.split(r'\s{2,}', line) for line in printed.split('\n\n')[1].splitlines())
        recorded = {tuple(line[:2]): dict(zip(header, [*line, '', ''], strict=False)) for line in lines}
        for row in read_rows(shown):
            assert row.items() <= recorded[row['loss'], row['head']].items()


def test_the_picture_is_drawn_from_the_records(run_cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, printed, err = run_cli('ccl-timm', 'compare', '--show', 'hub_cards/results/benchmark-cars196.jsonl')
    assert code == 0, err
    rows = printed.split('\n\n')[1].splitlines()[1:]
    intervals = [interval for row in rows for interval in re.findall(r'[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+', row)[:1]]
    assert len(intervals) == 18 and all(interval in PICTURE for interval in intervals)


def read_rows(text):
    """Rows of all Markdown tables of a text, by their headers."""
    for table in re.findall(r'(?:^\|.*\n)+', text, re.M):
        header, _, *rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines()]
        yield from (dict(zip(header, row, strict=True)) for row in rows)
