"""Images on a model's page: put beside the model, with what it makes of them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ccl_timm.data.files import UnreadableImage, color_mode, read_image
from ccl_timm.errors import UserError
from ccl_timm.training.checkpoints import Trained
from ccl_timm.training.prediction import predict

__all__ = ['write_examples']

_SHOWN = 3  # classes for each image


def write_examples(trained: Trained, files: Sequence[str | os.PathLike], folder: Path) -> list[dict[str, Any]]:
    """Write images to ``examples/`` of a folder, without what their files tell of camera, place and time.

    Args:
        trained: the model.
        files: image files.
        folder: of what is pushed.

    Returns:
        Entries of a card's ``widget``: the file in the folder, its title, and the most probable classes.

    Raises:
        UserError: a file is no image that can be read, or the model computes numbers that are not finite.
    """
    if not files:
        return []
    mode = color_mode(trained.data_config['input_size'][0])
    (folder / 'examples').mkdir()
    written = [folder / 'examples' / f'{number}.png' for number in range(1, len(files) + 1)]
    for file, path in zip(files, written, strict=True):
        try:
            image = read_image(file, mode)
        except UnreadableImage as error:
            raise UserError(f"The example '{file}' cannot be read: {error}.") from error
        image.info.clear()
        image.save(path)
    found, _ = predict(trained, written, topk=_SHOWN)
    return [
        {
            'src': path.relative_to(folder).as_posix(),
            'example_title': Path(file).stem,
            'output': [{'label': p['class'], 'score': round(p['probability'], 4)} for p in row['predictions']],
        }
        for file, path, row in zip(files, written, found, strict=True)
    ]
