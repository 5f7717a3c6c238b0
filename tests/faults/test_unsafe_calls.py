"""No module can run code that it reads: a search in every syntax tree, and in samples.

A checkpoint, a data set or a configuration may come from a stranger, so nothing in the product
unpickles, evaluates text, or passes a string to a shell.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    [*ROOT.glob("rdm_fast/**/*.py"), *ROOT.glob("kernels/rdm_kernels/**/*.py"), *ROOT.glob("*.py")]
)
FORBIDDEN_IMPORTS = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("torch.distributed.checkpoint", "torch.package"),
}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    *("os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("yaml.unsafe_load_all", "yaml.full_load_all", "subprocess.getoutput"),
}
SAFE_SHELL = ("shell", False)
SAFE_NUMPY = ("allow_pickle", False)
SAFE_TORCH = ("weights_only", True)


def dotted(node: ast.expr) -> str:
    """`torch.load` of an attribute; "" of anything but a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What of the tree is forbidden, with its line."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            names = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            for name in {module, *names}:
                if any(name == bad or name.startswith(f"{bad}.") for bad in FORBIDDEN_IMPORTS):
                    yield f"line {line}: import of {name}"
                if name in FORBIDDEN_ATTRIBUTES | {"torch.load", "numpy.load"}:
                    yield f"line {line}: {name} under a name of its own"
        elif isinstance(node, ast.Attribute) and dotted(node) in FORBIDDEN_ATTRIBUTES:
            yield f"line {line}: {dotted(node)}"
        elif isinstance(node, ast.Call):
            yield from unsafe_call(node, line)


def unsafe_call(node: ast.Call, line: int) -> Iterator[str]:
    name = dotted(node.func)
    options = {
        word.arg: word.value.value if isinstance(word.value, ast.Constant) else ...
        for word in node.keywords
    }
    if name in FORBIDDEN_NAMES:
        yield f"line {line}: {name}()"
    for option, safe in (SAFE_SHELL, SAFE_NUMPY):
        if option in options and options[option] is not safe:
            yield f"line {line}: {option} is not {safe}"
    if name == "torch.load" and options.get(SAFE_TORCH[0]) is not SAFE_TORCH[1]:
        yield f"line {line}: torch.load without weights_only=True"


UNSAFE = """
import pickle
import pickle as p
from pickle import loads
import torch.distributed.checkpoint as dcp
from torch.distributed import checkpoint
from torch import load
torch.load(path)
torch.load(path, weights_only=False)
torch.load(path, weights_only=option)
numpy.load(path, allow_pickle=True)
np.load(path, allow_pickle=option)
yaml.load(text, yaml.Loader)
from yaml import unsafe_load
read = yaml.full_load
eval(text)
exec(text)
subprocess.run(text, shell=True)
os.system(text)
"""
SAFE = """
model.eval()
torch.load(path, weights_only=True)
np.load(path)
np.load(path, allow_pickle=False)
yaml.safe_load(text)
torch.compile(model)
re.compile(text)
from rdm_fast import checkpoint
"""


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])
def test_a_module_never_runs_what_it_reads(path: Path) -> None:
    assert list(unsafe(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_the_search_finds_what_is_unsafe_and_nothing_else() -> None:
    assert [line for line in UNSAFE.strip().split("\n") if not list(unsafe(ast.parse(line)))] == []
    assert list(unsafe(ast.parse(SAFE))) == []
