"""How a library's exception becomes a user's sentence."""

import pytest
import torch

from ccl_timm.errors import UserError, user_errors


@pytest.mark.parametrize(
    'error, sentence',
    [
        (ValueError('no such\n  value.'), 'It fails: value.'),
        (KeyError(), 'It fails: KeyError.'),
        (UserError('As it is'), 'As it is'),
    ],
)
def test_an_exception_becomes_a_sentence(error, sentence):
    with pytest.raises(UserError) as caught, user_errors('It fails'):
        raise error
    assert str(caught.value) == sentence


@pytest.mark.parametrize('error', [ZeroDivisionError(), MemoryError(), torch.OutOfMemoryError()])
def test_bugs_and_a_lack_of_memory_stay_what_they_are(error):
    with pytest.raises(type(error)), user_errors('It fails'):
        raise error


def test_a_reason_can_be_given_and_have_a_hint():
    with pytest.raises(UserError, match=r'^It fails: because: do that\.$'):
        with user_errors('It fails', (OSError,), lambda error: 'because', ': do that'):
            raise OSError
    with pytest.raises(OSError), user_errors('It fails', explain=lambda error: None):
        raise OSError
