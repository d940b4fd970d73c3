"""`ccl-timm plugins`."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ccl_timm import losses, models, registry
from ccl_timm.console import table
from ccl_timm.console.arguments import Parser
from ccl_timm.testing import try_loss, try_model

__all__ = ['HELP', 'add_arguments', 'describe', 'run']

HELP = 'List the losses, heads and models of other packages.'


def add_arguments(parser: Parser) -> None:
    parser.add_argument('--check', action='store_true', help='load and check each; exit code 1 if one fails')
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> int:
    rows = describe(check=_check if args.check else None, owner=_owner)
    if args.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print('no plugins installed; `ccl-timm new-plugin DIR` writes one to start from')
    else:
        header = ('kind', 'name', 'distribution', 'version', 'value', 'state')
        print(table([tuple(str(row[key] or '') for key in header) for row in rows], header))
        print(''.join(f'\n{row["kind"]} {row["name"]}: {row["error"]}' for row in rows if row['error']), end='')
    return int(args.check and any(row['state'] in ('broken', 'clash') for row in rows))


def describe(
    check: Callable[[str, str], Any] | None = None,
    owner: Callable[[str, str], str | None] = lambda kind, name: None,
) -> list[dict[str, str | None]]:
    """A row for each plug-in: the fields of ``registry.Entry``, ``state``, and ``error`` (a sentence or None).

    States: available, loaded, disabled, clash (the name is taken), broken. Nothing is imported without ``check``.

    Args:
        check: called as ``check(kind, name)`` for what is available or loaded; if it raises, the state is broken.
        owner: ``owner(kind, name)`` says in a sentence who has a name beside entry points, such as timm; None: nobody.
    """
    rows = []
    for entry in registry.find_plugins():
        state, error = registry.state(entry)
        if state == 'available' and not _is_imported(entry) and (taken := owner(entry.kind, entry.name)):
            state, error = 'clash', taken
        if check and state in ('available', 'loaded'):
            try:
                check(entry.kind, entry.name)
                state, _ = registry.state(entry)
            except KeyboardInterrupt:
                raise
            except BaseException as failure:
                state, error = 'broken', registry.describe_error(failure)
        rows.append({**asdict(entry), 'state': state, 'error': error})
    return rows


def _is_imported(entry: registry.Entry) -> bool:
    """Whether a plug-in's module is: the names that it registered with timm are then its own."""
    modules = {plugin['value'].partition(':')[0].strip() for plugin in registry.used_plugins()}
    return entry.value.partition(':')[0].strip() in modules


def _check(kind: str, name: str) -> None:
    try_loss(name) if kind == 'loss' else try_model(name if kind == 'model' else f'test_resnet_{name}')


def _owner(kind: str, name: str) -> str | None:
    return {'model': models.name_owner, 'loss': losses.name_owner}.get(kind, lambda name: None)(name)
