"""Text from outside in Markdown, on a terminal, in CSV and in a command; and what records leave out."""

import csv
import io
import json
import subprocess

import pytest

from ccl_timm import console
from ccl_timm.cli import predict, validate
from ccl_timm.console.escape import csv_text, markdown_code, markdown_text, shell_text, terminal_text, utf8_text
from ccl_timm.data import check
from ccl_timm.experiments.rendering import FORMATS, Report, Section
from ccl_timm.training.privacy import without_private

HOSTILE = [
    '<script>alert(1)</script>',
    '[x](javascript:alert(1))',
    '![x](https://evil.example/x.png)',
    'a\n\n# b',
    'a|b',
    '`a`',
    '\x1b[2J\x1b[31mred',
    '$x^$',
    '*a* __b__ ~~c~~',
    'a\u202eb',
    'a\udcffb',
    '&lt;b&gt;',
    'www.evil.example',
]


@pytest.mark.parametrize('name', HOSTILE)
def test_markdown_shows_text_as_it_is(name):
    parser = pytest.importorskip('markdown_it').MarkdownIt('gfm-like', {'linkify': False})
    for show in (markdown_text, markdown_code):
        html = parser.render(f'| a | b |\n|---|---|\n| {show(name)} | c |\n\nx {show(name)} y\n')
        tokens = parser.parse(f'x {show(name)} y')
        assert len(tokens) == 3 and html.count('<tr>') == 2 and html.count('<td>') == 2
        kinds = {token.type for token in tokens[1].children}
        assert kinds <= {'text', 'code_inline', 'html_inline'}
        assert {t.content for t in tokens[1].children if t.type == 'html_inline'} <= {'<code>', '</code>'}
        shown = ''.join(t.content for t in tokens[1].children if t.type != 'html_inline')
        assert shown == f'x {terminal_text(name)} y'


@pytest.mark.parametrize(
    'name, markdown',
    [
        ('<script>', '&lt;script&gt;'),
        ('[x](javascript:y)', r'[x\](javascript:y)'),
        ('a|b`c`*d*', r'a\|b\`c\`\*d\*'),
        ('a\nb\\', 'a&#92;nb&#92;'),
        ('![a][b][c]', r'![a\][b\][c]'),
        ('$$x$$', '&#36;&#36;x&#36;&#36;'),
        ('https://a www.b', r'https\://a www\.b'),
        ('resnet18_cam 0 - zero, +1.5', 'resnet18_cam 0 - zero, +1.5'),
    ],
)
def test_markdown_escapes_what_has_a_meaning(name, markdown):
    assert markdown_text(name) == markdown


def test_a_terminal_gets_one_line_of_visible_characters(capsys):
    for name in HOSTILE:
        text = terminal_text(name)
        assert text.isprintable() and text.encode() and '\n' not in text
    assert terminal_text('\x1b\n\t\x85\u202e\udcff') == r'\x1b\n\t\u0085\u202e\xff'
    assert (
        terminal_text('Größe \u4e2d\u6587 \U0001f468\u200d\U0001f469')
        == 'Größe \u4e2d\u6587 \U0001f468\u200d\U0001f469'
    )
    console.log_info('a\x1b[31m\nerror: b')
    console.log_warning('\x1b')
    console.log_error('a\nb')
    assert capsys.readouterr().err == 'a\\x1b[31m\\nerror: b\nwarning: \\x1b\nerror: a\\nb\n'
    assert console.table([('a\nb', '\x1b')], ('c', 'd')) == 'c     d\na\\nb  \\x1b'


def test_names_for_programs_change_only_where_they_are_not_utf8():
    assert utf8_text('a\n\u202e \udcff\udce9') == 'a\n\u202e \\xff\\xe9'
    assert all(terminal_text(utf8_text(name)) == terminal_text(name) for name in HOSTILE)  # one way of escaping


def test_a_command_is_read_back_by_bash():
    words = ['a b', "it's", 'x\n```\n# y', '\x1b\\n', '$HOME', '\udcff', '\u202e']
    command = shell_text(words)
    assert terminal_text(command) == command
    done = subprocess.run(['bash', '-c', f"printf '%s\\0' {command}"], capture_output=True, env={'LC_ALL': 'C.UTF-8'})
    assert done.stdout.decode(errors='surrogateescape').split('\0')[:-1] == words


