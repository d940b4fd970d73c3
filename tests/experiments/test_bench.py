"""The benchmark measures what it says; no test looks at a clock."""

import json

import pytest
import torch

from ccl_timm.experiments.bench import paper_form, ratios
from ccl_timm.losses import channel_correlation


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


CASES = {
    'cc': (['--samples', '64', '--width', '8', '--classes', '4'], 2),
    'steps': (['--losses', 'cc', 'pod', '--backbone', 'test_resnet', '-b', '4', '--classes', '4'], 3),
    'loaders': (['--images', '64', '-b', '16', '-j', '0'], 2),
}


@pytest.mark.parametrize('what', CASES)
def test_command_prints_ratios(what, run_cli):
    argv, lines = CASES[what]
    code, out, err = run_cli('ccl-timm', 'bench', what, *argv, '--rounds', '1', '--json', '--device', 'cpu')
    assert code == 0, err
    rows = json.loads(out)
    assert len(rows) == lines and rows[0]['ratio'] == 1.0 and all(row['seconds'] > 0 for row in rows)
    if what == 'cc':
        assert rows[1]['kept_mib'] == pytest.approx(2 * rows[1]['kept_at_half_mib'], rel=0.3)
        assert rows[0]['kept_mib'] == pytest.approx(4 * rows[0]['kept_at_half_mib'], rel=0.3)
