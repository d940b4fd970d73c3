"""Our heads on architectures nobody named: found by their name, built, and trained for a step; or refused."""

import pytest
import timm
import torch
from torch import nn

import ccl_timm
from ccl_timm.models import ensure_registered
from ccl_timm.models.variant import attach_head

LOSSES = {'cam': 'cc', 'pedcc': 'pod'}
# small architectures, each of another family: timm's for tests, and three that the table of families is about
QUICK = [
    'test_byobnet',
    'test_convnext',
    'test_efficientnet',
    'test_mambaout',
    'test_nfnet',
    'test_resnet',
    'test_vit',
    'mobilenetv3_small_050',
    'regnetx_002',
    'dla46x_c',
    'efficientvit_m0',
]
# one small architecture of each further family, two where its members differ in the classifier
FURTHER = [
    'bat_resnext26ts',
    'beit_base_patch16_224',
    'caformer_s18',
    'cait_xxs24_224',
    'coat_lite_tiny',
    'convit_tiny',
    'convmixer_768_32',
    'cpubone_nano',
    'csatv2',
    'cspnext_tiny',
    'cspresnet50',
    'davit_tiny',
    'deit3_small_patch16_224',
    'dpn48b',
    'edgenext_xx_small',
    'efficientvit_b0',
    'eva02_tiny_patch14_224',
    'fasternet_t0',
    'fastvit_t8',
    'focalnet_tiny_srf',
    'gcvit_xxtiny',
    'ghostnet_050',
    'halonet_h1',
    'hardcorenas_a',
    'hgnetv2_b0',
    'hiera_tiny_224',
    'hieradet_small',
    'hrnet_w18_small',
    'iformer_t',
    'inception_next_atto',
    'inception_resnet_v2',
    'inception_v3',
    'inception_v4',
    'lcnetv2_small',
    'legacy_seresnet18',
    'legacy_xception',
    'levit_256d',
    'lowformer_b0',
    'maxvit_rmlp_pico_rw_256',
    'mixer_s32_224',
    'mobilevit_xxs',
    'mobilevitv2_050',
    'mvitv2_tiny',
    'naflexvit_base_patch16_gap',
    'nasnetalarge',
    'nest_tiny',
    'nextvit_small',
    'pit_ti_224',
    'pnasnet5large',
    'poolformer_s12',
    'pvt_v2_b0',
    'qwen3_vit_88m',
    'rdnet_tiny',
    'repghostnet_050',
    'res2net50_26w_4s',
    'resnest14d',
    'resnetv2_18',
    'rexnet_100',
    'samvit_base_patch16_224',
    'selecsls42',
    'sequencer2d_s',
    'shvit_s1',
    'skresnet18',
    'starnet_s1',
    'swin_tiny_patch4_window7_224',
    'swinv2_cr_tiny_224',
    'swinv2_tiny_window8_256',
    'tiny_vit_5m_224',
    'tnt_s_patch16_224',
    'tresnet_m',
    'twins_pcpvt_small',
    'visformer_tiny',
    'vit_relpos_small_patch16_224',
    'vit_tiny_r_s16_p8_224',
    'vitamin_small_224',
    'vovnet39a',
    'xception41',
    'xcit_nano_12_p16_224',
]
# their windows do not divide the feature maps of smaller images
FULL_SIZE = ('bat_resnext26ts', 'halonet_h1')
# architectures that break the seam of three calls, and what is said about it
REFUSED = {
    'crossvit_tiny_240': 'has 2 classifiers (head.0, head.1), and a head replaces a single one: use another',
    'deit_tiny_distilled_patch16_224': "(head, head_dist), and a head replaces a single one: use 'deit_",
    'efficientformer_l1': 'has 2 classifiers (head, head_dist)',
    'efficientformerv2_s0': 'has 2 classifiers (head, head_dist)',
    'efficientvim_m1': 'has 4 classifiers (heads.0, heads.1, ...)',
    'iformer_m_distilled': "replaces a single one: use 'iformer_m'",
    'levit_128s': 'has 2 classifiers (head.linear, head_dist.linear)',
    'levit_384_s8': 'has several classifiers, and a head replaces a single one',
    'mobilenetv5_300m_enc': "cannot take a head: it has no 'get_classifier'",
    'pit_ti_distilled_224': "use 'pit_ti_224'",
    'resnet18_cosine': "has a head already: put one on 'resnet18'",
    'resnet18_mc': "has a head already: put one on 'resnet18'",
    'qwen3_vit_88m_enc': 'has no classifier to put a head in the place of: use another architecture.',
    'repvit_m0_9': 'has 2 classifiers (head.head.l, head.head_dist.l)',
    'swiftformer_xs': 'has 2 classifiers (head, head_dist)',
    'volo_d1_224': 'has 2 classifiers (head, aux_head)',
}


