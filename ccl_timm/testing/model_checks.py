"""The checks that every model passes."""

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import timm.models
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor

from ccl_timm import models
from ccl_timm._compat import TimmModel
from ccl_timm.models.adapters import registered_cfg
from ccl_timm.task import probe_outputs
from ccl_timm.testing.common import SEED, assert_close, different_state, run_checks

__all__ = ['MODEL_CHECKS', 'ModelCase', 'check_model', 'try_model']


@dataclass
class ModelCase:
    """A model under test, and how to make it. See :func:`check_model` for the fields."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    img_size: int | None = None

    def build(self, num_classes: int = 5, **kwargs: Any) -> TimmModel:
        """Make the model, in evaluation mode."""
        models.ensure_registered(self.name)
        if self.img_size and registered_cfg(self.name).fixed_input_size:
            kwargs['img_size'] = self.img_size
        torch.manual_seed(SEED)
        return models.create_model(self.name, num_classes=num_classes, **{**self.options, **kwargs}).eval()

    def images(self, model: TimmModel, batch: int = 2) -> Tensor:
        """Random images that the model takes."""
        channels, *size = model.pretrained_cfg['input_size']
        size = [self.img_size] * 2 if self.img_size else size
        return torch.randn(batch, self.options.get('in_chans', channels), *size)


def _class_tensors(model: TimmModel) -> tuple[str, ...]:
    """Prefixes of the tensors that the cfg names as shaped by the number of classes."""
    names = model.pretrained_cfg['classifier']
    return tuple(f'{name}.' for name in ([names] if isinstance(names, str) else names))


def cfg_is_complete(case: ModelCase) -> None:
    """``pretrained_cfg`` says what data and checkpoint tools need, and its layer names exist in the model."""
    model = case.build()
    cfg = model.pretrained_cfg
    for key in ('architecture', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'num_classes', 'classifier'):
        assert cfg.get(key) is not None, f"pretrained_cfg lacks '{key}'."
    assert cfg['architecture'] == case.name.partition('.')[0], (
        f"pretrained_cfg names the architecture '{cfg['architecture']}'."
    )
    assert len(cfg['mean']) == len(cfg['std']) == cfg['input_size'][0], 'mean, std and input_size differ in channels.'
    keys = model.state_dict().keys()
    first = cfg.get('first_conv') or ()
    for name in (*_class_tensors(model), *(f'{n}.' for n in ([first] if isinstance(first, str) else first))):
        assert any(key.startswith(name) for key in keys), f"pretrained_cfg names '{name[:-1]}', which has no tensors."


def seam_holds(case: ModelCase) -> None:
    """``model(x)`` is get_classifier() of forward_head(forward_features(x), pre_logits=True): one tensor, also in
    training; num_classes, num_features and head_hidden_size say the widths."""
    model = case.build()
    x = case.images(model)
    assert model.num_classes == 5, f'num_classes is {model.num_classes} for a model of 5.'
    with torch.no_grad():
        feature_map = model.forward_features(x)
        pooled = model.forward_head(feature_map, pre_logits=True)
        logits, whole = model.get_classifier()(pooled), model(x)
        trained = model.train()(x)
    assert pooled.shape == (2, model.head_hidden_size), (
        f'pre_logits are of shape {tuple(pooled.shape)}, head_hidden_size is {model.head_hidden_size}.'
    )
    channels = feature_map.shape[1] if feature_map.shape[1] == model.num_features else feature_map.shape[-1]
    assert channels == model.num_features, (
        f'forward_features gives {tuple(feature_map.shape)}, num_features is {model.num_features}.'
    )
    assert isinstance(trained, Tensor) and trained.shape == (2, 5), 'in training the model does not return one (N, K).'
    assert_close(whole, logits, 1e-5, 1e-5, 'logits of the model against those of its three parts')


def classes_can_change(case: ModelCase) -> None:
    """reset_classifier changes the tensors that the cfg names and no other; 0 classes give features, then any again."""
    model = case.build()
    x, by_class, kind = case.images(model), _class_tensors(model), type(model.get_classifier())
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(by_class)}
    model.reset_classifier(7)
    after = {k: v for k, v in model.state_dict().items() if not k.startswith(by_class)}
    differs = different_state(before, after)
    assert not differs, f"reset_classifier(7) changes '{differs}', which is not shaped by the classes."
    with torch.no_grad():
        logits = model(x)
        assert model.num_classes == 7 and logits.shape == (2, 7), f'7 classes give logits {tuple(logits.shape)}.'
        model.reset_classifier(0)
        none = case.build(num_classes=0)
        for each, how in ((model, 'reset to 0 classes'), (none, 'built with 0 classes')):
            out = each(x)
            assert each.num_classes == 0, f'num_classes is {each.num_classes} when {how}.'
            assert out.shape == (2, each.head_hidden_size), f'the output is of shape {tuple(out.shape)} when {how}.'
            each.reset_classifier(3)
            assert each(x).shape == (2, 3), f'3 classes give {tuple(each(x).shape)} after it was {how}.'
            assert type(each.get_classifier()) is kind, f'another head after {how}.'


def takes_one_channel(case: ModelCase) -> None:
    """``in_chans=1`` gives a model of grey images."""
    model = case.build(in_chans=1)
    with torch.no_grad():
        logits = model(case.images(model)[:, :1])
    assert logits.shape == (2, 5), f'a grey image gives logits of shape {tuple(logits.shape)}.'


def tools_are_there(case: ModelCase) -> None:
    """group_matcher covers every parameter, layer decay spares the head, no_weight_decay is a set of names."""
    model = case.build()
    names = dict(model.named_parameters()).keys()
    for coarse in (False, True):
        layers = timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        missing = sorted(names - layers.keys())
        assert not missing, f"group_matcher(coarse={coarse}) leaves out '{missing[0]}'." if missing else ''
        assert len(set(layers.values())) > 1, f'group_matcher(coarse={coarse}) puts everything into one layer.'
    keep = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else set()
    assert all(isinstance(name, str) for name in keep), f'no_weight_decay() must give names, it gives {keep!r}.'
    scales = {
        id(parameter): group['lr_scale']
        for group in create_optimizer_v2(model, 'sgd', layer_decay=0.5).param_groups
        for parameter in group['params']
    }
    assert min(scales.values()) < 1, 'layer decay scales down no layer.'
    for name, parameter in model.get_classifier().named_parameters():
        scale = scales.get(id(parameter), 1.0)
        assert scale == 1, f"layer decay scales the head's '{name}' by {scale}: it must be in the last layer."


def checkpointing_is_exact(case: ModelCase) -> None:
    """set_grad_checkpointing changes neither logits nor gradients in training."""
    model = case.build().train()
    x = case.images(model, batch=4)
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def run(checkpointing: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(SEED)  # of dropout
        logits = model(x)
        return logits, torch.autograd.grad(logits.logsumexp(1).sum(), list(wanted.values()))

    expected, gradients = run(False)
    try:
        logits, checkpointed = run(True)
    except AssertionError:
        return  # timm's way to say that the architecture has none
    assert_close(logits, expected, 1e-5, 1e-5, 'logits with gradient checkpointing')
    for name, a, b in zip(wanted, checkpointed, gradients, strict=True):
        assert_close(a, b, 1e-4, 1e-5, f"the gradient on '{name}' with gradient checkpointing")


def memory_formats_agree(case: ModelCase) -> None:
    """Channels-last weights and images give the same logits."""
    model = case.build()
    x = case.images(model)
    with torch.no_grad():
        expected = model(x)
        actual = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert_close(actual, expected, 1e-4, 1e-4, 'logits with channels last')


def builds_on_meta(case: ModelCase) -> None:
    """``device='meta'`` gives a model without storage: its parameters are counted in no time."""
    for name, parameter in case.build(device='meta').named_parameters():
        assert parameter.is_meta, f"'{name}' is on {parameter.device}."


def copies_are_equal(case: ModelCase) -> None:
    """copy.deepcopy, pickle and timm's EMA give a model with the same tensors and logits, whose classes can change."""
    model = case.build()
    x = case.images(model)
    with torch.no_grad():
        expected = model(x)
        copies = {
            'deepcopy': copy.deepcopy(model),
            'pickle': pickle.loads(pickle.dumps(model)),
            'ModelEmaV3': ModelEmaV3(model).module,
        }
        for how, other in copies.items():
            assert_close(other(x), expected, 0, 0, f'logits after {how}')
            other.reset_classifier(3)
            assert other(x).shape == (2, 3), f'after {how}, reset_classifier(3) gives {tuple(other(x).shape)}.'
        assert_close(model(x), expected, 0, 0, 'logits after its copies were changed')


