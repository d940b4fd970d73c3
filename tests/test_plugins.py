"""Plugins: fake installed distributions, found, listed, loaded, and kept apart when they fail."""

import ast
import contextlib
import importlib.metadata
import json
import sys
import warnings
from pathlib import Path

import pytest
import timm
from timm.models import _registry

from ccl_timm import create_loss, create_model, losses, models, registry
from ccl_timm.cli import plugins
from ccl_timm.errors import PluginLoadError, UserError
from ccl_timm.experiments.compare import Entry, entries_of
from ccl_timm.hub import card

from .conftest import TINY

MODELS = '[ccl_timm.models]\n'
LOSSES = '[ccl_timm.losses]\n'


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that writes a distribution and its modules into a folder on sys.path."""
    monkeypatch.delenv(registry.SWITCH, raising=False)
    monkeypatch.setattr(registry, '_loaded', {})
    modules_before = set(sys.modules)

    def write(name, entry_points, version='1.0', folder='site', metadata=None, **modules):
        site = tmp_path / folder
        # importlib takes all folders that start with 'plug-' for one distribution 'plug', hence the underscores
        info = site / f'{name.replace("-", "_")}-{version}.dist-info'
        info.mkdir(parents=True)
        if metadata is None:
            metadata = f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'.encode()
        (info / 'METADATA').write_bytes(metadata)
        data = entry_points if isinstance(entry_points, bytes) else entry_points.encode()
        (info / 'entry_points.txt').write_bytes(data)
        for module, code in modules.items():
            (site / f'{module}.py').write_text(code)
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(site)
        registry.refresh()

    yield write
    monkeypatch.undo()
    registry.refresh()
    for module in set(sys.modules) - modules_before:
        if module.startswith('fake_'):
            del sys.modules[module]


def rows(**kwargs):
    return {(row['kind'], row['name']): row for row in plugins.describe(**kwargs)}


def states(**kwargs):
    return {key: row['state'] for key, row in rows(**kwargs).items()}


def test_good_plugins_are_found_sorted_and_loaded(install):
    install('plug-b', LOSSES + 'second = fake_b:make\n', fake_b='def make(): return 2\n')
    install(
        'plug-a',
        LOSSES + 'zeta = fake_a : Outer.Inner [extra]\n' + MODELS + 'net_1 = fake_a:net\n[console_scripts]\nx = y:z\n',
        fake_a='class Outer:\n    class Inner:\n        pass\ndef net(): pass\n',
    )
    found = registry.find_plugins()
    assert [(p.kind, p.name, p.distribution, p.version, p.error) for p in found] == [
        ('loss', 'second', 'plug-b', '1.0', None),
        ('loss', 'zeta', 'plug-a', '1.0', None),
        ('model', 'net_1', 'plug-a', '1.0', None),
    ]
    assert [p.name for p in registry.find_plugins('model')] == ['net_1']
    assert registry.plugin_names('loss') == ['second', 'zeta']
    assert registry.load('loss', 'zeta').__qualname__ == 'Outer.Inner'
    assert registry.load('loss', 'unknown') is None
    assert registry.load('model', 'zeta') is None
    assert registry.load('loss', '') is None


def test_ours_stay_and_their_names_are_taken(install, monkeypatch):
    install('plug-a', LOSSES + 'cc = fake_a:Loss\n[ccl_timm.heads]\ncam = fake_a:Head\n', fake_a='Loss = Head = 1\n')
    monkeypatch.setenv(registry.SWITCH, 'plug-a')
    assert registry.load('loss', 'cc').__name__ == 'CCLoss' and registry.load('head', 'cam').__name__ == 'CAMHead'
    assert {row['error'] for row in plugins.describe()} == {
        'ccl_timm has a loss of this name', 'ccl_timm has a head of this name'
    }  # fmt: skip
    assert set(states().values()) == {'clash'} and 'fake_a' not in sys.modules


HEAD = """
from torch import nn
from ccl_timm.heads import Head, HeadOutputs
class Plain(Head):
    classifier_layers = ('out',)
    def __init__(self, in_features, num_classes, device=None, dtype=None):
        super().__init__()
        self.in_features = in_features
        self.out = nn.Linear(in_features, num_classes, device=device, dtype=dtype)
    def outputs(self, pooled):
        return HeadOutputs(self.out(pooled), pooled, attention=pooled.sigmoid())
    def forward(self, pooled):
        return self.outputs(pooled).logits
    def reset(self, num_classes):
        self.out = nn.Linear(self.in_features, num_classes)
