"""Model and loss as one trainable module, in a plain loop and as timm's scripts drive it."""

import copy

import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import ccl_timm
from ccl_timm import losses
from ccl_timm.losses import Loss, list_losses, loss_class, takes_soft_targets
from ccl_timm.task import ModelWithLoss, probe_outputs
from ccl_timm.testing import LossCase


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ccl_timm.create_model('resnet18_cam', num_classes=4)


@pytest.fixture
def batch():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


class Recorder(Loss):
    """Remembers what it is told."""

    def __init__(self):
        super().__init__()
        self.told = []
        self.register_buffer('seen', torch.zeros(()))

    def compute_terms(self, outputs, target):
        self.seen += 1
        return {'ce': nn.functional.cross_entropy(outputs.logits, target)}

    def set_epoch(self, epoch):
        self.told.append(('epoch', epoch))

    def set_step(self, step):
        self.told.append(('step', step))


def test_plain_loop_learns_a_batch(model, batch):
    task = ccl_timm.create_task(model, 'cc')
    optimizer = torch.optim.SGD(task.parameters(), lr=0.05, momentum=0.9)
    values = []
    for _ in range(12):
        result = task(*batch)
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(result['loss'].item())
    assert values[-1] < 0.5 * values[0]
    assert task.get_eval_model() is model


def test_result_has_logits_and_terms_that_sum_to_the_loss(model, batch):
    result = ccl_timm.create_task(model, 'cc', weight=2.0)(*batch)
    assert result['output'].shape == (8, 4)
    assert torch.isclose(result['loss'], result['ce'] + result['cc'])
    assert not result['cc'].requires_grad


def test_loss_without_the_head_it_needs_names_what_to_use():
    with pytest.raises(ccl_timm.UserError) as caught:
        ccl_timm.create_task(timm.create_model('resnet18', num_classes=4), 'cc')
    assert str(caught.value) == "loss 'cc' requires attention; resnet18 has a linear classifier: use resnet18_cam."


def test_a_head_that_only_a_plugin_has_suggests_no_model_that_does_not_exist(model):
    loss = Recorder()
    loss.requires, loss.head = ('gate',), 'gated'
    with pytest.raises(ccl_timm.UserError, match='requires gate; resnet18_cam .*: use a model whose head outputs it'):
        ccl_timm.create_task(model, loss)


def test_a_model_that_is_not_timms_is_shown_the_head_and_the_loss(batch):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))
    with pytest.raises(ccl_timm.UserError, match=r"'Sequential' is no timm model: .*CAMHead\(.*head.outputs\(pooled\)"):
        ccl_timm.create_task(network, 'cc')
    head = ccl_timm.heads.CAMHead(3072, 4)  # what the message says
    ccl_timm.create_loss('cc')(head.outputs(batch[0].flatten(1)), batch[1]).backward()
    assert head.out.weight.grad.any()


def test_models_with_several_heads_are_refused():
    with pytest.raises(ccl_timm.UserError, match="'deit_tiny_distilled_patch16_224' cannot be trained"):
        ccl_timm.create_task(timm.create_model('deit_tiny_distilled_patch16_224', num_classes=4), 'ce')


def test_options_of_a_built_loss_are_refused(model):
    with pytest.raises(ccl_timm.UserError, match='is built already'):
        ccl_timm.create_task(model, ccl_timm.create_loss('cc'), weight=2.0)


def test_timms_own_losses_come_by_the_same_way(model, batch):
    task = ccl_timm.create_task(model, 'ce', smoothing=0.1)
    expected = nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)
    assert torch.isclose(task(*batch)['loss'], expected, rtol=1e-4)


@pytest.mark.parametrize('options', [{}, {'smoothing': 0.1}, {'class_weight': [1.0, 2.0, 3.0, 4.0]}], ids=str)
def test_ce_takes_class_probabilities_whatever_its_options(options, model, batch):
    task = ccl_timm.create_task(model, 'ce', **options)
    rows = torch.eye(4)[batch[1]]
    expected = nn.functional.cross_entropy(
        model(batch[0]), batch[1], torch.tensor(options.get('class_weight', [1.0] * 4))
    )
    assert torch.isclose(task(batch[0], rows)['loss'], expected, rtol=1e-4)


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('ce', {'smoothing': 1.0}, 'smoothing must be at least 0 and below 1, not 1.0'),
        ('ce', {'smoothing': -0.1}, 'smoothing must be at least 0 and below 1, not -0.1'),
        ('ce', {'bce_sum': True}, 'only apply to the bce loss'),
        ('poly', {'smoothing': 1.0}, "'poly' cannot be built with"),
    ],
)
def test_options_of_timms_losses_are_checked(name, options, message):
    with pytest.raises(ccl_timm.UserError, match=message):
        ccl_timm.create_loss(name, **options)


