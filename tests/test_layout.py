"""Rules about files that no other tool checks: layout, imports, forbidden content."""

import ast
import contextlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"rdm_fast": ROOT / "rdm_fast", "rdm_kernels": ROOT / "kernels" / "rdm_kernels"}
MODULES = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))
MAX_LINES = 350

# The parts of rdm_fast: each imports only from itself and from those before it.
ROOMS = [
    "errors", "config", "optim", "runtime", "run", "models", "filters", "data", "spectrum",
    "telemetry", "methods", "evaluation", "training", "tools", "cli",
]  # fmt: skip

MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home/\w+|Users/\w+)\b")
REGISTRY = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|index[-_]url|find[-_]links"
    r"|https?://[^/\s]*(?:pypi|registry|artifactory|mirror)"
)


def tracked() -> list[Path]:
    """Files in version control or about to be, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are tracked is unknown")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    return [Path(name) for name in listed if name and (ROOT / name).is_file()]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    """Every line of a tracked text file in which the pattern occurs."""
    found = []
    for path in tracked():
        with contextlib.suppress(UnicodeDecodeError):  # a picture
            lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
            found += [f"{path}: {line.strip()}" for line in lines if pattern.search(line)]
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> list[str]:
    """Dotted names that a module imports, at any depth: a lazy import is an import."""
    names = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: imports are absolute here"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_the_kernels_folder_is_not_a_package() -> None:
    """With an __init__.py, `import kernels` would find this folder instead of Hugging Face's
    package, since `python train.py` puts the checkout first on sys.path."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_wheel_ships_both_packages_and_their_types() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["rdm_fast", "kernels/rdm_kernels"]}
    assert all((folder / "py.typed").exists() for folder in PACKAGES.values())
    assert pyproject["project"]["scripts"] == {"rdm": "rdm_fast.__main__:main"}


def test_modules_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n >= MAX_LINES}
    assert not long, f"modules of {MAX_LINES} lines or more: {long}"


def test_rdm_fast_has_no_loose_modules() -> None:
    entries = {path.name for path in PACKAGES["rdm_fast"].iterdir() if path.name[0] != "_"}
    assert entries - {"py.typed"} == {"errors.py", *ROOMS[1:]}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    folder = PACKAGES["rdm_fast"]
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for path in [folder / f"{room}.py", *(folder / room).rglob("*.py")]:
        for name in imported(path) if path.exists() else []:
            package, _, rest = name.partition(".")
            assert package != "rdm_fast" or rest.split(".")[0] in (*allowed, "__version__"), (
                f"{path.relative_to(ROOT)} imports {name}, which comes after {room}"
            )


def test_the_kernels_do_not_import_the_trainer() -> None:
    for path in PACKAGES["rdm_kernels"].rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] == "rdm_fast"], path


def test_no_file_is_loaded_in_a_way_that_can_run_code() -> None:
    """Checkpoints and data sets are untrusted: no pickle, through any library."""
    for path in [*MODULES, ROOT / "train.py", ROOT / "eval_linear.py"]:
        assert not {"pickle", "marshal", "shelve", "dill"} & {
            name.split(".")[0] for name in imported(path)
        }, path
        for call in (node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)):
            keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
            where = f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
            assert keywords.get("allow_pickle", "False") == "False", where
            assert keywords.get("shell", "False") == "False", where
            match ast.unparse(call.func):
                case "torch.load":
                    assert keywords.get("weights_only") == "True", where
                case "yaml.load" | "yaml.unsafe_load" | "eval" | "exec":
                    pytest.fail(where)


def test_configuration_does_not_import_torch() -> None:
    program = (
        "import sys, rdm_fast.config, rdm_fast.config.recipes, rdm_fast.errors;"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_no_file_names_a_path_of_one_machine() -> None:
    assert not lines_matching(MACHINE_PATH)


def test_no_file_names_a_package_registry() -> None:
    assert not lines_matching(REGISTRY)


def test_the_readme_tree_is_complete_and_true() -> None:
    """It names every entry of the root and every wing, and no path that does not exist."""
    files = tracked()
    blocks = (ROOT / "README.md").read_text("utf-8").split("```")[1::2]
    (tree,) = (block for block in blocks if "pyproject.toml" in block)
    paths = {word.rstrip("/") for word in tree.split() if re.search(r"\w/$|\w\.\w", word)}
    named = {*tree.split(), *(part for path in paths for part in path.split("/"))}
    top = {path.parts[0] for path in files if path.parts[0][0] != "."}
    wings = {
        path.parts[1] for path in files if path.parts[0] == "rdm_fast" and path.parts[1][0] != "_"
    }
    missing = (top | wings) - {"py.typed"} - named
    assert not missing, f"not in README.md's file tree: {sorted(missing)}"
    absent = [
        path
        for path in paths
        if not any((base / path).exists() for base in (ROOT, *PACKAGES.values()))
    ]
    assert not absent, f"only in README.md's file tree: {absent}"
