"""The outputs of a classifier head, and what a model needs from it."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from torch import Tensor, nn

from ccl_timm.errors import UserError

__all__ = ['Head', 'HeadOutputs', 'require_positive', 'transformers_initializes']


class HeadOutputs(NamedTuple):
    """What a head computes from pooled features, the one carrier from head to loss.

    A head with further outputs returns a NamedTuple of its own, which has these fields too.

    Attributes:
        logits: (N, K), what the model returns.
        features: (N, D), what the last layer reads, not normalised.
        attention: (N, D) in (0, 1), channel attention; None if the head has none.
        cosine: (N, K) in [-1, 1], cosine of features and class vectors; None for a linear layer.
        weight: (K, D), the class vectors of the last layer, divided by their norm where logits are cosines; None if it
            has fixed centroids.
        centroids: (K, D), fixed unit vectors; None if the class vectors are learnt.
        feature_map: (N, C, H, W), what the backbone computes before pooling; filled in by the task for a loss that
            requires it.
    """

    logits: Tensor
    features: Tensor
    # TorchScript reads these annotations, and knows Optional[...] but not X | None
    attention: Optional[Tensor] = None  # noqa: UP045
    cosine: Optional[Tensor] = None  # noqa: UP045
    weight: Optional[Tensor] = None  # noqa: UP045
    centroids: Optional[Tensor] = None  # noqa: UP045
    feature_map: Optional[Tensor] = None  # noqa: UP045


def require_positive(**options: float | None) -> None:
    """Raise a UserError for an option that is not above 0; None stands for a default."""
    for name, value in options.items():
        if value is not None and not value > 0:
            raise UserError(f'{name}={value}: it must be above 0.')


def transformers_initializes() -> bool:
    """Whether transformers is initialising a model: its own functions are in torch.nn.init's place then."""
    return nn.init.normal_.__module__ != nn.init.__name__


class Head(nn.Module):
    """A classifier that replaces the last layer of a timm model.

    Built as ``Head(in_features, num_classes, **options)`` with ``device`` and ``dtype`` among the options.
    ``forward(pooled)`` must return ``outputs(pooled).logits``.

    Attributes:
        in_features: width of the pooled features.
        classifier_layers: names, within the head, of the layers shaped by the number of classes ('' for the head
            itself): the only ones that a change of classes replaces.
    """

    in_features: int
    classifier_layers: tuple[str, ...] = ('',)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options that a state_dict of this head shows, such as widths, which nobody then has to repeat; none here."""
        return {}

    def outputs(self, pooled: Tensor) -> HeadOutputs:
        """Compute all that a loss may read from pooled features (N, in_features)."""
        raise NotImplementedError

    def reset(self, num_classes: int) -> None:
        """Replace what depends on the number of classes, keep the rest."""
        raise NotImplementedError

    def init_non_persistent_buffers(self) -> None:
        """Initialise the tensors of the head itself, but those that transformers has loaded; nothing by default.

        transformers builds models without memory for their tensors, and calls this, by timm's name for it, on every
        module that has it. It knows by itself how to initialise torch's own layers. timm calls it after loading, when
        nothing is to be done: what a head has is persistent, see :func:`transformers_initializes`.
        """

    def caution(self) -> str | None:
        """What speaks against the weights that training has reached, as a sentence; None if nothing does."""

    def feature_stage(self) -> nn.Module | None:
        """A new module that the model is to run at the end of its feature map, shaped by the classes; None for none.

        It has ``in_channels`` and ``out_channels``; a change of classes replaces it.
        """
        return None
