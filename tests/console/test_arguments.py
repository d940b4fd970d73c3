"""How arguments of the command line are read."""

from ccl_timm.console.arguments import KeyValues, Parser


def test_what_is_no_literal_is_text():
    parser = Parser()
    parser.add_argument('--options', nargs='*', action=KeyValues)
    options = parser.parse_args(['--options', 'a=1', 'b=(1, 2)', 'c=max', 'd={[]: 1}', 'e=']).options
    assert options == {'a': 1, 'b': (1, 2), 'c': 'max', 'd': '{[]: 1}', 'e': ''}