@pytest.fixture(autouse=True)
def one_thread():
    """For images this small, sharing the work takes longer than the work, most of all on a busy machine."""
    torch.set_num_threads(1)


def train_a_step(backbone, head, side):
    """Everything that a user of a new architecture needs: its cfg, one step that changes the head, other classes."""
    model = ccl_timm.create_model(f'{backbone}_{head}', num_classes=5)
    cfg, plain = model.pretrained_cfg, timm.get_pretrained_cfg(backbone)
    assert cfg['architecture'] == f'{backbone}_{head}'
    for key in ('input_size', 'mean', 'std', 'crop_pct'):
        assert cfg[key] == getattr(plain, key)
    task = ccl_timm.create_task(model, LOSSES[head])
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    kept = [parameter.detach().clone() for parameter in model.get_classifier().parameters()]
    full_size = cfg['fixed_input_size'] or backbone in FULL_SIZE
    images = torch.randn(2, *(cfg['input_size'] if full_size else (3, side, side)))
    result = task(images, torch.tensor([0, 1]))
    result['loss'].backward()
    optimizer.step()
    assert result['loss'].isfinite() and result['output'].shape == (2, 5)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(kept, model.get_classifier().parameters(), strict=True))
    kind = type(model.get_classifier())
    model.reset_classifier(3)
    assert type(model.get_classifier()) is kind and model.eval()(images).shape == (2, 3)


@pytest.mark.parametrize('head', LOSSES)
@pytest.mark.parametrize('backbone', QUICK)
def test_on_demand(backbone, head):
    train_a_step(backbone, head, side=96)


@pytest.mark.slow
@pytest.mark.parametrize('head', LOSSES)
@pytest.mark.parametrize('backbone', FURTHER)
def test_on_demand_further(backbone, head):
    train_a_step(backbone, head, side=128)


@pytest.mark.parametrize('backbone', REFUSED)
def test_refused_in_a_sentence_when_created(backbone):
    with pytest.raises(ccl_timm.UserError) as error:
        ccl_timm.create_model(f'{backbone}_cam', num_classes=5, device='meta')
    assert f"'{backbone}'" in str(error.value) and REFUSED[backbone] in str(error.value)


def test_refused_where_a_variant_is_registered_and_in_commands(run_cli, workdir):
    with pytest.raises(ccl_timm.UserError, match='has 2 classifiers'):
        ccl_timm.register_variant('volo_d1_224', 'cam')
    code, _, err = run_cli('timm', 'train.py', '--model', 'volo_d1_224_cam', '--loss', 'cc')
    assert code == 2 and REFUSED['volo_d1_224'] in err.splitlines()[-1] and 'Traceback' not in err


def test_refused_where_the_place_of_the_last_layer_is_taken():
    model = timm.create_model('test_resnet')
    with pytest.raises(ccl_timm.UserError, match="'test_resnet' cannot take a head: .* no free place at 'fc'"):
        attach_head(model, 'fc', ccl_timm.heads.CAMHead, 5, {})