def test_asl_takes_no_class_probabilities(model, batch):
    assert not takes_soft_targets('asl') and takes_soft_targets('ce') and takes_soft_targets('poly')
    with pytest.raises(ccl_timm.UserError, match='class indices'):
        ccl_timm.create_task(model, 'asl')(batch[0], torch.eye(4)[batch[1]])


def test_weights_of_a_diverged_run_are_named(model):
    nn.init.constant_(model.conv1.weight, float('nan'))
    with pytest.raises(ccl_timm.UserError, match='its logits are NaN, perhaps from weights of a run that diverged'):
        ccl_timm.create_task(model, 'cc')


def test_outputs_of_another_head_are_refused(batch):
    outputs = ccl_timm.heads.LinearHead(3072, 4).outputs(batch[0].flatten(1))
    with pytest.raises(ccl_timm.UserError, match="CCLoss requires 'attention', .* take those of the head 'cam'"):
        ccl_timm.create_loss('cc')(outputs, batch[1])


def test_a_dry_run_leaves_the_detection_of_epochs_alone(model, batch):
    task = ccl_timm.create_task(model, Recorder())
    task.train()
    task.dry_run_forward((3, 32, 32))
    assert task.training and model.training
    for _ in range(2):
        task(*batch)
    task.train()
    assert task.loss.told[-1] == ('epoch', 1)