def saved_is_equal(case: ModelCase) -> None:
    """Saved as the Hub wants it (safetensors and config.json), ``local-dir:`` gives back the same model."""
    model = case.build()
    x = case.images(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        timm.models.save_for_hf(model, folder, safe_serialization=True)
        other = models.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert type(other) is type(model), f'it comes back as {type(other).__name__}, not {type(model).__name__}.'
        differs = different_state(model.state_dict(), other.state_dict())
        assert not differs, f"the tensor '{differs}' does not come back as it was saved."
        assert_close(other(x), model(x), 1e-6, 1e-6, 'logits of the loaded model')


def gradients_reach_all(case: ModelCase) -> None:
    """Every parameter that asks for a gradient gets a finite one, and nothing fixed is among the parameters."""
    model = case.build().train()
    model(case.images(model, batch=4)).logsumexp(1).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"no gradient reaches '{name}'."
            assert parameter.grad.isfinite().all(), f"the gradient on '{name}' is not finite."


def scripted_is_equal(case: ModelCase) -> None:
    """torch.jit.script of the model gives the same logits."""
    model = case.build(scriptable=True)
    x = case.images(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # recent versions of torch deprecate torch.jit
        scripted: Any = torch.jit.script(model)
        assert_close(scripted(x), model(x), 1e-4, 1e-5, 'logits of the scripted model')


MODEL_CHECKS: tuple[Callable[[ModelCase], None], ...] = (
    cfg_is_complete,
    seam_holds,
    classes_can_change,
    takes_one_channel,
    tools_are_there,
    memory_formats_agree,
    builds_on_meta,
    copies_are_equal,
    saved_is_equal,
    gradients_reach_all,
    checkpointing_is_exact,
    scripted_is_equal,
)


def check_model(
    model_name: str,
    *,
    img_size: int | None = None,
    checks: Iterable[Callable[[ModelCase], None]] = MODEL_CHECKS,
    **model_kwargs: Any,
) -> None:
    """Run all checks of a model (``MODEL_CHECKS``), one after another: the contract of timm's models, and its tools.

    Args:
        model_name: a name that :func:`ccl_timm.create_model` knows.
        img_size: side of the test images, smaller than the model's own to save time; also given to the model where
            its architecture fixes it (vision transformers).
        checks: some of ``MODEL_CHECKS``, to leave others out.
        **model_kwargs: options of the model.

    Raises:
        AssertionError: names the model, the check, and the values.

    Example::

        def test_my_model():
            check_model('my_model', img_size=64)
    """
    run_checks(f"model '{model_name}'", ModelCase(model_name, model_kwargs, img_size), checks)


def try_model(name: str) -> None:
    """Build a model by name without storage, and compute its shapes as a training task does.

    What ``ccl-timm plugins --check`` asks of every plug-in's model; :func:`check_model` asks for much more.

    Raises:
        UserError: the model does not follow timm's three calls, see :func:`ccl_timm.task.probe_outputs`.
    """
    probe_outputs(models.create_model(name, num_classes=5, device='meta'))