class NoOutputs(Head):
    pass
"""


def test_a_head_of_a_plugin_goes_on_any_backbone(install, run_cli, folder, workdir):
    install('plug-a', '[ccl_timm.heads]\nplain = fake_head:Plain\nempty = fake_head:NoOutputs\n', fake_head=HEAD)
    code, out, err = run_cli('timm', 'train.py', '--data-dir', folder, *TINY, '--model', 'test_resnet_plain')
    assert code == 0, err
    assert 'Plain' in err
    assert timm.create_model('resnet10t_plain', num_classes=4).num_classes == 4
    with pytest.raises(UserError, match=r'the class must have the methods outputs\(pooled\) and reset'):
        create_model('test_resnet_empty')


def test_a_function_as_a_loss_declares_what_it_likes(install):
    code = 'from ccl_timm.losses import create_loss\ndef make(scale: float = 1.0): return create_loss("ce")\n'
    install('plug-a', LOSSES + 'plain_fn = fake_a:make\nsoft_fn = fake_b:make\n', fake_a=code,
            fake_b=code + 'make.soft_targets = True\n')  # fmt: skip
    assert losses.declared('plain_fn', 'requires') == ('logits',) and losses.declared('plain_fn', 'head') is None
    assert [losses.takes_soft_targets(name) for name in ('plain_fn', 'soft_fn')] == [False, True]
    assert entries_of(['plain_fn'])[-1] == Entry('linear', 'plain_fn')
    assert card._loss_reads({'loss': 'plain_fn'}) == '`outputs.logits`'


def test_found_once_until_refresh(install):
    install('plug-a', LOSSES + 'one = fake_a:x\n')
    first = registry.find_plugins()
    assert registry.find_plugins()[0] is first[0]
    install('plug-b', LOSSES + 'two = fake_b:x\n')
    assert registry.plugin_names('loss') == ['one', 'two']


def test_missing_module(install):
    install('plug-a', LOSSES + 'gone = fake_gone:Loss\n', version='2.3')
    install('plug-b', LOSSES + 'good = fake_good:Loss\n', fake_good='Loss = 1\n')
    with pytest.raises(PluginLoadError) as caught:
        registry.load('loss', 'gone')
    assert str(caught.value) == (
        "Cannot load the loss plugin 'gone' of plug-a 2.3 (fake_gone:Loss): ModuleNotFoundError: No module named "
        "'fake_gone'. Uninstall or repair plug-a, or leave it out with CCL_TIMM_PLUGINS='plug-b'."
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_missing_object(install):
    install('plug-a', LOSSES + 'bare = fake_bare:Loss\n', fake_bare='')
    with pytest.raises(
        PluginLoadError, match=r"AttributeError: module 'fake_bare' has no attribute 'Loss'\. Uninstall"
    ):
        registry.load('loss', 'bare')


def test_failed_import_is_remembered_and_harms_no_other(install, monkeypatch):
    monkeypatch.setattr(sys, 'fake_imports', 0, raising=False)
    code = 'import sys\nsys.fake_imports += 1\nraise RuntimeError("no licence")\n'
    install('plug-a', LOSSES + 'bad = fake_bad:Loss\nworse = fake_bad:Other\n', fake_bad=code)
    install('plug-b', LOSSES + 'good = fake_good:Loss\n', fake_good='Loss = 1\n')
    with pytest.raises(PluginLoadError, match='RuntimeError: no licence') as first:
        registry.load('loss', 'bad')
    assert registry.load('loss', 'good') == 1
    with pytest.raises(PluginLoadError, match='RuntimeError: no licence') as second:
        registry.load('loss', 'bad')
    assert second.value is not first.value and second.value.__cause__ is first.value.__cause__
    with pytest.raises(PluginLoadError, match="'worse' of plug-a 1.0 .*RuntimeError: no licence"):
        registry.load('loss', 'worse')
    assert sys.fake_imports == 1
    assert states() == {('loss', 'bad'): 'broken', ('loss', 'good'): 'loaded', ('loss', 'worse'): 'broken'}
    assert rows()['loss', 'bad']['error'] == 'RuntimeError: no licence'
    registry.refresh()
    with pytest.raises(PluginLoadError):
        registry.load('loss', 'bad')
    assert sys.fake_imports == 2


def test_interruption_by_hand_is_no_failure_of_a_plugin(install):
    install('plug-a', LOSSES + 'slow = fake_slow:Loss\n', fake_slow='raise KeyboardInterrupt\n')
    with pytest.raises(KeyboardInterrupt):
        registry.load('loss', 'slow')
    assert states() == {('loss', 'slow'): 'available'}


@pytest.mark.parametrize(
    ('entry', 'sentence'),
    [
        (LOSSES + 'bare = fake_a\n', "the value 'fake_a' must have the form module:object"),
        (LOSSES + 'bare = no such:thing\n', "the value 'no such:thing' must have the form module:object"),
        (LOSSES + 'Bare = fake_a:x\n', "the name 'Bare' must consist of a letter a-z, then a-z, 0-9 and _"),
        (LOSSES + '2nd = fake_a:x\n', "the name '2nd' must consist of a letter a-z, then a-z, 0-9 and _"),
        (MODELS + 'net.tag = fake_a:x\n', "the name 'net.tag' must consist of a letter a-z, then a-z, 0-9 and _"),
    ],
)
def test_bad_name_or_value_is_listed_and_raised_at_use(install, entry, sentence):
    install('plug-a', entry)
    (plugin,) = registry.find_plugins()
    assert plugin.error == sentence
    assert registry.plugin_names(plugin.kind) == []
    assert [(row['state'], row['error']) for row in plugins.describe()] == [('broken', sentence)]
    with pytest.raises(PluginLoadError, match="leave it out with CCL_TIMM_PLUGINS=''") as caught:
        registry.load(plugin.kind, plugin.name)
    assert sentence in str(caught.value)


def test_malformed_file_with_our_group_is_listed(install):
    install('plug-a', LOSSES + 'no equals sign\n')
    install('plug-b', LOSSES + 'good = fake_good:Loss\n', fake_good='Loss = 1\n')
    assert states() == {('loss', ''): 'broken', ('loss', 'good'): 'available'}
    row = rows()['loss', '']
    assert row['distribution'] == 'plug-a' and row['error'].startswith('its entry_points.txt cannot be read (TypeError')
    with pytest.warns(UserWarning, match=r'Cannot load the loss plugins of plug-a 1\.0: its entry_points\.txt cannot'):
        assert registry.load_all('loss') == {'good': 1}


def test_two_malformed_files_are_not_a_clash(install):
    install('plug-a', LOSSES + 'no equals sign\n')
    install('plug-b', LOSSES + MODELS + 'no equals sign\n')
    assert [(row['kind'], row['distribution'], row['state']) for row in plugins.describe()] == [
        ('loss', 'plug-a', 'broken'),
        ('loss', 'plug-b', 'broken'),
        ('model', 'plug-b', 'broken'),
    ]


def test_malformed_file_of_others_is_ignored(install):
    install('plug-a', '[pytest11]\nno equals sign\n')
    install('plug-c', b'[pytest11]\n\xff\xfe = x:y\n')
    install('plug-b', LOSSES + 'good = fake_good:Loss\n')
    assert states() == {('loss', 'good'): 'available'}


def test_undecodable_files_are_listed(install):
    install('plug-a', LOSSES.encode() + b'\xff\xfe = x:y\n')
    install('plug-b', LOSSES + 'good = fake_good:Loss\n', metadata=b'Name: \xff\n')
    install('plug-c', LOSSES + 'good = fake_good:Loss\n', metadata=b'Version: 1.0\n')
    found = registry.find_plugins()
    assert len(found) == 3 and all(p.error and not p.name for p in found)
    assert sorted(p.error.split(' cannot be read')[0] for p in found) == ['its METADATA'] * 2 + ['its entry_points.txt']
    assert any(p.error == 'its METADATA cannot be read (ValueError: no Name in it)' for p in found)


def test_same_name_from_two_distributions(install, monkeypatch):
    install('plug-b', LOSSES + 'podd = fake_b:Loss\n', fake_b='Loss = "b"\n')
    install('plug-a', LOSSES + 'podd = fake_a:Loss\n', fake_a='Loss = "a"\n', version='2.0')
    assert registry.plugin_names('loss') == []
    assert [row['state'] for row in plugins.describe()] == ['clash', 'clash']
    with pytest.raises(PluginLoadError) as caught:
        registry.load('loss', 'podd')
    assert str(caught.value) == (
        "Cannot choose: the loss 'podd' is declared by plug-a 2.0 (fake_a:Loss) and by plug-b 1.0 (fake_b:Loss): "
        "uninstall one of them, or leave one out, for example with CCL_TIMM_PLUGINS='plug-a'."
    )
    with pytest.warns(UserWarning, match='Cannot choose') as record:
        assert registry.load_all('loss') == {}
    assert len({str(warning.message) for warning in record}) == 1
    monkeypatch.setenv(registry.SWITCH, 'plug-b')
    assert registry.load('loss', 'podd') == 'b'
    assert [row['state'] for row in plugins.describe()] == ['disabled', 'loaded']


def test_stale_duplicate_of_a_distribution_is_ignored(install):
    install('plug-a', LOSSES + 'old = fake_old:Loss\nboth = fake_old:Loss\n', version='1.0', folder='behind')
    install('Plug.A', LOSSES + 'both = fake_new:Loss\n', version='2.0', folder='front')
    assert [(p.name, p.value, p.version) for p in registry.find_plugins()] == [('both', 'fake_new:Loss', '2.0')]


def test_stale_duplicate_stays_ignored_if_the_new_one_has_no_plugins(install):
    install('plug-a', LOSSES + 'old = fake_old:Loss\n', version='1.0', folder='behind')
    install('plug-a', '[console_scripts]\nx = y:z\n', version='2.0', folder='front')
    assert registry.find_plugins() == ()


def test_a_folder_that_is_not_named_after_its_distribution(install):
    install('weird', LOSSES + 'one = fake_a:Loss\n', metadata=b'Name: Plug_X\nVersion: 3\n')
    assert [(p.name, p.distribution, p.version) for p in registry.find_plugins()] == [('one', 'plug-x', '3')]


def test_a_distribution_that_cannot_be_read_at_all_is_ignored(install, monkeypatch):
    install('plug-a', LOSSES + 'one = fake_a:Loss\n')
    real = list(importlib.metadata.distributions())

    class Unreadable(importlib.metadata.Distribution):
        def read_text(self, filename):
            raise OSError('stale file handle')

        def locate_file(self, path):
            return path

    monkeypatch.setattr(importlib.metadata, 'distributions', lambda: [Unreadable(), *real])
    registry.refresh()
    assert states() == {('loss', 'one'): 'available'}


def test_switch_has_three_meanings_and_is_read_at_each_call(install, monkeypatch):
    install('plug-a', LOSSES + 'one = fake_a:Loss\n', fake_a='Loss = "a"\n')
    install('plug-b', LOSSES + 'two = fake_b:Loss\n', fake_b='Loss = "b"\n')
    assert registry.plugin_names('loss') == ['one', 'two']
    monkeypatch.setenv(registry.SWITCH, '')
    assert registry.plugin_names('loss') == []
    assert states() == {('loss', 'one'): 'disabled', ('loss', 'two'): 'disabled'}
    assert registry.load_all('loss') == {}
    monkeypatch.setenv(registry.SWITCH, ' Plug_B , plug-z')
    assert registry.plugin_names('loss') == ['two']
    assert registry.load('loss', 'two') == 'b'
    with pytest.raises(PluginLoadError) as caught:
        registry.load('loss', 'one')
    assert str(caught.value) == (
        "The loss plugin 'one' of plug-a 1.0 (fake_a:Loss) is disabled by CCL_TIMM_PLUGINS=' Plug_B , plug-z'. "
        'Unset CCL_TIMM_PLUGINS, or add plug-a to it.'
    )
    monkeypatch.delenv(registry.SWITCH)
    assert registry.load('loss', 'one') == 'a'


def test_verify_and_guard(install):
    install('plug-a', LOSSES + 'one = fake_a:Loss\n', fake_a='import warnings\nwarnings.warn("taken")\nLoss = 1\n')
    install('plug-b', LOSSES + 'two = fake_b:Loss\n', fake_b='Loss = 2\n')

    @contextlib.contextmanager
    def warnings_are_errors():
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            yield

    def verify(name, obj):
        raise UserError(f'{name} {obj} is not a Loss.')

    with pytest.raises(PluginLoadError, match='UserWarning: taken'):
        registry.load('loss', 'one', guard=warnings_are_errors)
    assert registry.load('loss', 'two') == 2
    with pytest.raises(PluginLoadError, match=r'\(fake_b:Loss\): two 2 is not a Loss\. Uninstall') as caught:
        registry.load('loss', 'two', verify=verify)
    assert isinstance(caught.value.__cause__, UserError)
    assert registry.used_plugins() == []
    with pytest.raises(PluginLoadError, match='two 2 is not a Loss'):
        registry.load('loss', 'two')


def test_load_all_warns_of_each_failure(install):
    install('plug-a', MODELS + 'gone = fake_gone:net\n' + LOSSES + 'one = fake_one:Loss\n', fake_one='Loss = 1\n')
    install('plug-b', MODELS + 'net = fake_net:net\n', fake_net='net = 2\n')
    with pytest.warns(UserWarning, match="model plugin 'gone' of plug-a") as record:
        assert registry.load_all('model') == {'net': 2}
    assert len(record) == 1
    assert 'fake_one' not in sys.modules


def test_used_plugins(install):
    install('plug-a', LOSSES + 'one = fake_a:Loss\n' + MODELS + 'net = fake_a:net\n', fake_a='Loss = net = 1\n')
    assert registry.used_plugins() == []
    registry.load('model', 'net')
    registry.load('model', 'net')
    assert registry.used_plugins() == [
        {'kind': 'model', 'name': 'net', 'value': 'fake_a:net', 'distribution': 'plug-a', 'version': '1.0'}
    ]


def test_describe_imports_nothing_and_reports_taken_names(install):
    install('plug-a', LOSSES + 'one = fake_a:Loss\n' + MODELS + 'resnet50 = fake_a:net\n', fake_a='Loss = net = 1\n')

    def owner(kind, name):
        return 'timm has a model of this name' if (kind, name) == ('model', 'resnet50') else None

    assert plugins.describe(owner=owner) == [
        dict(
            kind='loss',
            name='one',
            value='fake_a:Loss',
            distribution='plug-a',
            version='1.0',
            state='available',
            error=None,
        ),
        dict(
            kind='model',
            name='resnet50',
            value='fake_a:net',
            distribution='plug-a',
            version='1.0',
            state='clash',
            error='timm has a model of this name',
        ),
    ]
    assert 'fake_a' not in sys.modules
    registry.load('model', 'resnet50')
    assert states(owner=owner)['model', 'resnet50'] == 'loaded'


def test_describe_takes_names_of_an_imported_module_for_its_own(install):
    install('plug-a', MODELS + 'a = fake_a:a\nb = fake_a:b\nc = fake_c:c\n', fake_a='a = b = 1\n', fake_c='c = 1\n')
    registered = {'c'}

    def check(kind, name):
        registry.load(kind, name)
        registered.update({'a', 'b'})

    taken = {'owner': lambda kind, name: 'taken' if name in registered else None}
    expected = {('model', 'a'): 'loaded', ('model', 'b'): 'loaded', ('model', 'c'): 'clash'}
    assert states(check=check, **taken) == expected


def test_describe_checks_what_is_available(install, monkeypatch):
    install('plug-a', LOSSES + 'gone = fake_gone:Loss\nodd = fake_a:Loss\none = fake_a:Loss\n', fake_a='Loss = 1\n')
    install('plug-b', LOSSES + 'off = fake_off:Loss\n')
    monkeypatch.setenv(registry.SWITCH, 'plug-a')

    def check(kind, name):
        registry.load(kind, name)
        if name == 'odd':
            raise UserError('Takes **kwargs.')

    assert states(check=check) == {
        ('loss', 'gone'): 'broken',
        ('loss', 'odd'): 'broken',
        ('loss', 'off'): 'disabled',
        ('loss', 'one'): 'loaded',
    }
    assert rows(check=check)['loss', 'odd']['error'] == 'Takes **kwargs'


def test_knows_neither_torch_nor_timm():
    tree = ast.parse(Path(registry.__file__).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert 'ccl_timm.errors' in imported
    outside = {name for name in imported if name.partition('.')[0] not in sys.stdlib_module_names}
    assert outside == {'ccl_timm.errors'}


def test_a_loss_without_options_is_no_broken_plugin(install):
    code = 'from ccl_timm.losses import Loss\n\nclass Plain(Loss):\n    def compute_terms(self, outputs, target):\n'
    code += '        return {}\n'
    install('plug-plain', f'{LOSSES}plain = plain_loss:Plain\n', plain_loss=code)
    assert type(create_loss('plain')).__name__ == 'Plain'


def test_a_plugins_second_model_is_verified_too(install):
    code = 'from timm.models import register_model\n\n'
    code += ''.join(
        f'@register_model\ndef two_{x}(pretrained=False, **kwargs):\n    raise NotImplementedError\n\n' for x in 'ab'
    )
    install('plug-two', f'{MODELS}two_a = two_models:two_a\ntwo_b = two_models:two_b\n', two_models=code)
    models.ensure_registered('two_a')
    assert models.name_owner('two_b') is None
    models.ensure_registered('two_b')
    assert [plugin['name'] for plugin in registry.used_plugins()] == ['two_a', 'two_b']


LOSS = """
from ccl_timm.losses import Loss
class NoTerms(Loss):
    pass
