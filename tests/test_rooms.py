"""The rooms of the package: who may import whom, and who may print."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'ccl_timm'
# from the lowest room to the highest; a room may import its own modules and those of lower rooms
ROOMS = (
    ('errors', '_compat'),
    ('ops', 'registry'),
    ('losses', 'heads'),
    ('models',),
    ('task',),
    ('testing', 'integrations'),
    ('console',),  # below this line: what people type and see
    ('data',),
    ('training',),
    ('experiments',),
    ('hub',),
    ('cli',),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
LIBRARY = [room for room, level in LEVEL.items() if level < LEVEL['console']]
TOP = {'__init__', '__main__', 'autoload'}  # entries to the package, which may import any room
MODULES = sorted(path for path in PACKAGE.rglob('*.py') if 'plugin_template' not in path.parts)


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' and len(parts) > 1 else parts)


def imports_of(path):
    """Modules of the package that a module imports, relative to it, and whether at module level."""
    tree = ast.parse(path.read_text())
    checking = {id(node) for block in ast.walk(tree) if is_type_checking(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'ccl_timm':
            base = node.module.removeprefix('ccl_timm').lstrip('.')
            for alias in node.names:
                full = f'{base}.{alias.name}'.lstrip('.')
                known = full if (PACKAGE / full.replace('.', '/')).exists() or is_module(full) else base
                yield known or '__init__', node.col_offset == 0
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split('.')[0] == 'ccl_timm':
                    yield alias.name.removeprefix('ccl_timm').lstrip('.') or '__init__', node.col_offset == 0


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == 'TYPE_CHECKING'


def is_module(name):
    return (PACKAGE / (name.replace('.', '/') + '.py')).exists()


def test_the_top_level_holds_rooms_and_nine_files():
    files = {path.name for path in PACKAGE.glob('*.py')} | {path.name for path in PACKAGE.glob('*.typed')}
    assert files == {
        '__init__.py', '__main__.py', '_compat.py', 'autoload.py', 'errors.py', 'ops.py', 'py.typed', 'registry.py',
        'task.py',
    }  # fmt: skip
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != '__pycache__'}
    assert folders - {'plugin_template'} == LEVEL.keys() - {'errors', '_compat', 'ops', 'registry', 'task'}


@pytest.mark.parametrize('path', MODULES, ids=module_name)
def test_imports_point_to_lower_rooms(path):
    room = module_name(path).split('.')[0]
    if room in TOP:
        return
    for target, at_module_level in imports_of(path):
        other = target.split('.')[0]
        assert other in LEVEL, f'{module_name(path)} imports {other}: it is no room.'
        assert other == room or LEVEL[other] < LEVEL[room], f'{module_name(path)} imports {target}, a higher room.'
        assert at_module_level, f'{module_name(path)} imports {target} within a function.'


@pytest.mark.parametrize('path', MODULES, ids=module_name)
def test_private_names_of_timm_are_imported_in_one_module(path):
    if path.name == '_compat.py':
        return
    tree = ast.parse(path.read_text())
    names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f'{node.module}.{alias.name}' for alias in node.names]
    private = [name for name in names if re.match(r'timm\..*\b_[a-z]|.*[sS]aver\._', name)]
    assert not private, f'{module_name(path)} uses {private}: bring it through _compat.'


def test_no_import_goes_in_a_circle():
    graph = {module_name(path): {target for target, _ in imports_of(path)} for path in MODULES}
    # a package's __init__ is imported before each of its modules, which may therefore not import it back
    done, active = set(), []

    def visit(name):
        assert name not in active, f'import circle: {" -> ".join([*active[active.index(name) :], name])}'
        if name in done:
            return
        active.append(name)
        for target in sorted(graph.get(name, ())):
            visit(target)
        active.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize('path', [p for p in MODULES if module_name(p).split('.')[0] in LIBRARY], ids=module_name)
def test_the_library_half_neither_prints_nor_exits(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [f for f in calls if isinstance(f, ast.Name) and f.id in ('print', 'exit', 'quit')]
    assert not [f for f in calls if isinstance(f, ast.Attribute) and ast.unparse(f) in ('sys.exit', 'os._exit')]
