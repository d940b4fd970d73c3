"""Our heads on architectures nobody named: found by their name, built, and trained for a step."""

import pytest
import timm
import torch

import ccl_timm
from ccl_timm.models import ensure_registered

HEADS = {'cam': 'cc', 'pedcc': 'pod'}
# small models that timm keeps for tests, each of another family
QUICK = [
    'test_byobnet',
    'test_convnext',
    'test_efficientnet',
    'test_mambaout',
    'test_nfnet',
    'test_resnet',
    'test_vit',
    'convnext_atto',
    'mobilenetv3_small_050',
    'regnetx_002',
]
# one small architecture of each further family
FURTHER = [
    'bat_resnext26ts',
    'beit_base_patch16_224',
    'cait_xxs24_224',
    'coat_lite_tiny',
    'convit_tiny',
    'convmixer_768_32',
    'cspresnet50',
    'davit_tiny',
    'deit3_small_patch16_224',
    'dla34',
    'edgenext_xx_small',
    'efficientformerv2_s0',
    'efficientvit_b0',
    'efficientvit_m0',
    'eva02_tiny_patch14_224',
    'fastvit_t8',
    'focalnet_tiny_srf',
    'gcvit_xxtiny',
    'ghostnet_100',
    'hardcorenas_a',
    'hgnetv2_b0',
    'hiera_tiny_224',
    'hrnet_w18_small',
    'inception_next_atto',
    'inception_v3',
    'inception_v4',
    'legacy_seresnet18',
    'levit_128s',
    'maxvit_rmlp_pico_rw_256',
    'mixer_s32_224',
    'mobilevit_xxs',
    'mobilevitv2_050',
    'mvitv2_tiny',
    'nest_tiny',
    'nextvit_small',
    'pit_ti_224',
    'poolformer_s12',
    'pvt_v2_b0',
    'rdnet_tiny',
    'repghostnet_050',
    'repvit_m0_9',
    'res2net50_26w_4s',
    'resnest14d',
    'resnetv2_50',
    'rexnet_100',
    'selecsls42',
    'sequencer2d_s',
    'skresnet18',
    'starnet_s1',
    'swiftformer_xs',
    'swin_tiny_patch4_window7_224',
    'swinv2_tiny_window8_256',
    'tiny_vit_5m_224',
    'tresnet_m',
    'twins_pcpvt_small',
    'visformer_tiny',
    'vit_relpos_small_patch16_224',
    'vitamin_small_224',
    'vovnet39a',
    'xception41',
    'xcit_nano_12_p16_224',
]
# architectures that break the seam of three calls, and what is said about it
REFUSED = {
    'crossvit_tiny_240': '',
    'deit_tiny_distilled_patch16_224': '',
    'dpn48b': '',
    'levit_128s': '',
    'volo_d1_224': '',
}


def train_a_step(backbone, head, loss):
    name = f'{backbone}_{head}'
    model = ccl_timm.create_model(name, num_classes=5)
    assert model.pretrained_cfg['architecture'] == name
    for key in ('mean', 'std', 'input_size', 'crop_pct'):
        assert tuple(timm.get_pretrained_cfg(name).to_dict()[key] if key != 'crop_pct' else ()) == tuple(
            timm.get_pretrained_cfg(backbone).to_dict()[key] if key != 'crop_pct' else ()
        )
    task = ccl_timm.create_task(model, loss)
    size = model.pretrained_cfg['input_size'] if model.pretrained_cfg.get('fixed_input_size') else (3, 96, 96)
    result = task(torch.randn(2, *size), torch.tensor([0, 1]))
    result['loss'].backward()
    assert result['loss'].isfinite() and result['output'].shape == (2, 5)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_classifier().parameters())
    model.reset_classifier(3)
    assert type(model.get_classifier()).__name__ == {'cam': 'CamHead', 'pedcc': 'PedccHead'}[head]


@pytest.mark.parametrize('head, loss', HEADS.items())
@pytest.mark.parametrize('backbone', QUICK)
def test_on_demand(backbone, head, loss):
    train_a_step(backbone, head, loss)


@pytest.mark.slow
@pytest.mark.parametrize('head, loss', HEADS.items())
@pytest.mark.parametrize('backbone', FURTHER)
def test_on_demand_further(backbone, head, loss):
    train_a_step(backbone, head, loss)


@pytest.mark.parametrize('backbone', sorted(REFUSED))
def test_refused_in_a_sentence(backbone):
    with pytest.raises(ccl_timm.UserError, match=REFUSED[backbone]):
        ccl_timm.create_task(ccl_timm.create_model(f'{backbone}_cam', num_classes=5), 'cc')


def test_only_names_of_the_form_architecture_head_are_made():
    with pytest.raises(ccl_timm.UnknownNameError, match="Unknown model 'nonet_cam'"):
        ensure_registered('nonet_cam')
