"""The classifier of the margin losses: cosines between features and learnt class vectors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ccl_timm.heads.base import Head, HeadOutputs, require_positive, transformers_initializes
from ccl_timm.ops import l2_normalize, outside_autocast

__all__ = ['CosineHead', 'cosine_logits']

_ONE_DIRECTION = 0.75  # mean cosine of class vectors; lost runs ended at 0.90 to 0.97, good ones at -0.10 to 0.28

torch.fx.wrap('cosine_logits')  # one node of a traced graph: it asks for dtype and device


def cosine_logits(features: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of features (N, D) with class vectors (K, D), and the vectors divided by their norm.

    In float32 (float64 for float64 features) even under autocast: half precision distinguishes cosines to 1e-3 only,
    which a scale of 64 makes 0.06.

    Returns:
        (N, K) in [-1, 1] up to rounding, 0 for a zero row; (K, D).
    """
    if torch.jit.is_scripting():
        return _cosine_logits(features, vectors)
    else:
        with outside_autocast(features.device):
            return _cosine_logits(features, vectors)


def _cosine_logits(features: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    unit_vectors = l2_normalize(vectors.to(dtype))
    return l2_normalize(features.to(dtype)) @ unit_vectors.T, unit_vectors


class CosineHead(Head):
    """Logits are cosines times a scale; no bias, and no margin, which belongs to the loss.

    For A-Softmax, AM-Softmax, ArcFace, CM, ICAL and FICAL.

    Args:
        in_features: width of the pooled features.
        num_classes: K.
        feature_dim: width D of an embedding before the cosines, a linear layer and batch norm, with which ArcFace's
            networks end, too (arXiv 1801.07698); None for none. Pooled features follow a ReLU and have much in common,
            and an angular margin costs least at an angle of 0, so that training can draw all classes to that common
            direction (it did in one of our runs, see hub_cards/results). Batch norm takes it off, without a weight and
            a bias of its own [our choice]. In training, it needs two images in a batch.
        scale: of the logits that the model returns. ``create_task`` puts that of the loss in its place; it is saved
            with the weights. Losses read the cosines, which have no scale.
        normalize_features: False for logits ``||f|| * cosine``, as A-Softmax, ICAL and FICAL train them. Classes come
            out the same, only their probabilities differ.

    Outputs are float32 whatever the model's type is (float64 in a float64 model). The class vectors start as random
    directions of about unit length [assumption; their length changes nothing but how fast the optimizer turns them].
    """

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        feature_dim: int | None = None,
        scale: float = 30.0,
        normalize_features: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        require_positive(feature_dim=feature_dim, scale=scale)
        self.in_features = in_features
        self.normalize_features = normalize_features
        factory = {'device': device, 'dtype': dtype}
        self.embedding: nn.Module = nn.Identity()
        if feature_dim:
            linear = nn.Linear(in_features, feature_dim, bias=False, **factory)
            self.embedding = nn.Sequential(linear, nn.BatchNorm1d(feature_dim, affine=False, **factory))
        self.weight = nn.Parameter(torch.empty(num_classes, feature_dim or in_features, **factory))
        self.initial_scale = float(scale)
        self.register_buffer('scale', torch.tensor(self.initial_scale, device=device))
        self._init_weight()

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The width of the embedding, if there is one."""
        return {'feature_dim': len(state['embedding.0.weight'])} if 'embedding.0.weight' in state else {}

    def reset(self, num_classes: int) -> None:
        """Replace the class vectors, keep the scale."""
        self.weight = nn.Parameter(self.weight.new_empty(num_classes, self.weight.shape[1]))
        self._init_weight()

    def init_non_persistent_buffers(self) -> None:
        """Initialise the class vectors and the scale; transformers lets torch.nn.init pass over what it has loaded."""
        if transformers_initializes():
            self._init_weight()
            nn.init.constant_(self.scale, self.initial_scale)

    def _init_weight(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def caution(self) -> str | None:
        """That all class vectors point in nearly one direction, and what keeps them apart."""
        cosine = _mean_cosine(self.weight.detach())
        if cosine < _ONE_DIRECTION:
            return None
        return (
            f'the class vectors point in nearly one direction, with a mean cosine of {cosine:.2f} to each other. An '
            'angular margin (arcface, cm) costs least there, so that the loss can fall without telling classes apart: '
            'a lower --lr, a smaller margin or --loss amsoftmax keeps them apart.'
        )

    def outputs(self, pooled: Tensor) -> HeadOutputs:
        """Pooled features (N, in_features) to logits (N, K), features (N, D), cosine (N, K), weight (K, D).

        The weight is the class vectors divided by their norm.
        """
        features = self.embedding(pooled)
        cosine, weight = cosine_logits(features, self.weight)
        if self.normalize_features:
            logits = self.scale.to(cosine.dtype) * cosine
        else:
            logits = torch.linalg.vector_norm(features.to(cosine.dtype), dim=1, keepdim=True) * cosine
        return HeadOutputs(logits, features, cosine=cosine, weight=weight)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (N, in_features) to logits (N, K)."""
        return self.outputs(pooled).logits


def _mean_cosine(vectors: Tensor) -> float:
    """Mean cosine of all pairs of rows (K, D); 0 for a single row."""
    count = len(vectors)
    total = l2_normalize(vectors.float()).sum(0).square().sum()  # of all K x K cosines
    return float((total - count) / max(count * (count - 1), 1))
