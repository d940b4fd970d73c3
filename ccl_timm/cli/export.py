"""`ccl-timm export`."""

import argparse

from ccl_timm.cli.common import add_source
from ccl_timm.console.arguments import Parser
from ccl_timm.hub.publish import EXPORT_FILES, export

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'Write a trained model as safetensors and config.json, or as ONNX.'


def add_arguments(parser: Parser) -> None:
    add_source(parser)
    parser.add_argument('folder', metavar='DIR', help='where to write')
    parser.add_argument(
        '--format', default='timm', choices=tuple(EXPORT_FILES), help='timm (default): safetensors and config.json'
    )


def run(args: argparse.Namespace) -> int:
    for path in export(args.source, args.folder, args.use_ema, args.format):
        print(path)
    if args.format == 'timm':
        print(f'load it: import ccl_timm; ccl_timm.create_model({f"local-dir:{args.folder}"!r}, pretrained=True)')
    return 0