def test_task_refuses_a_model_whose_three_calls_do_not_agree():
    model = timm.create_model('test_resnet', num_classes=5)
    model.act1 = nn.Identity()
    model.forward = lambda x: 2 * type(model).forward(model, x)
    with pytest.raises(
        ccl_timm.UserError, match="'test_resnet' cannot be trained with these losses: its output is not"
    ):
        ccl_timm.create_task(model, 'focal')


@pytest.mark.parametrize('head', LOSSES)
@pytest.mark.parametrize('backbone', ['dla46x_c', 'efficientvit_m0'])
def test_weights_of_the_backbone_and_of_a_trained_model_are_distinguished(backbone, head):
    """pedcc's ``head.linear`` has the name of a part of the EfficientViT's own classifier."""
    stock = timm.create_model(backbone, num_classes=1000).state_dict()
    name = f'{backbone}_{head}'
    model = ccl_timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'state_dict': stock})
    own = model.state_dict()
    prefix = model._head_path
    assert all(torch.equal(own[key], value) for key, value in stock.items() if not key.startswith(prefix))
    again = ccl_timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'state_dict': own})
    assert all(torch.equal(own[key], value) for key, value in again.state_dict().items())


@pytest.mark.parametrize('name', ['mvitv2_tiny', 'lcnetv2_small_cam', 'resnet18'])
def test_dropout_before_the_classifier_is_that_of_the_family(name):
    model = ccl_timm.create_model(name, num_classes=5, drop_rate=0.9)
    size = (3, 224, 224) if 'vit' in name else (3, 32, 32)
    task = ccl_timm.create_task(model, 'ce')
    images, target = torch.randn(2, *size), torch.tensor([0, 1])
    for mode in (True, False):
        task.train(mode)
        torch.manual_seed(0)
        found = task(images, target)['output']
        torch.manual_seed(0)
        torch.testing.assert_close(found, model(images))


def test_a_stock_classifier_with_a_batch_norm_of_its_own_is_refused():
    model = timm.create_model('efficientvit_m0', num_classes=5)  # a new batch norm changes nothing in evaluation mode
    with pytest.raises(ccl_timm.UserError, match='its output is not get_classifier'):
        ccl_timm.create_task(model, 'ce')


@pytest.mark.parametrize('name', ['resnet18', 'resnet18_cam'])
@pytest.mark.parametrize('loss', ['ce', 'mc', 'cc'])
def test_a_model_without_classes_is_refused(name, loss):
    with pytest.raises(ccl_timm.UserError, match='has no classes: give num_classes'):
        ccl_timm.create_task(ccl_timm.create_model(name, num_classes=0), loss)


def test_a_head_reads_pooled_features_and_has_classes():
    for options in ({'num_classes': -1}, {'num_classes': 5, 'global_pool': ''}):
        with pytest.raises(ccl_timm.UserError, match='must not be negative|works with num_classes=0 only'):
            ccl_timm.create_model('resnet18_cam', **options)
    model = ccl_timm.create_model('resnet18_cam', num_classes=2)
    with pytest.raises(ccl_timm.UserError, match='num_classes=-1 must not be negative'):
        model.reset_classifier(-1)
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 2)  # as before


def test_vgg_with_a_wider_pooling():
    model = ccl_timm.create_model('vgg11_cam', num_classes=5, global_pool='catavgmax')
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_dropout_inside_a_replaced_classifier_is_refused():
    with pytest.raises(ccl_timm.UserError, match="drop_rate=0.1 of 'efficientvit_m0' is inside the classifier"):
        ccl_timm.create_model('efficientvit_m0_cam', drop_rate=0.1)


@pytest.mark.parametrize('loss', ['focal', 'mc'])
def test_stock_model_with_a_convolution_as_classifier(loss):
    model = timm.create_model('dla46x_c', num_classes=5)
    result = ccl_timm.create_task(model, loss)(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    result['loss'].backward()
    assert model.base_layer[0].weight.grad.abs().sum() > 0


def test_only_names_of_the_form_architecture_head_are_made():
    with pytest.raises(ccl_timm.UnknownNameError, match="Unknown model 'nonet_cam'"):
        ensure_registered('nonet_cam')