def test_probe_leaves_model_and_random_state_alone(model):
    model.train()
    model.layer1.eval()
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    found = probe_outputs(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert model.training and not model.layer1.training and not model.layer1[0].training
    assert {'logits', 'features', 'attention', 'weight', 'feature_map'} == set(found)


def test_epochs_are_detected_and_steps_counted_in_a_plain_loop(model, batch):
    task = ccl_timm.create_task(model, Recorder())
    trainable = task.get_trainable_module()
    trainable.train()  # before any step: still the first epoch
    for _ in range(2):
        task(*batch)
    trainable.eval()
    task(*batch)  # evaluation counts nothing
    trainable.train()
    task(*batch)
    assert task.loss.told == [('step', 1), ('step', 2), ('epoch', 1), ('step', 3)]


def test_steps_are_those_of_the_optimizer_where_a_script_counts_them(model, batch):
    task = ccl_timm.create_task(model, Recorder())
    task.set_num_updates()
    for step in (1, 2):
        task(*batch)
        task(*batch)  # gradient accumulation
        task.update_ema(step=step)
    assert task.loss.told == [('step', 0), ('step', 1), ('step', 2)]


def test_set_epoch_turns_detection_off(model, batch):
    task = ccl_timm.create_task(model, Recorder())
    task.set_epoch(5)
    task(*batch)
    task.get_trainable_module().train()
    assert [kind for kind in task.loss.told if kind[0] == 'epoch'] == [('epoch', 5)]


def test_state_of_the_loss_and_counters_come_back(model, batch):
    task = ccl_timm.create_task(model, Recorder())
    task.train()
    for _ in range(3):
        task(*batch)
    saved = copy.deepcopy(task.get_checkpoint_state())
    assert set(saved) == {'state_dict', 'task_state'}
    assert not any(key.startswith(('model.', 'loss.')) for key in saved['state_dict'])
    other = ccl_timm.create_task(copy.deepcopy(model), Recorder())
    other.load_checkpoint_state(saved['state_dict'], saved['task_state'])
    assert other.loss.seen == 3 and other.get_task_state()['step'] == 3
    other.get_trainable_module().train()
    assert other.loss.told == [('epoch', 1)]


def test_counters_are_in_the_state_dict_and_older_ones_load(model, batch):
    task = ccl_timm.create_task(model, Recorder())
    task.set_epoch(3)
    for _ in range(2):
        task(*batch)
    saved = copy.deepcopy(task.state_dict())
    other = ccl_timm.create_task(copy.deepcopy(model), Recorder())
    other.load_state_dict(saved)
    assert (other.get_task_state()['epoch'], other.get_task_state()['step']) == (3, 2)
    older = {name: saved[name] for name in saved if not name.endswith(('.epoch', '.batches', '.step'))}
    assert len(older) == len(saved) - 3
    other.load_state_dict(older)
    other.load_task_state({'loss': task.loss.state_dict(), 'epoch': 7, 'step': 5, 'trained': True})
    other.train()
    assert other.loss.told[-1] == ('epoch', 8)


def test_an_epoch_of_one_batch_counts_in_timms_script(model, batch):
    task = ccl_timm.create_task(model, Recorder())
    task.follow_timm_script()
    for step in range(1, 4):
        task.get_trainable_module().train()
        task(*batch)
        task.update_ema(step=step)
    assert task.loss.told == [('step', 1), ('epoch', 1), ('step', 2), ('epoch', 2), ('step', 3)]


def test_set_epoch_within_an_epoch_changes_nothing(model, batch):
    task = ccl_timm.create_task(model, Recorder())
    for epoch in (0, 0, 1):
        task.set_epoch(epoch)
        task(*batch)
    assert [told for told in task.loss.told if told[0] == 'epoch'] == [('epoch', 0), ('epoch', 1)]


def test_ema_holds_the_loss_too(model, batch):
    task = ccl_timm.create_task(model, Recorder())
    task.setup_ema(decay=0.5)
    task(*batch)
    task.update_ema(step=1)
    state = task.get_checkpoint_state(ema=True)
    assert set(state) == {'state_dict_ema', 'task_state_ema'}
    assert task.get_eval_model(ema=True)(batch[0]).shape == (8, 4)


def test_compiled_equals_plain(model, batch):
    plain = ccl_timm.create_task(copy.deepcopy(model), 'cc')
    compiled = ccl_timm.create_task(model, 'cc')
    evaluated = compiled.compile(backend='eager')
    assert compiled.get_eval_model() is evaluated
    for task in (plain, compiled):
        task(*batch)['loss'].backward()
    assert torch.isclose(plain(*batch)['loss'], compiled(*batch)['loss'])
    gradients = [torch.cat([p.grad.flatten() for p in task.get_clip_parameters()]) for task in (plain, compiled)]
    assert torch.allclose(*gradients, atol=1e-6)
    assert isinstance(compiled._bare(), ModelWithLoss)


# one of each kind by default: compiling takes seconds
COMPILED = ('amsoftmax', 'cc', 'center', 'cot', 'pod')


@pytest.mark.parametrize(
    'name',
    [pytest.param(name, marks=[] if name in COMPILED else [pytest.mark.slow]) for name in [*list_losses(), 'ce']],
)
def test_task_and_loss_are_one_graph_for_all_steps(name):
    head = loss_class(name).head or 'linear' if name in list_losses() else 'linear'
    task = ccl_timm.create_task(ccl_timm.create_model(f'test_resnet_{head}', num_classes=4), name).train()
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(task, fullgraph=True, backend=counter)
    for _ in range(3):
        compiled(images, target)['loss'].backward()
    assert counter.frame_count == 1
    assert task.get_task_state()['step'] == 3


def test_adaptive_clipping_leaves_the_classifier_out(model):
    task = ccl_timm.create_task(model, 'cc')
    head = {id(p) for p in model.get_classifier().parameters()}
    assert not head & {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert head <= {id(p) for p in task.get_clip_parameters()}


@pytest.mark.parametrize('of', ['task', 'compiled task', 'trainable module'])
def test_layer_decay_and_weight_decay_see_the_model(of):
    vit = ccl_timm.create_model('vit_tiny_patch16_224_cam', num_classes=3, img_size=32, depth=2)
    task = ccl_timm.create_task(vit, 'cc')
    if of == 'compiled task':
        task.compile(backend='eager')
    trainable = task.get_trainable_module() if of == 'trainable module' else task
    assert any(name.endswith('model.pos_embed') for name in trainable.no_weight_decay())
    groups = timm.optim.create_optimizer_v2(
        trainable, opt='sgd', lr=1.0, weight_decay=0.1, layer_decay=0.5
    ).param_groups
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    assert decay[id(vit.pos_embed)] == decay[id(vit.cls_token)] == 0 < decay[id(vit.patch_embed.proj.weight)]
    assert scale[id(vit.head.out.weight)] == 1.0
    assert scale[id(vit.patch_embed.proj.weight)] < scale[id(vit.blocks[1].mlp.fc1.weight)] < 1.0


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_computes_the_loss_in_full_precision(model, batch, dtype):
    task = ccl_timm.create_task(model, 'cc')
    with torch.autocast('cpu', dtype=dtype):
        result = task(*batch)
    assert result['loss'].dtype == torch.float32
    result['loss'].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', list_losses())
def test_the_state_of_a_loss_stays_in_full_precision(name, dtype):
    loss = LossCase(name, {'momentum': 0.9} if name == 'fical' else {}).build()
    before = copy.deepcopy(loss.state_dict())
    for key, value in nn.Sequential(loss).to(dtype)[0].state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])


