"""YAML files: numbers as YAML 1.2 has them, and nothing that a settings file cannot hold."""

import re

import pytest
import yaml

from ccl_timm import UserError
from ccl_timm.training.yaml_files import dump_yaml, read_yaml


def read(tmp_path, content):
    path = tmp_path / 'a.yaml'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_yaml(path)


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    content = read(tmp_path, 'a: 1e-6\nb: {c: 1E5, d: [-1e3, 1.5, .5, 5., 12, .inf]}\ne: 1e\nf: "1e5"\ng: 1_0.5')
    assert content == {
        'a': 1e-6, 'b': {'c': 1e5, 'd': [-1e3, 1.5, 0.5, 5.0, 12, float('inf')]}, 'e': '1e', 'f': '1e5', 'g': '1_0.5',
    }  # fmt: skip


def test_what_is_written_reads_back_here_and_elsewhere(tmp_path):
    settings = {'names': ['1e5', '1.5', '12', 'yes', '1_0.5', '1:30', ''], 'small': 1e-6, 'large': 1e16, 'list': [1, 2]}
    settings['again'] = settings['list']
    text = dump_yaml(settings)
    assert read(tmp_path, text) == settings == yaml.safe_load(text) and '&' not in text


BOMB = 'a0: &a0 [1, 1]\n' + '\n'.join(f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]' for i in range(1, 12))


@pytest.mark.parametrize(
    'content, message',
    [
        ('a: [', 'is not YAML'),
        ('a: ' + '{a: ' * 2000 + '}' * 2000, 'nested too deeply'),
        ('a: &a [*a]', 'nested too deeply'),
        (BOMB, 'aliases repeat more than 1000000 values'),
        (b'\xff\xfe\x00', 'is not YAML'),
        (b'\x00\x01', 'is not YAML'),
        ('a: !!python/object/apply:os.getcwd []', 'is not YAML'),
        ('a: !!timestamp x', 'is not YAML'),
        ("a: !!int ''", 'is not YAML'),
        ('a: !!bool x', 'is not YAML'),
        ('a: 2001-13-45', 'is not YAML'),
        ('a: ' + '1' * 5000, 'is not YAML'),
        ('{[]: 1}', 'is not YAML'),
    ],
)
def test_what_is_no_settings_file_is_one_sentence(content, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)) as found:
        read(tmp_path, content)
    assert 'a.yaml' in str(found.value) and '\n' not in str(found.value)
