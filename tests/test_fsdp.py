"""FSDP2 and torch.distributed.checkpoint on a task, over two processes on gloo."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ccl_timm

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 0, 1, 1, 2, 0])


def make_task(head, loss):
    torch.manual_seed(0)
    return ccl_timm.create_task(ccl_timm.create_model(f'test_vit_{head}', num_classes=3, img_size=32), loss)


def trained(task, images, target, shard=None):
    """The task after two steps."""
    if shard:
        fully_shard(task, mesh=shard)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    task.train()
    for _ in range(2):
        task(images, target)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    return task


def whole(task):
    state = task.state_dict()
    return {name: value.full_tensor() if hasattr(value, 'full_tensor') else value for name, value in state.items()}


def process(rank, folder, head, loss):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    try:
        mesh = init_device_mesh('cpu', (2,))
        task = trained(make_task(head, loss), IMAGES[rank::2], TARGET[rank::2], mesh)
        found = whole(task)
        dcp.save(get_model_state_dict(task), checkpoint_id=f'{folder}/saved')
        again = make_task(head, loss)
        fully_shard(again, mesh=mesh)
        state = get_model_state_dict(again)
        dcp.load(state, checkpoint_id=f'{folder}/saved')
        set_model_state_dict(again, state)
        assert all(torch.equal(value, found[name]) for name, value in whole(again).items())
        if not rank:
            torch.save(found, f'{folder}/trained.pt')
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('head, loss', [('cam', 'cc'), pytest.param('pedcc', 'pod', marks=pytest.mark.slow)])
def test_two_sharded_halves_of_a_batch_are_the_whole(head, loss, tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path), head, loss), nprocs=2)
    expected = trained(make_task(head, loss), IMAGES, TARGET).state_dict()
    found = torch.load(tmp_path / 'trained.pt', weights_only=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name