class Foreign:
    pass
class Vector(Loss):
    def compute_terms(self, outputs, target):
        return {'all': outputs.logits.sum(1)}
class Good(Loss):
    def compute_terms(self, outputs, target):
        return {'all': outputs.logits.square().mean()}
def returns_nothing():
    return None
"""


def test_check_tries_the_contract(install, run_cli):
    entries = {
        'no_terms': 'NoTerms',
        'foreign': 'Foreign',
        'vector': 'Vector',
        'good': 'Good',
        'none': 'returns_nothing',
    }
    install('plug-a', LOSSES + ''.join(f'{name} = fake_loss:{obj}\n' for name, obj in entries.items()), fake_loss=LOSS)
    code, out, err = run_cli('ccl-timm', 'plugins', '--check', '--json')
    found = {row['name']: (row['state'], row['error'] or '') for row in json.loads(out)}
    assert code == 1 and {name: state for name, (state, _) in found.items()} == {
        'no_terms': 'broken', 'foreign': 'broken', 'vector': 'broken', 'good': 'loaded', 'none': 'broken'
    }  # fmt: skip
    assert 'no method compute_terms' in found['no_terms'][1] and 'derive from ccl_timm.Loss' in found['foreign'][1]
    assert 'returned a NoneType' in found['none'][1]


@pytest.mark.parametrize('end', ['raise SystemExit(0)', 'raise BaseException("no")', 'raise GeneratorExit'])
def test_a_plugin_cannot_end_the_program(end, install, run_cli, folder, workdir):
    install('plug-a', LOSSES + 'leaves = fake_end:Loss\n', fake_end=f'{end}\n')
    code, out, err = run_cli('timm', 'train.py', '--data-dir', folder, *TINY, '--loss', 'leaves')
    assert code == 2 and "Cannot load the loss plugin 'leaves'" in err
    code, out, err = run_cli('ccl-timm', 'plugins', '--check')
    assert code == 1 and 'broken' in out


def test_lists_import_no_plugin(install, run_cli):
    install('plug-a', LOSSES + 'other = fake_unused:Loss\n', fake_unused='raise BaseException\n')
    for argv in (['losses'], ['losses', 'cc'], ['models', 'resnet18_*'], ['plugins']):
        code, out, err = run_cli('ccl-timm', *argv)
        assert code == 0, err
        assert 'fake_unused' not in sys.modules and ('plug-in plug-a 1.0' in out) == (argv == ['losses'])


ENDS = """
from timm.models import register_model
from ccl_timm.losses import Loss
@register_model
def ending_net(pretrained=False, **kwargs):
    raise SystemExit(0)
