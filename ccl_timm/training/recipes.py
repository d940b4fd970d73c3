"""Recipes: flat YAML files of the training script's settings. Finding, reading and checking them."""

import fnmatch
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ccl_timm import losses
from ccl_timm.errors import UnknownNameError, UserError, did_you_mean
from ccl_timm.registry import resource_dir
from ccl_timm.training.yaml_files import read_yaml

__all__ = [
    'AUTOLOAD',
    'DESCRIPTIVE',
    'check_modules',
    'describe',
    'find_recipe',
    'list_recipes',
    'read_recipe',
    'recipe_folder',
    'split_options',
    'with_autoload',
]

# registers our models in a stock script, and stops one that would train with another loss than the recipe's
AUTOLOAD = 'ccl_timm.autoload'
# keys that describe a recipe and set nothing; 'config' and 'data' come with the args.yaml of a run
DESCRIPTIVE = ('assumed', 'config', 'data')


def recipe_folder() -> Path:
    """The folder of the packaged recipes: inside an installed package, beside it in a checkout."""
    return resource_dir('recipes')


def list_recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in recipe_folder().glob('*.yaml'))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by path or by packaged name.

    Raises:
        UnknownNameError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = recipe_folder() / f'{name}.yaml'
    if packaged.parent == recipe_folder() and packaged.is_file():
        return packaged
    raise UnknownNameError(
        f"No recipe '{name}', neither a file nor a packaged one{did_you_mean(name, list_recipes())} "
        f'Packaged: {", ".join(list_recipes())}.'
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe's settings, unchecked.

    Raises:
        UserError: it is not YAML, or not a mapping of settings.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"Recipe {path} must be a mapping of settings, such as 'batch_size: 32'.")
    return content


def with_autoload(modules: Iterable[str] | None) -> list[str]:
    """``device_modules`` for an args.yaml: a stock script must not train cross-entropy where that names our loss."""
    return list(dict.fromkeys([AUTOLOAD, *(modules or [])]))


def check_modules(recipe: dict[str, Any], typed: Iterable[str] | None, path: str | Path) -> None:
    """Refuse a recipe that imports modules: somebody else's file must not run code of its choice.

    Args:
        recipe: its settings.
        typed: the modules of ``--device-modules`` on the command line, which the recipe may name, too.
        path: its file.

    Raises:
        UserError: its ``device_modules`` name another one than ``ccl_timm.autoload``.
    """
    named = recipe.get('device_modules') or []
    others = [
        str(name) for name in (named if isinstance(named, list) else [named]) if name not in (AUTOLOAD, *(typed or []))
    ]
    if others:
        raise UserError(
            f"Recipe {path} wants to import the module '{others[0]}': if you trust it, name it on the command line, "
            f'--device-modules {shlex.join(others)}.'
        )


def describe(name: str) -> tuple[str, str]:
    """What a recipe is for, from its first line, and what data it names."""
    path = find_recipe(name)
    first = path.read_text(encoding='utf-8').partition('\n')[0]
    return first.lstrip('# ').rstrip('.'), read_recipe(path).get('dataset') or 'folder'


def split_options(
    recipe: dict[str, Any], typed_loss: str | None, typed_model: str | None, typed_classes: int | None = None
) -> dict[str, Any]:
    """Return the recipe with the options of the loss and the model in use, and without those of others.

    A recipe may hold options that suit its data for several losses and models:
    ``loss_options: {arcface: {scale: 16}, ...}`` and ``model_options: {'*_pedcc': {feature_dim: 256}, ...}``, models by
    name or pattern. Its ``loss_kwargs`` belong to its own loss, and do not go with another one that was typed; its
    ``model_kwargs`` go with every model. ``margin_classes: 196`` gives losses with a margin the scale and the margin
    that suit this number of classes, or the number that was typed.

    Raises:
        UserError: they are not mappings, or not a number.
    """
    recipe = dict(recipe)
    of_losses, of_models = (_options(recipe, name) for name in ('loss_options', 'model_options'))
    loss, model = typed_loss or recipe.get('loss'), typed_model or recipe.get('model') or ''
    if typed_loss and typed_loss != recipe.get('loss'):
        recipe.pop('loss_kwargs', None)
    margins = _margin_options(loss, recipe.pop('margin_classes', None), typed_classes)
    found: dict[str, dict[str, Any]] = {'loss_kwargs': {**margins, **of_losses.get(loss, {})}, 'model_kwargs': {}}
    for pattern, options in of_models.items():
        if fnmatch.fnmatchcase(model, pattern):
            found['model_kwargs'] |= options
    for key, options in found.items():
        if options:
            recipe[key] = {**options, **(recipe.get(key) or {})}
    return recipe


def _margin_options(loss: str | None, recipe_classes: Any, typed_classes: int | None) -> dict[str, Any]:
    """The options of a loss that suit a number of classes; none for a recipe without such a number."""
    if recipe_classes is None or not loss or losses.is_timm_loss(loss):
        return {}
    if not isinstance(recipe_classes, int) or recipe_classes < 1:
        raise UserError(f"A recipe's margin_classes is a number of classes, such as 196, not {recipe_classes!r}.")
    try:
        return losses.declared(loss, 'options_for')(typed_classes or recipe_classes)
    except UserError:  # an unknown loss is reported where it is created
        return {}


def _options(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    options = recipe.pop(name, {})
    if not isinstance(options, dict) or not all(isinstance(value, dict) for value in options.values()):
        example = {'loss_options': '{arcface: {scale: 16}}', 'model_options': "{'*_pedcc': {feature_dim: 256}}"}[name]
        raise UserError(f"A recipe's {name} are a mapping of names to options: {example}.")
    return options
