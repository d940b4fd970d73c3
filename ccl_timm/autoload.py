"""Import this to have our models and plugins' models in a stock timm script (`--device-modules ccl_timm.autoload`).

Every recipe names it, so that `python train.py -c recipe.yaml` cannot train with cross-entropy while its args.yaml says
otherwise: a stock script that is asked for one of our losses is stopped here.
"""

import shlex
import sys

from ccl_timm import losses, models
from ccl_timm.training import recipes

__all__: list[str] = []


def _named_loss(script) -> str | None:
    """The loss that a stock training script's flags or recipe name."""
    argv = sys.argv[1:]
    for index, arg in enumerate(argv):
        if arg == '--loss' and index + 1 < len(argv):
            return argv[index + 1]
        if arg.startswith('--loss='):
            return arg.removeprefix('--loss=')
    config = script.config_parser.parse_known_args()[0].config
    return recipes.read_recipe(recipes.find_recipe(config)).get('loss') if config else None


def _guard() -> None:
    script = sys.modules['__main__']
    if not all(hasattr(script, name) for name in ('ClassificationTask', '_parse_args', 'config_parser')):
        return
    loss = _named_loss(script)
    if loss in losses.list_losses() or str(loss).startswith(losses.PREFIX):
        command = shlex.join(['timm', *sys.argv])
        print(
            f"error: {sys.argv[0]} by itself would train with cross-entropy, not with the loss '{loss}': "
            f'run it as `{command}`.',
            file=sys.stderr,
        )
        sys.exit(2)


models.load_plugins()
_guard()
