"""Checks that every loss and every model must pass: ours, and a plugin's in three lines of its own tests.

A loss with the formula written once more, in another way (loops over samples are fine), and a model::

    from ccl_timm.testing import check_loss, check_model

    def test_my_loss():
        check_loss('my_loss', reference=lambda outputs, target, loss: slow_but_simple(outputs.features, target))

    def test_my_model():
        check_model('my_model', img_size=64)

The lists ``LOSS_CHECKS`` and ``MODEL_CHECKS`` say what is checked; each entry is a function with a sentence of its own.
Failures are AssertionErrors that name the loss or model, the check, and the values.
"""

from ccl_timm.testing.inputs import make_outputs, make_target
from ccl_timm.testing.loss_checks import LOSS_CHECKS, LossCase, check_loss, try_loss
from ccl_timm.testing.model_checks import MODEL_CHECKS, ModelCase, check_model, try_model

__all__ = [
    'LOSS_CHECKS',
    'MODEL_CHECKS',
    'LossCase',
    'ModelCase',
    'check_loss',
    'check_model',
    'make_outputs',
    'make_target',
    'try_loss',
    'try_model',
]
