"""Smoke test of the installed package: what it holds, and README's program.

``PYTHON .ci/smoke.py README.md``, with the interpreter of the environment that it is installed in.
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path

import adaptbatch

installed = Path(adaptbatch.__file__).parent
assert installed.is_relative_to(sys.prefix), f"{installed} is not the installed package"
assert (installed / "py.typed").is_file()
assert version("adaptbatch") == adaptbatch.__version__
for name in adaptbatch.__all__:
    getattr(adaptbatch, name)

(program,) = re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL)
names = {}
exec(program, names)
table = names["controller"].history.to_pandas()
assert table["examples_seen"].iloc[-1] == names["epochs"] * len(names["data"]), table
print(f"adaptbatch {adaptbatch.__version__}: {len(table)} windows, {table['examples_seen'].iloc[-1]:.0f} examples")
