"""Rules about the source tree that no linter holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAPPED_FOLDERS = ("evaluators", "kernels", "search", "studies")
SOURCE_FOLDERS = ("autoq", *MAPPED_FOLDERS, "tests", "benchmarks")
UNSAFE_MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
# Assembled, so that this file does not hold what it looks for.
REGISTRY_HOSTS = tuple(".".join(parts) for parts in [("pypi", "org"), ("pythonhosted", "org")])
TEXT_SUFFIXES = {"", ".cfg", ".ini", ".md", ".mako", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
GENERATED_FOLDERS = {"build", "demo", "dist", "work"}


def python_files() -> list[Path]:
    """Every Python file of the project, once."""
    found = {path.resolve() for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert len(found) > 50, "the walk has lost the source folders"
    return sorted(found)


def text_files() -> Iterator[Path]:
    """Every text file of the project outside hidden and generated folders."""
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts)
        if hidden or parts[0] in GENERATED_FOLDERS or path.suffix not in TEXT_SUFFIXES:
            continue
        if path.is_file():
            yield path


def violations(tree: ast.AST) -> Iterator[str]:
    """What runs code from data, or could."""
    for node in ast.walk(tree):
        yield from _unsafe_imports(node)
        if isinstance(node, ast.Call):
            yield from _unsafe_call(node)


def _unsafe_imports(node: ast.AST) -> Iterator[str]:
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module]
    for name in names:
        if name.partition(".")[0] in UNSAFE_MODULES:
            yield f"imports {name}"


def _unsafe_call(call: ast.Call) -> Iterator[str]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    called = ast.unparse(call.func)
    if called in {"eval", "exec"}:
        yield f"calls {called}()"
    if called == "torch.load" and not _is_constant(keywords.get("weights_only"), True):
        yield "calls torch.load() without weights_only=True"
    if called.endswith("load") and _is_constant(keywords.get("allow_pickle"), True):
        yield f"calls {called}() with allow_pickle=True"
    if _is_constant(keywords.get("trust_remote_code"), True):
        yield f"calls {called}() with trust_remote_code=True"


def _is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_file_runs_code_from_data() -> None:
    found = [
        f"{path.relative_to(ROOT)} {violation}"
        for path in python_files()
        for violation in violations(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval('1')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_rule_catches(source: str) -> None:
    assert list(violations(ast.parse(source)))


@pytest.mark.parametrize(
    "source", ["model.eval()", "torch.load(path, weights_only=True)", "import json"]
)
def test_rule_lets_pass(source: str) -> None:
    assert not list(violations(ast.parse(source)))


def test_no_file_names_a_package_registry() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in text_files()
        if any(host in path.read_text(encoding="utf-8") for host in REGISTRY_HOSTS)
    ]
    assert not found, "pip's own configuration says where packages come from"


@pytest.mark.parametrize("folder", MAPPED_FOLDERS)
def test_top_level_folder_is_mapped_into_the_package(folder: str) -> None:
    link = ROOT / "autoq" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_folder_is_not_a_package_of_its_own(folder: str) -> None:
    # `kernels` is a package that transformers looks for; ours must never be found in its place.
    assert not (ROOT / folder / "__init__.py").exists()
