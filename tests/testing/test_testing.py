"""The testers fail when they should: each check meets a loss or model that is broken in just its way."""

import os
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ccl_timm.heads import list_heads
from ccl_timm.losses import Loss, Range
from ccl_timm.models import register_variant
from ccl_timm.testing import LOSS_CHECKS, MODEL_CHECKS, ModelCase, check_loss, check_model, make_outputs, make_target


class Good(Loss):
    """Cross-entropy plus the squared distance of features to their running mean."""

    requires = ('logits', 'features')

    def __init__(self, num_features: int, weight: float = 0.1):
        super().__init__()
        self.weight = weight
        self.register_buffer('mean', torch.zeros(num_features))

    def advance(self, features):
        if self.training and torch.is_grad_enabled():
            # a new tensor: torch.compile (2.15) recomputes in the backward pass from what the forward pass overwrote
            self.mean = self.mean.lerp(features.detach().mean(0), 0.1)

    def far(self, features):
        return (features - self.mean).square().sum(1).mean()

    def compute_terms(self, outputs, target):
        far = self.far(outputs.features)
        self.advance(outputs.features)
        return {'ce': F.cross_entropy(outputs.logits, target), 'far': self.weight * far}


def reference(outputs, target, loss, weight=0.1):
    total = 0
    for z, f, y in zip(outputs.logits, outputs.features, target, strict=True):
        total = total - z.log_softmax(0)[y] + weight * sum((a - b) ** 2 for a, b in zip(f, loss.mean, strict=True))
    return total / len(target)


# --- broken losses: one for each way ---------------------------------------------------------------------------------


class WrongSign(Good):
    def compute_terms(self, outputs, target):
        terms = super().compute_terms(outputs, target)
        return {'ce': terms['ce'], 'far': -terms['far']}


class SearchesBeyond(Good):
    search_space = {'weight': Range(0.1, 1.0), 'wieght': Range(0.1, 1.0)}


class MissingFactor(Good):
    def compute_terms(self, outputs, target):
        terms = super().compute_terms(outputs, target)
        return {'ce': terms['ce'], 'far': terms['far'] / self.weight}


class Detached(Good):
    def far(self, features):
        return (features * features.detach()).sum(1).mean() + super().far(features).detach() * 0


class NanAtOne(Good):
    uses_batch_statistics = True

    def far(self, features):
        return features.std(0).square().sum()


class Overflows(Good):
    def compute_terms(self, outputs, target):
        terms = super().compute_terms(outputs, target)
        z = outputs.logits
        return {**terms, 'ce': (z.exp().sum(1).log() - z.gather(1, target[:, None])[:, 0]).mean()}


class RootAtZero(Good):
    def far(self, features):
        return features.square().sum(1).sqrt().mean() + 0 * self.mean.sum()


class MovesInEvaluation(Good):
    def advance(self, features):
        if torch.is_grad_enabled():
            self.mean = self.mean.lerp(features.detach().mean(0), 0.1)


class DrawsInEvaluation(Good):
    def far(self, features):
        return super().far(features) + torch.rand(())


class MovesWithoutGradient(Good):
    def advance(self, features):
        if self.training:
            self.mean = self.mean.lerp(features.detach().mean(0), 0.1)


class FalselySoft(Good):
    soft_targets = True

    def compute_terms(self, outputs, target):
        return super().compute_terms(outputs, target.float().mean(1).long() if target.ndim == 2 else target)


class SecretlySoft(Good):
    def _checked(self, target, read):
        return target


class FalselyAlone(Good):
    def far(self, features):
        return features.var(0, correction=0).sum() + 0 * self.mean.sum()


class FalselyTogether(Good):
    uses_batch_statistics = True


class ReadsInVain(Good):
    requires = ('logits', 'features', 'attention')


class ReadsInSecret(Good):
    def compute_terms(self, outputs, target):
        return {**super().compute_terms(outputs, target), 'secret': outputs.attention.sum()}


class UnknownHead(Good):
    head = 'none_such'


class LooseOptions(Good):
    def __init__(self, num_features: int, **options):
        super().__init__(num_features)


class VectorTerm(Good):
    def compute_terms(self, outputs, target):
        return {'ce': F.cross_entropy(outputs.logits, target, reduction='none')}


class HiddenTerm(Good):
    def forward(self, outputs, target):
        return super().forward(outputs, target) + outputs.logits.square().mean()


