import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in requirements}


DECLARED = names(PROJECT["dependencies"])
OPTIONAL = set().union(*map(names, PROJECT["optional-dependencies"].values()))


def imported() -> dict[str, set[str]]:
    """Top-level modules that the package imports, and the files that do."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "srrl_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: a relative import"
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(file.name)
    return found


def imports() -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports, within functions too."""
    paths = {}
    for file in (ROOT / "srrl_jax").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    found = {}
    for module, file in paths.items():
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        wanted = {(f"{node.module}.{alias.name}", node.module) for node in nodes for alias in node.names}
        found[module] = {name if name in paths else parent for name, parent in wanted} & paths.keys()
    return found


def loop(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, one behind the other; none where there is no ring."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name not in done:
            for other in sorted(arrows.get(name, ())):
                if ring := search(other, [*path, name]):
                    return ring
            done.add(name)
        return []

    return next((ring for name in sorted(arrows) if (ring := search(name, []))), [])


def test_no_module_and_no_room_imports_itself_by_way_of_others():
    """The package's own `__init__` apart, which names its rooms without importing them."""
    assert loop({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    arrows = {module: names for module, names in imports().items() if module != "srrl_jax"}
    assert loop(arrows) == []
    rooms: dict[str, set[str]] = {}
    for module, names in arrows.items():
        room = ".".join(module.split(".")[:2])
        rooms.setdefault(room, set()).update(".".join(name.split(".")[:2]) for name in names)
    assert loop({room: names - {room} for room, names in rooms.items()}) == []


def test_the_fixed_libraries_are_declared_and_used():
    fixed = {
        "jax": "jax",
        "flax": "flax",
        "optax": "optax",
        "orbax-checkpoint": "orbax",
        "transformers": "transformers",
        "datasets": "datasets",
        "sentencepiece": "sentencepiece",
        "tensorflow-datasets": "tensorflow_datasets",
    }
    assert fixed.keys() <= DECLARED
    assert set(fixed.values()) <= imported().keys()


def test_every_import_is_of_a_declared_dependency():
    providers = packages_distributions()
    for name, files in imported().items():
        if name in sys.stdlib_module_names or name == "srrl_jax":
            continue
        owners = {normal(owner) for owner in providers.get(name, [])}
        if not owners and any(extra.startswith(normal(name)) for extra in OPTIONAL):
            continue  # of an extra that is not installed
        assert owners & (DECLARED | OPTIONAL), (
            f"{name} ({', '.join(sorted(files))}) is of {owners or 'nothing installed'}"
        )


# What users import, where all types must be right; of the other rooms what is surely wrong is found.
TYPED = (
    "errors.py losses.py programs.py storage.py rubrics data/order.py data/select.py grading/asking.py "
    "grading/config.py grading/judge.py grading/voting.py models/config.py models/presets.py models/tree.py "
    "sampling/shapes.py sampling/tokens.py training/config.py training/own.py training/rewards.py "
    "training/settings.py"
).split()


@pytest.mark.parametrize(("preset", "files"), [("default", TYPED), ("basic", [""])])
def test_types(preset, files):
    command = [Path(sys.executable).with_name("pyrefly"), "check", "--preset", preset]
    command += ["--python-interpreter-path", sys.executable, "--output-format", "min-text"]
    command += [str(ROOT / "srrl_jax" / file) for file in files]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rubrics_alone_import_neither_jax_nor_numpy():
    script = (
        "import sys, srrl_jax.rubrics; "
        "print([m for m in ('jax', 'numpy', 'flax', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_what_the_package_exports_can_be_reached_from_it():
    import srrl_jax

    for name in srrl_jax.__all__:
        assert getattr(srrl_jax, name).__name__ in (f"srrl_jax.{name}", name)


def test_importing_the_package_takes_a_fifth_of_a_second_at_most():
    script = (
        "import sys, time; t = time.perf_counter(); import srrl_jax; "
        "print(time.perf_counter() - t, len(sys.modules))"
    )
    seconds, modules = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert float(seconds) < 0.2 and int(modules) < 300


def test_no_recipe_names_a_path_outside_of_the_package():
    from srrl_jax.starting import recipes

    assert len(recipes()) > 5
    for path in recipes().values():
        for line in path.read_text().splitlines():
            value = line.partition("#")[0].partition(":")[2].strip()
            assert not value.startswith(("..", "/", "~")), f"{path}: {line}"
            if value.startswith("package:"):
                assert (ROOT / "srrl_jax" / value.removeprefix("package:")).exists(), f"{path}: {line}"


def test_the_names_of_the_readme_example_exist():
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for block in blocks:
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


def test_the_files_that_the_readme_names_exist():
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\b(?:scripts|configs|srrl_jax)/[\w./]*\w", readme))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
