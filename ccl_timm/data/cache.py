"""Where computed data is kept between runs."""

import os
from pathlib import Path

__all__ = ['cache_dir']


def cache_dir(kind: str) -> Path:
    """The folder of one kind of cached data: below ``$CCL_TIMM_CACHE``, default ``ccl_timm`` in the user's cache.

    It may not exist yet. Whatever lies in it can be deleted at any time.
    """
    root = os.environ.get('CCL_TIMM_CACHE')
    if not root:
        root = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'ccl_timm'
    return Path(root) / kind
