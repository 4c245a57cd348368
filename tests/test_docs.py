"""The documents: links lead somewhere, Python runs, commands name files that exist."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config

import boltz_mm  # noqa: F401  makes boltz_mm:: known
from tests.parity import registry

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md'), *(ROOT / 'configs').rglob('*.md')])
BLOCK = re.compile(r'^```(\w+)\n(.*?)^```', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\(([^)\s]+)\)')
# A file of the checkout in a command or in a name between backquotes.
FILE = re.compile(r'(?<![\w./-])((?:tools|configs|docs|tests|ops|boltz_mm)/[\w./-]+\.(?:py|sh|md|yml|txt|cpp))')
MIM_CONFIG = re.compile(r'mim (?:train|test) boltz_mm (\S+\.py)')

every_document = pytest.mark.parametrize('path', DOCUMENTS, ids=[str(p.relative_to(ROOT)) for p in DOCUMENTS])


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(path.read_text()) if kind == language]


def test_the_documents_are_found():
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {'README.md', 'CHANGELOG.md', 'docs/README.md', 'docs/operators.md', 'configs/boxer/README.md'} <= names


@every_document
def test_links_lead_somewhere(path):
    targets = [link.split('#')[0] for link in LINK.findall(path.read_text()) if '://' not in link]
    assert [target for target in targets if not (path.parent / target).exists()] == []


@every_document
def test_named_files_exist(path):
    text = path.read_text()
    assert [name for name in FILE.findall(text) if not (ROOT / name).exists()] == []
    configs = {file.name for file in (ROOT / 'configs').rglob('*.py')}
    assert [name for name in MIM_CONFIG.findall(text) if name not in configs] == []


@every_document
def test_python_runs(path, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, '_HANDLERS', {})  # an example may add a handler of golden cases
    for number, code in enumerate(blocks(path, 'python')):
        if 'work_dirs/' in code:  # needs a trained model
            compile(code, f'{path.name}, block {number}', 'exec')
        elif '_base_' in code:  # a config
            file = tmp_path / f'config_{number}.py'
            file.write_text(code)
            assert Config.fromfile(file).model.type == 'boltz_mm.BoxeR'
        else:
            exec(compile(code, f'{path.name}, block {number}', 'exec'), {})


def test_every_tool_is_in_the_index():
    index = (ROOT / 'docs' / 'README.md').read_text()
    tools = [
        path.relative_to(ROOT / 'tools')
        for folder in ('.', 'analysis_tools', 'dataset_converters', 'model_converters', 'misc')
        for path in (ROOT / 'tools' / folder).glob('*')
        if path.suffix in ('.py', '.sh')
    ]
    private = {'demo.sh', 'misc/setup_env.py'}  # make calls them
    assert [str(tool) for tool in tools if str(tool) not in private and f'{tool}`' not in index] == []
