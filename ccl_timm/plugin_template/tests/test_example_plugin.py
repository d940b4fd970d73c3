"""What ccl-timm's own losses and models pass, and values known from elsewhere. Run after ``pip install -e .``.

``check_loss`` compares with a formula that is written in another way, in value and gradient, and looks at AMP, compile,
hard batches, saved state and a step of training; ``check_model`` looks at what timm's tools expect of a model.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical

import ccl_timm
from ccl_timm.testing import check_loss, check_model


def reference(outputs, target, loss):
    certainty = torch.stack([-Categorical(logits=row).entropy() for row in outputs.logits])
    soft = F.one_hot(target, outputs.logits.shape[1]) if target.ndim == 1 else target
    return (loss.weight * certainty - (soft * outputs.logits.log_softmax(1)).sum(1)).mean()


def test_loss():
    check_loss('example_plugin_loss', reference, weight=0.5)


def test_loss_without_weight_is_cross_entropy():
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    loss = ccl_timm.create_loss('example_plugin_loss', weight=0.0)
    torch.testing.assert_close(loss(SimpleNamespace(logits=logits), target), F.cross_entropy(logits, target))


def test_loss_of_equal_logits():
    # over 4 classes cross-entropy and entropy are both log 4
    loss = ccl_timm.create_loss('example_plugin_loss', weight=0.25)
    value = loss(SimpleNamespace(logits=torch.zeros(3, 4)), torch.tensor([0, 1, 2]))
    assert value.item() == pytest.approx(0.75 * math.log(4))


def test_negative_weight_is_refused():
    with pytest.raises(ccl_timm.UserError, match='weight is -1, it must be >= 0'):
        ccl_timm.create_loss('example_plugin_loss', weight=-1)


def test_model():
    check_model('example_plugin_net', img_size=64)


def test_head_on_any_backbone():
    check_model('test_resnet_example_plugin_head', img_size=32)


def test_features_have_one_length():
    head = ccl_timm.create_model('test_resnet_example_plugin_head', num_classes=3, scale=4.0).get_classifier()
    assert head.outputs(torch.randn(5, head.in_features)).features.norm(dim=1).tolist() == pytest.approx([4.0] * 5)
