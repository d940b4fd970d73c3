"""`ccl-timm plugins`."""

import argparse
import json

from ccl_timm import losses, models, registry
from ccl_timm.console import table
from ccl_timm.console.arguments import Parser
from ccl_timm.testing import try_loss, try_model

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'List the losses, heads and models of other packages.'


def add_arguments(parser: Parser) -> None:
    parser.add_argument('--check', action='store_true', help='load and check each; exit code 1 if one fails')
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> int:
    rows = registry.describe(check=_check if args.check else None, owner=_owner)
    if args.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print('no plugins installed; `ccl-timm new-plugin DIR` writes one to start from')
    else:
        header = ('kind', 'name', 'distribution', 'version', 'value', 'state')
        print(table([tuple(str(row[key] or '') for key in header) for row in rows], header))
        print(''.join(f'\n{row["kind"]} {row["name"]}: {row["error"]}' for row in rows if row['error']), end='')
    return int(args.check and any(row['state'] in ('broken', 'clash') for row in rows))


def _check(kind: str, name: str) -> None:
    try_loss(name) if kind == 'loss' else try_model(name if kind == 'model' else f'test_resnet_{name}')


def _owner(kind: str, name: str) -> str | None:
    return {'model': models.name_owner, 'loss': losses.name_owner}.get(kind, lambda name: None)(name)