@pytest.mark.parametrize(
    'cell, kept',
    [
        ('=cmd|x', "'=cmd|x"),
        ('+1+cmd', "'+1+cmd"),
        ('-x', "'-x"),
        ('@a', "'@a"),
        ('\uff1dx', "'\uff1dx"),
        ('-0.5', '-0.5'),
        ('-1e-3', '-1e-3'),
        ('+7', '+7'),
        (-3, -3),
        (None, None),
        ('a=b', 'a=b'),
        ('a\nb', 'a\\nb'),
    ],
)
def test_csv_has_no_formulas_and_all_numbers(cell, kept):
    assert csv_text(cell) == kept


def test_hostile_names_in_tables_csv_and_reports(tmp_path, capsys):
    rows = [{'image': '=a.png', 'predictions': [{'class': '\x1b[2J\nx', 'index': 0, 'probability': 0.5}]}]
    for form in ('table', 'csv', 'json'):
        predict._write(rows, form, 'probability')
        out = capsys.readouterr().out
        assert '\x1b' not in out and ('=a.png' in out)
    validate._write_csv(str(tmp_path / 'a.csv'), [['class', 'accuracy'], ['=1+1', -0.5], ['a,"b"\nc', None]])
    with (tmp_path / 'a.csv').open(newline='') as file:
        assert list(csv.reader(file)) == [['class', 'accuracy'], ["'=1+1", '-0.5'], ['a,"b"\\nc', '']]
    found = check.Report('x', problems={'unreadable': ['a\x1b\nb.png']})
    assert 'a\\x1b\\nb.png' in found.as_text()
    name = '<img src=x onerror=y>|\x1b\n`z`'
    record = {'model': name, 'folders': ['=x'], 'against_ce': '+1.87 (p = 0.02)', 'p': -0.5}
    report = Report('Runs', [Section('Runs', ('model',), [(name,)])], [], [record])
    assert r'| &lt;img src=x onerror=y&gt;\|&#92;x1b&#92;n\`z\` |' in FORMATS['md'](report)
    assert '&lt;img src=x onerror=y&gt;|\\x1b\\n`z`' in FORMATS['html'](report)
    assert list(csv.reader(io.StringIO(FORMATS['csv'](report))))[1][1:] == ["'=x", '+1.87 (p = 0.02)', '-0.5']
    assert json.loads(FORMATS['json'](report))['records'] == [record]


@pytest.mark.parametrize(
    'value, public',
    [
        ('/home/alice/my data/cars/', 'cars'),
        ('~/cars', 'cars'),
        (r'C:\Users\alice\cars', 'cars'),
        ('--data-dir=/home/alice/cars', '--data-dir=cars'),
        ('cache_dir=/home/alice/c', 'cache_dir=c'),
        ('local-dir:/home/alice/exp', 'local-dir:exp'),
        ('hfds//home/alice/cars', 'hfds/cars'),
        ('see /home/alice/notes, too', 'see notes, too'),
        ('https://bob:PASS@host/a?x=1&token=abc', 'https://host/a?x=1&token=...'),
        ('git+ssh://git@host/a', 'git+ssh://host/a'),
        ({'a': ['/home/alice/t', {'b': '/home/alice/u'}], 'wandb_tags': ['x']}, {'a': ['t', {'b': 'u'}]}),
        ({'class_names': ['/m/01g317'], 'lr': 0.1, 'x': None}, {'class_names': ['/m/01g317'], 'lr': 0.1, 'x': None}),
    ],
)  # fmt: skip
def test_records_lose_folders_and_credentials(value, public):
    assert without_private(value) == public


@pytest.mark.parametrize(
    'value', ['hf-hub:me/x@main', 'hfds/owner/name', 'data/cars', 'a/b', 'https://host/a/b', '1 / 2']
)
def test_records_keep_what_is_public(value):
    assert without_private(value) == value
