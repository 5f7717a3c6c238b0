"""The rules about files that no other tool checks: layout, imports, what may stand in a file."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"rdm_fast": ROOT / "rdm_fast", "rdm_kernels": ROOT / "kernels" / "rdm_kernels"}
MODULES = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))
MAX_LINES = 350

# The wings of rdm_fast in the order in which data flows: each imports only from itself and from
# those before it.
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
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found += [
            f"{path}:{number}: {line.strip()}"
            for number, line in enumerate(text.splitlines(), start=1)
            if pattern.search(line)
        ]
    return found


def imported(path: Path) -> list[str]:
    """Dotted names that a module imports, at any depth: a lazy import is an import."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: imports are absolute here"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_the_kernels_folder_is_not_a_package() -> None:
    """`python train.py` puts the checkout first on sys.path; an __init__.py here would make
    every `import kernels` in the process find this folder, not Hugging Face's package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_wheel_ships_both_packages_and_their_types() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["rdm_fast", "kernels/rdm_kernels"]}
    assert all((folder / "py.typed").exists() for folder in PACKAGES.values())
    assert pyproject["project"]["scripts"] == {"rdm": "rdm_fast.cli.commands:main"}


def test_modules_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n >= MAX_LINES}
    assert not long, f"modules of {MAX_LINES} lines or more: {long}"


def test_every_module_lives_in_a_known_room() -> None:
    entries = [path for path in PACKAGES["rdm_fast"].iterdir() if path.name[0] != "_"]
    rooms = {path.stem for path in entries if path.is_dir() or path.suffix == ".py"}
    unknown = rooms - {*ROOMS}
    assert not unknown, f"give {unknown} a place in ROOMS"


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


def test_the_kernels_know_nothing_of_the_trainer() -> None:
    for path in PACKAGES["rdm_kernels"].rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] == "rdm_fast"], path


def test_nothing_loads_what_could_run_code() -> None:
    """Checkpoints and data sets come from strangers: no pickle, whatever the library."""
    for path in [*MODULES, ROOT / "train.py", ROOT / "eval_linear.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"pickle", "marshal", "shelve", "dill"} & {
            name.split(".")[0] for name in imported(path)
        }, path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
            where = f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
            assert keywords.get("allow_pickle", "False") == "False", where
            assert keywords.get("shell", "False") == "False", where
            match ast.unparse(call.func):
                case "torch.load":
                    assert keywords.get("weights_only") == "True", where
                case "yaml.load" | "yaml.unsafe_load" | "eval" | "exec":
                    pytest.fail(where)


def test_a_command_line_is_checked_without_torch() -> None:
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
    """The fenced block that names pyproject.toml: all that is there, and nothing that is not."""
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    trees = [block for block in blocks if "pyproject.toml" in block]
    assert len(trees) == 1, "README.md has one block with the file tree"
    named = {name.rstrip("/") for name in re.findall(r"[\w.-]+/?", trees[0])}

    files = tracked()
    top = {path.parts[0] for path in files}
    rooms = {
        path.relative_to(folder).parts[0]
        for folder in (Path("rdm_fast"), Path("kernels/rdm_kernels"))
        for path in files
        if path.is_relative_to(folder)
    }
    expected = {name for name in top if not name.startswith(".")} | rooms
    missing = expected - {"__init__.py", "py.typed"} - named
    assert not missing, f"not in README.md's file tree: {sorted(missing)}"

    parts = {part for path in files for part in path.parts}
    first = [re.match(r"[\s│├└─]*([\w.-]+)(/?)", line) for line in trees[0].splitlines()]
    paths = {m[1] for m in first if m and (m[2] or "." in m[1])}
    assert paths <= parts, f"in README.md's file tree only: {sorted(paths - parts)}"
