"""What we have measured: printed tables are those of the records, and a record's command gives its values again."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ccl_timm.errors import UserError
from ccl_timm.experiments.matching import match_rows
from ccl_timm.experiments.results import read_record, read_results, write_record
from ccl_timm.experiments.tables import read_table
from ccl_timm.training import provenance
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]
RUNS = read_results([ROOT / 'hub_cards' / 'results'])
PAGES = [ROOT / 'README.md', ROOT / 'hub_cards' / 'results' / 'README.md']
# a report's table stands below a comment with the command that prints it
TABLES = [
    pytest.param(table, lines, id=f'{page.parent.name}-{table}')
    for page in PAGES
    for table, lines in re.findall(
        r'<!-- ccl-timm report hub_cards/results --table (\S+) -->\n\n((?:\|.*\n)+)', page.read_text(encoding='utf-8')
    )
]


@pytest.mark.parametrize('table, lines', TABLES)
def test_table_is_the_reports(table, lines, run_cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = run_cli('ccl-timm', 'report', 'hub_cards/results', '--table', table)
    assert code == 0, err
    assert lines in out


def test_comparison_is_what_compare_shows(run_cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = PAGES[1].read_text(encoding='utf-8')
    fold = '\n\n<details>\n<summary>.*?</summary>\n\n'
    found = re.findall(
        rf'<!-- ccl-timm (compare --show \S+) -->\n\n```text\n(.*?)```{fold}```text\n(.*?)```', page, re.S
    )
    recorded = {path.name for path in (ROOT / 'hub_cards' / 'results').glob('benchmark-*.jsonl')}
    assert recorded == {Path(command.split()[-1]).name for command, *_ in found}
    for command, *shown in found:
        code, out, err = run_cli('ccl-timm', *command.split())
        assert (code, out) == (0, '\n'.join(shown)), err


def test_the_picture_of_curves_is_that_of_the_records(run_cli, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    monkeypatch.chdir(ROOT)
    page = PAGES[1].read_text(encoding='utf-8')
    (command,) = re.findall(r'^ccl-timm (report .* --plot) curves.svg \\\n +(.*)$', page, re.M)
    code, out, err = run_cli('ccl-timm', *command[0].split(), tmp_path / 'curves.svg', *command[1].split())
    assert code == 0, err
    drawn, kept = (
        path.read_text() for path in (tmp_path / 'curves.svg', PAGES[1].with_name('fast_cifar10_curves.svg'))
    )
    lines = [re.findall(r'<path d="(M [^"]*)" clip-path', text) for text in (drawn, kept)]
    assert len(lines[0]) >= 5 and lines[0] == lines[1]


def test_what_we_learned_is_what_the_tables_say():
    learned, page = (PAGES[1].with_name(name).read_text(encoding='utf-8') for name in ('LEARNED.md', 'README.md'))
    sections = {
        re.sub(r'[^a-z0-9 -]', '', part.split('\n')[0].lower()).replace(' ', '-'): part for part in page.split('\n## ')
    }
    tables = re.findall(r'^\| loss, head (.*)\n\|.*\n((?:\|.*\n)+)', learned, re.M)
    assert [len(rows.splitlines()) for _, rows in tables] == [19, 13]
    for header, rows in tables:
        names = re.findall(r'\(README\.md#(\S+?)\)', header)
        for label, *verdicts in (row.strip('| ').split(' | ') for row in rows.splitlines()):
            loss, head = label.replace('`', '').split(', ')
            for name, verdict in zip(names, verdicts, strict=True):
                (line,) = re.findall(rf'^{loss}(?: \(control\))? +{head} .*', sections[name], re.M)[:1] or ['']
                shown = verdict.replace('not shown', 'no difference shown')
                assert shown in line or (verdict, line) == ('not run', '')
    intervals = re.findall(r'\[[+-][\d.]+, [+-][\d.]+\]', learned)
    assert len(intervals) > 40 and all(interval in page for interval in intervals)
    alphas = [float(found) for found in re.findall(r'^(?:nac|pod) .* alpha=(\S+)', page, re.M)]
    assert len(alphas) == 6 and f'took {min(alphas):.4f} to {max(alphas):.4f}' in learned.replace('\n', ' ')
    assert len(re.sub(r'^\|.*', '', learned, flags=re.M).split()) <= 1200  # one page, beside the two tables


def test_every_record_is_in_a_table():
    shown = {param.values[0] for param in TABLES}
    matched = [match for name in shown for match in match_rows(read_table(name), RUNS)]
    assert {run.name for run in RUNS} == {run.name for m in matched for group in m.groups for run in group.results}


def test_a_record_has_how_it_was_made_and_nothing_of_the_machine():
    assert len(RUNS) == 106 and sum(path.is_file() for path in (ROOT / 'hub_cards').rglob('*')) <= 52
    for run in RUNS:
        assert {'command', 'versions', 'device', 'threads', 'data_fingerprint'} <= run.environment.keys(), run.source
        typed = re.findall(r'--seed (\d+)', run.environment['command'])
        assert [run.seed] == [int(seed) for seed in typed or [TrainConfig.defaults()['seed']]], run.source
        assert not [word for word in shlex.split(run.environment['command']) if Path(word).is_absolute()], run.source


def test_records_are_read_as_they_were_written_and_grow(tmp_path):
    """Runs of other settings may follow: what is the same in all of them is then less."""
    path, (first, second, *_) = tmp_path / 'runs.jsonl', RUNS
    odd = replace(first, name='odd', settings={'model': 'x', 'epochs': 2}, environment={}, rows=[{'epoch': 0.0}])
    for run in (first, second, odd):
        write_record(path, [run])
    known = [replace(run, source='') for run in read_record(path)]
    assert known == [replace(run, source='') for run in (first, second, odd)]
    with pytest.raises(UserError, match=f"Two runs are called '{first.name}'"):
        write_record(path, [first])
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError, match='is a damaged file of recorded runs'):
        read_record(path)


@pytest.mark.slow
@pytest.mark.parametrize('run', RUNS, ids=lambda run: run.name)
def test_first_epoch_again(run, tmp_path):
    """Needs CCL_TIMM_DATA, a folder of data sets and weights called as in the records, and the record's versions."""
    root = os.environ.get('CCL_TIMM_DATA')
    if not root:
        pytest.skip('CCL_TIMM_DATA names no folder of data')
    recorded = run.environment
    here = provenance.environment([], 'cpu', '')['versions']
    if here != recorded['versions']:
        pytest.skip(f'recorded with {recorded["versions"]}, here are {here}')
    for path in Path(root).resolve().iterdir():
        (tmp_path / path.name).symlink_to(path)
    argv = [*shlex.split(recorded['command'])[2:], '--epochs', '1', '--output', 'again', '--experiment', 'one']
    environment = {**os.environ, 'OMP_NUM_THREADS': str(recorded['threads'])}
    subprocess.run([sys.executable, '-m', 'ccl_timm', 'train', *argv], cwd=tmp_path, env=environment, check=True)
    (again,) = RunDir(tmp_path / 'again' / 'one').rows()
    assert again == run.rows[0]
