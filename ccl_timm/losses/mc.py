"""MC-Loss (mutual channel), arXiv 2002.04264."""

import math

import torch
from torch import Tensor

from ccl_timm.losses.base import Loss, Range, cross_entropy, require
from ccl_timm.ops import force_fp32

__all__ = ['MCLoss', 'channel_discriminality', 'channel_diversity', 'channel_mask']


@force_fp32
def channel_discriminality(feature_map: Tensor, target: Tensor, num_classes: int, keep: Tensor | None = None) -> Tensor:
    """Cross-entropy of class scores that come from each class's own channels alone (MC-Loss, L_dis).

    The score of a class is the mean over all places of the largest of its channels.

    Args:
        feature_map: (N, C, H, W), C >= K; the first channels belong to class 0, and so on. Where K does not divide C,
            the last C mod K classes have one channel more than the others [assumption].
        target: (N,) class indices.
        num_classes: K.
        keep: (C,) bool, channels that take part, at least one of each class; None for all. Others count as -inf, not
            as 0: a map need not be positive [assumption].

    Returns:
        Scalar >= 0.
    """
    maps = feature_map.flatten(2)
    if keep is not None:
        maps = maps.masked_fill(~keep[:, None], -math.inf)
    scores = torch.cat([group.amax(2).mean(2) for group in _groups(maps, num_classes)], 1)
    return cross_entropy(scores, target)


@force_fp32
def channel_diversity(feature_map: Tensor, num_classes: int) -> Tensor:
    """How far the channels of a class look at different places, averaged over classes and batch (MC-Loss, L_div / xi).

    Each channel becomes a softmax over all places; the sum over places of the largest among a class's channels is 1 if
    they are equal, and their number xi if they are disjoint.

    Args:
        feature_map: (N, C, H, W), see :func:`channel_discriminality`.
        num_classes: K.

    Returns:
        Scalar in [1 / xi, 1], to be maximised. Where classes differ in xi, each is divided by its own [assumption].
    """
    shares = feature_map.flatten(2).softmax(2)
    groups = _groups(shares, num_classes)
    return torch.cat([group.amax(2).sum(2) / group.shape[2] for group in groups], 1).mean()


def channel_mask(num_channels: int, num_classes: int, device: torch.device | None = None) -> Tensor:
    """Random (C,) bool mask that leaves out floor(xi / 2) of the xi channels of each class."""
    order = torch.randperm(num_channels, device=device)
    groups = _groups(order[None, :, None], num_classes)  # (1, classes, xi, 1)
    ranks = [group.argsort(2).argsort(2) for group in groups]
    return torch.cat([(rank >= rank.shape[2] // 2).flatten() for rank in ranks])


def _groups(x: Tensor, num_classes: int) -> list[Tensor]:
    """(N, C, S) to (N, classes, xi, S): one tensor, or two if K does not divide C."""
    size, more = divmod(x.shape[1], num_classes)
    fewer = num_classes - more
    groups = [x[:, : fewer * size].unflatten(1, (fewer, size))]
    return [*groups, x[:, fewer * size :].unflatten(1, (more, size + 1))] if more else groups


class MCLoss(Loss):
    """MC-Loss: cross-entropy, plus channels that identify their own class, and differ in where they look.

    The official code's form, with xi channels for each class::

        L = CE(z, y) + discriminality_weight * L_dis + diversity_weight * (1 - L_div / xi)

    See :func:`channel_discriminality` and :func:`channel_diversity`. The paper writes ``CE + mu (L_dis - lambda
    L_div)``: for its constants give ``discriminality_weight = mu`` and ``diversity_weight = mu * lambda * xi``. They
    are not the same setting: the code's 20 on ``1 - L_div / 3`` is 6.67 for each unit of L_div, the paper's 1.5 and 10
    make it 15.

    Args:
        num_classes: K; filled in by ``create_task``.
        num_channels: C >= K, of the feature map; filled in by ``create_task``.
        discriminality_weight: >= 0.
        diversity_weight: >= 0.

    Shapes: logits (N, K), feature_map (N, C, H, W) with more than one place; target (N,) indices.
    Terms: ``ce``, ``discriminality``, ``diversity``.

    The mask of L_dis is drawn from torch's generator at every call in training, one for the whole batch. In evaluation
    all channels take part, so that the value does not depend on chance [assumption].

    Models: ``resnet18_mc`` and ``vgg16_mc`` have a last convolution with xi = 3 channels for each class; on a stock
    convolutional network the channels are divided among the classes, as the paper does with pretrained ones. The
    classifier is the ordinary linear one; the channels' scores are not used at inference.

    Cautions: its author recommends it for training from scratch, not for fine-tuning.

    Raises:
        UserError: fewer channels than classes, or a negative weight; when called, a feature map with other channels,
            without places (tokens), or with only one, where no channel can differ from another.
    """

    requires = ('logits', 'feature_map')
    head = 'mc'
    paper = 'MC-Loss, arXiv 2002.04264, weights of its official code'
    assumptions = (
        'the network: a 3x3 convolution without batch norm, average pooling and one linear layer, where the official '
        'one widens its last block and has max pooling, batch norm and two linear layers; which classes get one '
        'channel more, and their diversity; masking by -inf; no mask in evaluation'
    )
    search_space = {
        'discriminality_weight': Range(0.15, 15.0, log=True),
        'diversity_weight': Range(1.0, 100.0, log=True),
    }

    def __init__(
        self,
        num_classes: int,
        num_channels: int,
        discriminality_weight: float = 1.5,
        diversity_weight: float = 20.0,
    ):
        super().__init__()
        require(
            num_channels >= num_classes,
            f'MC-Loss needs a channel for each class, but there are {num_channels} for {num_classes} classes: '
            'use a model with the head mc, such as resnet18_mc.',
        )
        weights = (discriminality_weight, diversity_weight)
        require(min(weights) >= 0, f'The weights must not be negative, as in {weights}.')
        self.num_classes = num_classes
        self.num_channels = num_channels
        self.discriminality_weight = discriminality_weight
        self.diversity_weight = diversity_weight

    def compute_terms(self, outputs, target):
        """Return ``ce``, ``discriminality`` and ``diversity``."""
        maps = outputs.feature_map
        _check_map(maps, self.num_channels)
        keep = channel_mask(self.num_channels, self.num_classes, maps.device) if self.training else None
        discriminality = channel_discriminality(maps, target, self.num_classes, keep)
        return {
            'ce': cross_entropy(outputs.logits, target),
            'discriminality': self.discriminality_weight * discriminality,
            'diversity': self.diversity_weight * (1 - channel_diversity(maps, self.num_classes)),
        }


def _check_map(maps: Tensor, num_channels: int) -> None:
    shape = tuple(maps.shape)
    require(maps.ndim == 4, f'MC-Loss reads a feature map (N, C, H, W), not {shape}: use a convolutional network.')
    require(
        shape[1] == num_channels,
        f'MC-Loss was made for {num_channels} channels, and the feature map has {shape[1]}: make the loss anew.',
    )
    require(
        shape[2] * shape[3] > 1,
        f'MC-Loss compares places, and the feature map {shape} has one only: use larger images or small_input=True.',
    )