def test_a_mean_over_many_images_goes_on_in_a_model_of_bfloat16():
    task = ccl_timm.create_task(ccl_timm.create_model('test_resnet_pedcc', num_classes=4), 'nac').to(torch.bfloat16)
    task.loss.count.fill_(256.0)
    task.train()(torch.randn(3, 3, 32, 32, dtype=torch.bfloat16), torch.arange(3))
    assert task.loss.count == 259


def test_gradient_checkpointing_and_channels_last(model, batch):
    model.set_grad_checkpointing(True)
    model.to(memory_format=torch.channels_last)
    task = ccl_timm.create_task(model, 'cc')
    task(batch[0].contiguous(memory_format=torch.channels_last), batch[1])['loss'].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_targets_of_a_wrong_kind_are_refused(model, batch):
    task = ccl_timm.create_task(model, 'cc')
    with pytest.raises(ccl_timm.UserError, match=r'target of shape \(8,\) and type torch.float32'):
        task(batch[0], batch[1].float())


@pytest.mark.parametrize(
    'loss, message',
    [
        (nn.CrossEntropyLoss(), r'CrossEntropyLoss\(\) is none of our losses.*losses\.LogitsLoss\(criterion\)'),
        (losses.MCLoss, 'MCLoss.* is none of our losses'),
        (losses.MCLoss(3, 12), "'MCLoss' was built with num_classes=3; test_resnet_mc has 4"),
        (losses.MCLoss(4, 20), 'num_channels=20; test_resnet_mc has 12'),
        (losses.CenterLoss(4, 1), 'num_features=1; test_resnet_mc has 12'),
    ],
)
def test_a_loss_that_is_none_or_of_another_size_is_refused(loss, message):
    model = ccl_timm.create_model('test_resnet_mc', num_classes=4)
    with pytest.raises(ccl_timm.UserError, match=message):
        ccl_timm.create_task(model, loss)


def test_a_criterion_becomes_a_loss(model, batch):
    task = ccl_timm.create_task(model, losses.LogitsLoss(nn.CrossEntropyLoss()))
    result = task(*batch)
    torch.testing.assert_close(result['loss'], nn.functional.cross_entropy(result['output'], batch[1]))


@pytest.mark.parametrize('name', ['test_resnet_linear', 'test_vit_linear'])  # which keep dropout in two places
def test_dropout_acts_on_features_too(name):
    model = ccl_timm.create_model(name, num_classes=4, drop_rate=0.5)
    task = ccl_timm.create_task(model, 'ce')
    features, target = torch.randn(4, model.head_hidden_size), torch.arange(4)
    for rate, same in ((0.5, False), (0.0, True)):
        task.train_on_features(rate)
        outputs = [task.train()(features, target)['output'] for _ in range(2)]
        assert torch.equal(*outputs) == same
        assert torch.equal(*(task.eval()(features, target)['output'] for _ in range(2)))


def test_a_loss_of_the_feature_map_does_not_train_on_features():
    task = ccl_timm.create_task(ccl_timm.create_model('test_resnet_mc', num_classes=4), 'mc')
    with pytest.raises(ccl_timm.UserError, match='MCLoss requires the feature map'):
        task.train_on_features()


def test_a_scale_for_thousands_of_classes_warns_once():
    model = ccl_timm.create_model('test_resnet_cosine', num_classes=4)
    with pytest.warns(UserWarning, match='ArcFaceLoss: scale=64 was tuned .* for 4 classes try scale=16') as caught:
        ccl_timm.create_task(model, 'arcface')
        ccl_timm.create_task(model, 'arcface', scale=16, margin=0.3)
    assert len(caught) == 1


def test_a_forward_pass_without_gradient_is_no_step():
    task = ccl_timm.create_task(ccl_timm.create_model('test_resnet_cam', num_classes=5), 'cot')
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    with torch.no_grad():
        task(images, target)
    assert task.loss.step == 0
    task(images, target)
    assert task.loss.step == 1
