"""Text from outside (class, folder and file names, commands, notes), made safe for where it is shown."""

import re
import shlex
import unicodedata
from collections.abc import Iterable
from typing import Any

__all__ = ['csv_text', 'markdown_code', 'markdown_text', 'shell_text', 'terminal_text', 'utf8_text']

# control characters, lone surrogates, line and paragraph separators, and format characters such as those that reverse
# the writing direction; but not the joiners, which some scripts and emoji need
_HIDDEN = {'Cc', 'Cf', 'Cs', 'Zl', 'Zp'}
_JOINERS = '\u200c\u200d'
_SURROGATES = re.compile('[\ud800-\udfff]')
_NAMED = {'\n': '\\n', '\r': '\\r', '\t': '\\t'}

# what has a meaning within a line of Markdown, in HTML, or in a formula (which the Hub renders); an underscore within a
# word has none, nor have brackets that no address follows
_MARKDOWN = re.compile(r'[\\`*<>&|~$#]|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])|(?<=\w):(?=//)|(?<=www)\.')
_ENTITIES = {'\\': '&#92;', '$': '&#36;', '<': '&lt;', '>': '&gt;', '&': '&amp;'}

_QUOTED = {'\\': '\\\\', "'": "\\'"}
_FORMULA = tuple('=+-@\uff1d\uff0b\uff0d\uff20')  # also their full-width forms


def terminal_text(value: Any) -> str:
    r"""Text as one line of visible characters.

    Control characters (such as those that move a terminal's cursor), line breaks, characters that reverse the writing
    direction, and bytes that are not UTF-8 become escapes: ``\x1b``, ``\n``, ``\u202e``, ``\xff``.
    """
    text = str(value)
    return text if text.isascii() and text.isprintable() else ''.join(map(_visible, text))


def _visible(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file name that is not UTF-8
        return f'\\x{code - 0xDC00:02x}'
    if code < 0x80:
        return _NAMED.get(character, f'\\x{code:02x}')
    return f'\\u{code:04x}' if code <= 0xFFFF else f'\\U{code:08x}'


def utf8_text(name: str) -> str:
    r"""A name that programs read, as text that UTF-8 can encode: bytes that are not UTF-8 become ``\xff``.

    All else stays as it is. Text for people goes through the other functions of this module.
    """
    return _SURROGATES.sub(lambda match: _visible(match.group()), name)


def markdown_text(value: Any) -> str:
    """Text for the inside of a line or table cell of Markdown, shown as it is: no markup, HTML, link or formula."""
    return _MARKDOWN.sub(_escaped, terminal_text(value))


def _escaped(match: re.Match) -> str:
    return _ENTITIES.get(match.group(), f'\\{match.group()}')


def markdown_code(value: Any) -> str:
    """Text in a monospaced font for a line or a table cell of Markdown."""
    text = terminal_text(value)
    return f'<code>{markdown_text(text)}</code>' if set('`|') & set(text) or not text.strip() else f'`{text}`'


def shell_text(argv: Iterable[str]) -> str:
    """A command as one line that bash reads back as these arguments; hidden characters are written as escapes."""
    return ' '.join(map(_shell_argument, argv))


def _shell_argument(text: str) -> str:
    if terminal_text(text) == text:
        return shlex.quote(text)
    return f"$'{''.join(_QUOTED.get(character) or _visible(character) for character in text)}'"


def csv_text(value: Any) -> Any:
    """A cell of a CSV file; numbers stay as they are.

    Text becomes one line of visible characters. Where a spreadsheet would take it for a formula, because it begins
    with ``=``, ``+``, ``-`` or ``@`` and is no number, it gets an apostrophe in front.
    """
    if not isinstance(value, str):
        return value
    text = terminal_text(value)
    return f"'{text}" if text.startswith(_FORMULA) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
