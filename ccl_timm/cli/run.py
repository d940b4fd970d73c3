"""`ccl-timm run`."""

import argparse
import os

from ccl_timm.cli.launch import run_script
from ccl_timm.console.arguments import Parser
from ccl_timm.errors import UserError

__all__ = ['HELP', 'add_arguments', 'run']

HELP = "Run a timm script, such as timm's own train.py, with our models and losses."


def add_arguments(parser: Parser) -> None:
    parser.add_argument('script', metavar='SCRIPT', help="a script such as timm's own train.py")
    parser.add_argument('script_args', nargs=argparse.REMAINDER, metavar='...', help="the script's arguments")


def run(args: argparse.Namespace) -> int:
    if not os.path.isfile(args.script):
        raise UserError(f"There is no script '{args.script}'.")
    return run_script(args.script, args.script_args)
