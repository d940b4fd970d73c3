"""Folders of the repository's top level that the package carries along."""

from pathlib import Path

__all__ = ['packaged_folder']


def packaged_folder(name: str) -> Path:
    """Where a top-level folder lies: inside an installed package, as ``_<name>``, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / f'_{name}'
    return installed if installed.is_dir() else package.parent / name