class WhenBuilt(Loss):
    def __init__(self):
        raise SystemExit
    def compute_terms(self, outputs, target):
        return {}
class WhenCalled(Loss):
    def compute_terms(self, outputs, target):
        raise SystemExit(0)
"""


@pytest.fixture
def ending(install):
    """A plug-in whose model and losses are imported, and then exit with code 0."""
    losses = 'when_built = fake_ends:WhenBuilt\nwhen_called = fake_ends:WhenCalled\n'
    install('plug-a', f'{LOSSES}{losses}{MODELS}ending_net = fake_ends:ending_net\n', fake_ends=ENDS)
    yield
    _registry._model_entrypoints.pop('ending_net', None)
    _registry._module_to_models.pop('fake_ends', None)


@pytest.mark.parametrize(
    'typed', [['--loss', 'when_built'], ['--loss', 'when_called'], ['--model', 'ending_net']], ids=str
)
def test_a_plugin_that_exits_ends_no_training_as_if_it_was_done(typed, ending, run_cli, folder, workdir):
    code, out, err = run_cli('timm', 'train.py', '--data-dir', folder, *TINY, '--model', 'test_resnet', *typed)
    assert code == 2 and "The module 'fake_ends' ended the program" in err


def test_models_that_cannot_be_built_are_found_by_the_check_and_left_out_of_the_list(ending, run_cli):
    code, out, err = run_cli('ccl-timm', 'plugins', '--check', '--json')
    assert code == 1 and {row['state'] for row in json.loads(out)} == {'broken'}
    with pytest.warns(UserWarning, match="Left out: 'ending_net'"):
        code, out, err = run_cli('ccl-timm', 'models')
    assert code == 0 and 'resnet18_cam' in out and 'ending_net' not in out


def test_help_still_ends_with_code_0(run_cli):
    code, out, err = run_cli('timm', 'train.py', '--help')
    assert code == 0 and '--loss' in out and 'ended the program' not in err
