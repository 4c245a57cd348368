"""Who imports whom: a package imports from packages below it only, the operators nothing but torch."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / 'boltz_mm'
# From the bottom; packages of one floor do not import each other.
FLOORS = (
    {'utils', 'ops', 'structures', 'version'},
    {'registry'},
    {'models', 'datasets', 'converters'},
    {'evaluation'},
    {'engine', 'visualization'},
    {'apis'},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob('*.py') if path.parent != PACKAGE or path.stem in FLOOR_OF)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            assert node.module is not None
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix('').parts[0]


def test_every_package_has_a_floor() -> None:
    parts = {path.parent.name for path in PACKAGE.glob('*/__init__.py')}
    assert parts == {name for names in FLOORS for name in names} - {'registry', 'version'}


@pytest.mark.parametrize('path', FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_lead_down(path: Path) -> None:
    part = part_of(path)
    used = {name.split('.')[1] for name in imported(path) if name.startswith('boltz_mm.')} - {part}
    assert {other for other in used if FLOOR_OF[other] >= FLOOR_OF[part]} == set()


@pytest.mark.parametrize('path', [path for path in FILES if part_of(path) == 'ops'], ids=lambda path: path.stem)
def test_operators_import_torch_alone(path: Path) -> None:
    roots = {name.partition('.')[0] for name in imported(path)}
    assert roots - set(sys.stdlib_module_names) <= {'torch', 'boltz_mm'}
