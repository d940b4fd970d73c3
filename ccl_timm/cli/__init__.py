"""The command line: `ccl-timm COMMAND ...` and `timm SCRIPT ...`, one module for each command."""

from ccl_timm.cli.dispatch import main, timm

__all__ = ['main', 'timm']
