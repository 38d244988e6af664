"""Builds the wheel, installs it away from the checkout, and uses it there: `make wheel`.

What only the checkout holds (an import of a bare folder name, a package that the list forgot, a
file that no wheel takes along) shows here and nowhere else.
"""

import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("homefire", "client", "common", "server", "simulations")
MUST_HOLD = ("homefire/py.typed", "homefire/__main__.py", "homefire/client/app.py")

USE = """
import importlib, pkgutil, runpy, sys
target, listed = sys.argv[1], sys.argv[2].split(",")
sys.path.insert(0, target)
import homefire
modules = ["homefire"]
modules += [m.name for m in pkgutil.walk_packages(homefire.__path__, "homefire.")]
assert set(listed) <= set(modules), f"missing: {set(listed) - set(modules)}"
for name in modules:
    if name != "homefire.__main__":
        importlib.import_module(name)
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] == "homefire":
        assert module.__file__.startswith(target), f"{name} comes from {module.__file__}"
print(f"{len(modules)} modules imported", flush=True)
plan = ["privacy", "plan"]
run = "--users 1000 --cohort 50 --rounds 20 --epsilon 8 --json".split()
for arguments in (["--help"], [*plan, "--help"], [*plan, *run]):
    sys.argv = ["homefire", *arguments]
    try:
        runpy.run_module("homefire", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, f"{arguments}: exit code {ended.code}"
"""


class WheelError(Exception):
    """The wheel is wrong."""


def main() -> None:
    """Check the wheel; the exit code says how it went."""
    try:
        with tempfile.TemporaryDirectory(prefix="homefire-wheel-") as folder:
            name = check(Path(folder).resolve())
    except WheelError as error:
        sys.exit(f"The wheel is wrong: {error}")
    print(f"{name}: installs and runs away from the checkout")


def check(folder: Path) -> str:
    """Build, look inside, install, use.

    Raises:
        WheelError: Any of it failed.
    """
    wheel = build(folder)
    listed = packages()
    look_inside(wheel, listed)
    target, elsewhere = folder / "target", folder / "elsewhere"
    elsewhere.mkdir()
    pip = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    run("-m", *pip, str(wheel), cwd=elsewhere)
    output = run("-I", "-c", USE, str(target), ",".join(listed), cwd=elsewhere)
    for word in ("simulate", "--participations", '"epsilon_known_cohort"'):
        if word not in output:
            raise WheelError(f"`python -m homefire` does not say {word}:\n{output}")
    return wheel.name


def build(folder: Path) -> Path:
    """Build from a copy, so that nothing is left in the checkout and nothing stale gets in.

    Raises:
        WheelError: A file is missing, or the build failed.
    """
    source, output = folder / "source", folder / "dist"
    source.mkdir()
    for name in FILES:
        if not (ROOT / name).is_file():
            raise WheelError(f"{name} is missing")
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    build_command = ["build", "--wheel", "--no-isolation", "--outdir", str(output), str(source)]
    run("-m", *build_command, cwd=folder)
    wheels = list(output.glob("*.whl"))
    if len(wheels) != 1:
        raise WheelError(f"the build made {len(wheels)} wheels")
    return wheels[0]


def packages() -> list[str]:
    """The packages that pyproject.toml lists."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed: list[str] = tomllib.load(file)["tool"]["setuptools"]["packages"]
    return listed


def look_inside(wheel: Path, listed: list[str]) -> None:
    """Compare the wheel's files with what they should be.

    Raises:
        WheelError: Something is missing, or something is there that should not be.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {*MUST_HOLD, *(f"{name.replace('.', '/')}/__init__.py" for name in listed)}
    if missing := sorted(wanted - names):
        raise WheelError(f"{missing[0]} is missing")
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        raise WheelError("LICENSE is missing")
    for name in sorted(names):
        top = name.partition("/")[0]
        if top != "homefire" and not top.endswith(".dist-info"):
            raise WheelError(f"{name} would be installed outside of the package")
        if "/test" in name or name.endswith("conftest.py"):
            raise WheelError(f"{name} is a test")


def run(*arguments: str, cwd: Path) -> str:
    """Run Python; returns what it printed.

    Raises:
        WheelError: It failed.
    """
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)  # noqa: S603
    if result.returncode:
        raise WheelError(f"{arguments[:2]} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


if __name__ == "__main__":
    main()
