"""What we have measured: printed tables are those of the records, and a record's command gives its figures again."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ccl_timm.experiments import results, tables
from ccl_timm.training import run_dir

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted(path.parent for path in (ROOT / 'hub_cards' / 'results').rglob('args.yaml'))
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
def test_table_is_the_reports(table, lines, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = words('ccl-timm', 'report', 'hub_cards/results', '--table', table)
    assert code == 0, err
    assert lines in out


def test_readme_has_table_1_and_every_record_is_in_a_table():
    assert 'cc-table1' in {param.values[0] for param in TABLES}
    shown = {param.values[0] for param in TABLES}
    found = results.read_results([str(ROOT / 'hub_cards' / 'results')])
    placed = {
        result.folder
        for name in shown
        for place in results.assign(tables.read_table(name), found)
        for group in place.groups
        for result in group.results
    }
    assert placed == {result.folder for result in found}


@pytest.mark.parametrize('folder', RECORDS, ids=lambda path: path.name)
def test_record_tells_how_it_was_made_and_nothing_of_the_machine(folder):
    environment = run_dir.read_environment(folder)
    assert {'command', 'versions', 'device', 'threads', 'data_fingerprint'} <= environment.keys()
    assert (
        isinstance(run_dir.read_args(folder)['seed'], int)
        and f'--seed {run_dir.read_args(folder)["seed"]}' in (environment['command'])
    )
    assert not [word for word in shlex.split(environment['command']) if Path(word).is_absolute()]
    assert {path.name for path in folder.iterdir()} <= {'args.yaml', 'summary.csv', 'environment.json', 'parts.csv'}


@pytest.mark.slow
@pytest.mark.parametrize('folder', RECORDS, ids=lambda path: path.name)
def test_first_epoch_again(folder, tmp_path):
    """Needs CCL_TIMM_DATA, a folder of data sets and weights called as in the records, and the record's versions."""
    root = os.environ.get('CCL_TIMM_DATA')
    if not root:
        pytest.skip('CCL_TIMM_DATA names no folder of data')
    recorded = run_dir.read_environment(folder)
    here = run_dir.environment([], 'cpu', '')['versions']
    if here != recorded['versions']:
        pytest.skip(f'recorded with {recorded["versions"]}, here are {here}')
    for path in Path(root).resolve().iterdir():
        (tmp_path / path.name).symlink_to(path)
    words = [*shlex.split(recorded['command'])[2:], '--epochs', '1', '--output', 'again', '--experiment', 'one']
    environment = {**os.environ, 'OMP_NUM_THREADS': str(recorded['threads'])}
    subprocess.run([sys.executable, '-m', 'ccl_timm', 'train', *words], cwd=tmp_path, env=environment, check=True)
    (first, *_), (again,) = run_dir.complete_rows(folder), run_dir.complete_rows(tmp_path / 'again' / 'one')
    assert again == first
