import pytest

from ..fake_hub import FakeHub, take_for_the_hub


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A stand-in Hub that this process, logged in as 'me', takes for the Hub."""
    with FakeHub() as standin:
        yield from take_for_the_hub(standin, monkeypatch, tmp_path / 'cache')
