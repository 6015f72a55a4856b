"""Sdist and wheel have the files that git has, and no others: ``python .ci/contents.py SDIST WHEEL``."""

import subprocess
import sys
import tarfile
import zipfile

import adaptbatch

ROOT = f"adaptbatch-{adaptbatch.__version__}"
BESIDE = ["CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml"]


def tracked(*paths: str) -> set[str]:
    return set(subprocess.run(["git", "ls-files", *paths], check=True, capture_output=True, text=True).stdout.split())


def expect(name: str, found: set[str], wanted: set[str]) -> None:
    print(f"{name}: {len(found)} files")
    if found != wanted:
        sys.exit(f"{name} has too much {sorted(found - wanted)} and lacks {sorted(wanted - found)}")


wheel = next(path for path in sys.argv[1:] if path.endswith(".whl"))
sdist = next(path for path in sys.argv[1:] if path.endswith(".tar.gz"))
package = tracked("adaptbatch")
with zipfile.ZipFile(wheel) as file:
    names = {name for name in file.namelist() if not name.startswith(f"{ROOT}.dist-info/")}
expect("wheel", names, package)
assert "adaptbatch/py.typed" in names
with tarfile.open(sdist) as file:
    names = {name.removeprefix(f"{ROOT}/") for name in file.getnames()}
# Of hatchling: the metadata, and the file that says what git ignores.
expect("sdist", names, package | tracked("tests", *BESIDE) | {"PKG-INFO", ".gitignore"})