class HalfPrecision(Good):
    def loss_dict(self, outputs, target):
        target = self._checked(target, {'logits': outputs.logits})
        far = (outputs.features - self.mean.to(outputs.features.dtype)).square().sum(1).mean()
        self.advance(outputs.features.to(self.mean.dtype))
        return {'ce': F.cross_entropy(outputs.logits, target), 'far': far}


class Unseeded(Good):
    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.mean += int.from_bytes(os.urandom(3), 'big')


class Forgets(Good):
    """Its state is no buffer."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.steps = 1

    def advance(self, features):
        self.steps += 1

    def far(self, features):
        return super().far(features) / self.steps


class HoldsGraph(Good):
    def advance(self, features):
        self.mean = 0.9 * self.mean + 0.1 * features.mean(0)


class CompilesToAnother(Good):
    def far(self, features):
        return super().far(features) * (2 if torch.compiler.is_compiling() else 1)


class Ascends(Good):
    """Its value is right, its gradient turned round."""

    def compute_terms(self, outputs, target):
        return {name: 2 * term.detach() - term for name, term in super().compute_terms(outputs, target).items()}


BROKEN_LOSSES = [
    (WrongSign, 'equals_reference', 'value against the reference, 8 samples, 5 classes: .* instead of'),
    (MissingFactor, 'equals_reference', 'value against the reference'),
    (Detached, 'gradient_is_the_derivative', 'not the derivative'),
    (NanAtOne, 'hard_batches_are_finite', 'a batch of one.*: the value is nan'),
    (Overflows, 'hard_batches_are_finite', 'rows of 1e4.*: the value is (inf|nan)'),
    (RootAtZero, 'hard_batches_are_finite', 'zero rows.*: the gradient on features has 48 of 48 entries'),
    (MovesInEvaluation, 'evaluation_keeps_state', "evaluation mode changes the state 'mean'"),
    (DrawsInEvaluation, 'evaluation_keeps_state', 'depends on random numbers'),
    (MovesWithoutGradient, 'evaluation_keeps_state', "without gradient changes the state 'mean'"),
    (FalselySoft, 'soft_targets_are_declared', 'value with one-hot probabilities'),
    (SecretlySoft, 'soft_targets_are_declared', 'not refused with a UserError'),
    (FalselyAlone, 'batch_statistics_are_declared', 'is False, but samples do interact'),
    (FalselyTogether, 'batch_statistics_are_declared', 'is True, but samples do not interact'),
    (ReadsInVain, 'reads_what_it_declares', "names 'attention', but neither"),
    (ReadsInSecret, 'reads_what_it_declares', "no attribute 'attention'"),
    (UnknownHead, 'facts_are_declared', "head 'none_such' is none of"),
    (SearchesBeyond, 'search_space_can_be_tried', "'wieght' from 0.1 to 1.0, and 0.1: "),
    (LooseOptions, 'facts_are_declared', r'it takes \*options'),
    (VectorTerm, 'terms_add_up', r"'ce' has the shape \(8,\): take its mean"),
    (HiddenTerm, 'terms_add_up', 'against the sum of its terms'),
    (HalfPrecision, 'half_precision_is_close', 'the value is of type torch.float16'),
    (Unseeded, 'seed_decides', "'mean' of a new loss differs"),
    (Forgets, 'state_is_saved', 'value after loading'),
    (HoldsGraph, 'state_is_saved', "'mean' holds a graph"),
    (CompilesToAnother, 'compiled_is_equal', 'compiled value at step 0'),
    (Ascends, 'trains_in_a_task', 'training does not lower it'),
]


def named(name):
    return next(check for check in LOSS_CHECKS if check.__name__ == name)


def test_good_loss_passes():
    check_loss(Good, reference)
    check_loss(Good, lambda *args: reference(*args, weight=0.5), weight=0.5, checks=[named('equals_reference')])


@pytest.mark.filterwarnings('ignore:std')
@pytest.mark.parametrize(('loss', 'check', 'words'), BROKEN_LOSSES, ids=[row[0].__name__ for row in BROKEN_LOSSES])
def test_broken_loss_is_found(loss, check, words):
    with pytest.raises(AssertionError, match=f"(?s)^loss '{loss.__name__}', {check}: .*{words}"):
        check_loss(loss, reference, checks=[named(check)])


def test_the_reference_finds_a_detached_gradient():
    """The value is right, the gradient is not."""

    class HalfGradient(Good):
        def far(self, features):
            far = super().far(features)
            return (far + far.detach()) / 2

    with pytest.raises(AssertionError, match='equals_reference: gradient on features'):
        check_loss(HalfGradient, reference, checks=[named('equals_reference')])


def test_every_check_of_a_loss_can_fail():
    assert {check for _, check, _ in BROKEN_LOSSES} == {check.__name__ for check in LOSS_CHECKS}


def test_an_error_inside_is_named_too():
    class Raises(Good):
        def compute_terms(self, outputs, target):
            raise ZeroDivisionError('float division by zero')

    with pytest.raises(
        AssertionError, match="loss 'Raises', reads_what_it_declares: ZeroDivisionError: float division"
    ):
        check_loss(Raises)


# --- a plugin's own head and tensors ---------------------------------------------------------------------------------


class EmbeddingOutputs(NamedTuple):
    """Outputs of a head with a tensor of its own."""

    logits: torch.Tensor
    features: torch.Tensor
    feature_map: torch.Tensor | None = None
    embedding: torch.Tensor | None = None


class Pull(Loss):
    """Reads a tensor that only its own head gives out."""

    requires = ('logits', 'embedding')
    head = 'pull'

    def compute_terms(self, outputs, target):
        return {'ce': F.cross_entropy(outputs.logits, target), 'pull': 0.01 * outputs.embedding.square().mean()}


class PullHead(nn.Linear):
    def outputs(self, pooled):
        return EmbeddingOutputs(super().forward(pooled), pooled, embedding=pooled)


def own(batch, num_classes, num_features):
    return {'embedding': torch.randn(batch, num_features)}


def test_tensors_of_a_plugin():
    with pytest.raises(AssertionError, match="head 'pull' is none of .*: give a model="):
        check_loss(Pull)
    with pytest.raises(AssertionError, match="nothing is known of the tensor 'embedding': give a factory"):
        check_loss(Pull, checks=LOSS_CHECKS[1:])
    check_loss(Pull, lambda o, y, loss: F.cross_entropy(o.logits, y) + o.embedding.square().mean() / 100, outputs=own)


def test_model_of_a_plugin():
    model = timm.create_model('test_resnet', num_classes=5)
    model.fc = PullHead(model.num_features, 5)
    check_loss(Pull, outputs=own, model=model, checks=[named('trains_in_a_task')])


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_outputs_agree_with_each_other():
    outputs = make_outputs(('cosine', 'features', 'weight', 'attention', 'feature_map'), batch=4, num_classes=3)
    expected = F.cosine_similarity(outputs.features[:, None], outputs.weight[None], dim=-1)
    torch.testing.assert_close(outputs.cosine, expected)
    torch.testing.assert_close(outputs.weight.norm(dim=1), torch.ones(3).double())
    assert outputs.feature_map.shape == (4, 9, 3, 3)
    assert outputs.feature_map.min() >= 0 < outputs.attention.min() <= outputs.attention.max() < 1
    assert set(outputs.leaves) == {'attention', 'feature_map', 'features', 'weight'}
    (outputs.cosine.sum() + outputs.weight.sum()).backward()
    assert all(outputs.leaves[name].grad.abs().sum() > 0 for name in ('features', 'weight'))


def test_centroids_are_fixed():
    outputs = make_outputs(('cosine', 'centroids'))
    assert set(outputs.leaves) == {'features'}
    assert not outputs.centroids.requires_grad
    torch.testing.assert_close(outputs.cosine, F.normalize(outputs.features, dim=1) @ outputs.centroids.T)


def test_outputs_follow_seed_and_type():
    first, again, other = (make_outputs('cc', seed=seed, dtype=torch.float32) for seed in (0, 0, 1))
    assert torch.equal(first.logits, again.logits) and not torch.equal(first.logits, other.logits)
    assert first.logits.dtype == first.attention.dtype == torch.float32


def test_targets():
    target = make_target(8, 5)
    assert sorted(target.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]  # pairs of one class, of two, and an absent class
    soft = make_target(8, 5, soft=True)
    torch.testing.assert_close(soft.sum(1), torch.ones(8).double())
    assert soft.min() > 0 and soft.max() < 1
    assert set(make_target(6, 2).tolist()) == {0, 1}


# --- broken models ---------------------------------------------------------------------------------------------------

# test_resnet with the head: a model small enough for many checks
CAM = register_variant('test_resnet', 'cam').__name__


def no_mean(model):
    model.pretrained_cfg = {**model.pretrained_cfg, 'mean': None}


def tuple_in_training(model):
    plain = model.forward
    model.forward = lambda x: (plain(x), None) if model.training else plain(x)


def another_path(model):
    plain = model.forward
    model.forward = lambda x: 2 * plain(x)


def forgets_head(model):
    plain = model.reset_classifier

    def reset(num_classes, global_pool=None):
        plain(0)
        plain(num_classes, global_pool)

    model.reset_classifier = reset


def colour_only(model):
    plain = model.forward_features
    model.forward_features = lambda x: plain(x.expand(-1, 3, -1, -1))


def matches_nothing(model):
    model.group_matcher = lambda coarse=False: {'stem': '.*'}


def decays_the_head(model):
    plain = model.group_matcher
    model.group_matcher = lambda coarse=False: {**plain(coarse), 'stem': '^conv1|bn1|fc'}


def counts_strides(model):
    plain = model.forward
    model.forward = lambda x: plain(x) * (1 if x.is_contiguous() else 2)


def needs_storage(model):
    model.to_empty(device='cpu')


def forgets_an_activation(model):
    model.set_grad_checkpointing = lambda enable=True: setattr(model, 'act1', nn.Identity() if enable else nn.ReLU())


def no_pickle(model):
    model.secret = lambda: None


def renames(model):
    model.state_dict = lambda *args, **kwargs: {f'x.{k}': v for k, v in type(model).state_dict(model).items()}


def unused_parameter(model):
    model.lonely = nn.Parameter(torch.zeros(1))


def not_scriptable(model):
    class Odd(nn.Module):
        def forward(self, x):
            return sum(x for _ in [0] for x in [x])

    model.act1 = nn.Sequential(model.act1, Odd())


BROKEN_MODELS = [
    (no_mean, 'cfg_is_complete', "lacks 'mean'"),
    (tuple_in_training, 'seam_holds', 'in training the model does not return one'),
    (another_path, 'seam_holds', 'against those of its three parts'),
    (forgets_head, 'classes_can_change', "changes 'fc.hidden.weight'"),
    (colour_only, 'takes_one_channel', 'RuntimeError'),
    (matches_nothing, 'tools_are_there', 'everything into one layer'),
    (decays_the_head, 'tools_are_there', "layer decay scales the head's 'hidden.weight' by"),
    (counts_strides, 'memory_formats_agree', 'logits with channels last'),
    (needs_storage, 'builds_on_meta', 'is on cpu'),
    (no_pickle, 'copies_are_equal', 'pickle'),
    (renames, 'saved_is_equal', 'does not fit'),
    (unused_parameter, 'gradients_reach_all', "no gradient reaches 'lonely'"),
    (forgets_an_activation, 'checkpointing_is_exact', 'with gradient checkpointing'),
    (not_scriptable, 'scripted_is_equal', ''),
]


@pytest.mark.parametrize(('spoil', 'check', 'words'), BROKEN_MODELS, ids=[row[0].__name__ for row in BROKEN_MODELS])
def test_broken_model_is_found(spoil, check, words, monkeypatch):
    plain = ModelCase.build

    def build(self, *args, **kwargs):
        model = plain(self, *args, **kwargs)
        spoil(model)
        return model

    monkeypatch.setattr(ModelCase, 'build', build)
    with pytest.raises(AssertionError, match=f"(?s)^model '{CAM}', {check}: .*{words}"):
        check_model(CAM, img_size=64, checks=[c for c in MODEL_CHECKS if c.__name__ == check])


def test_every_check_of_a_model_can_fail():
    assert {check for _, check, _ in BROKEN_MODELS} == {check.__name__ for check in MODEL_CHECKS}


@pytest.mark.parametrize(('name', 'options'), [(CAM, {'hidden_features': 3}), ('test_resnet', {})])
def test_good_model_passes(name, options):
    check_model(name, img_size=64, **options)


@pytest.mark.parametrize('head', list_heads())
def test_models_of_every_head_pass(head):
    check_model(register_variant('test_resnet', head).__name__, img_size=64)


def test_good_transformer_passes():
    """Its architecture fixes the size of images, so that it is told of the smaller one."""
    check_model(register_variant('test_vit', 'cam').__name__, img_size=32)
