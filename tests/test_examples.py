"""The finder of Python in the documentation overlooks nothing, and failures count."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = ROOT / ".ci" / "examples.py"


def load():
    spec = importlib.util.spec_from_file_location("examples", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


examples = load()


@pytest.mark.parametrize("page", examples.pages(), ids=lambda path: path.stem)
def test_every_block_is_found(page):
    text = page.read_text(encoding="utf-8")
    _, run, left = examples.blocks(text)
    fences = re.findall(r"^ *```(?:python|py|pycon)\b", text, re.MULTILINE)
    assert run + left == len(fences)
    # A mark that stands before anything but a block is a slip.
    assert left == text.count("<!-- not run:")


TEXT = """# Page

```python
a = 1
```

- in a list

  ```python
  assert a == 1
  ```

<!-- not run: needs another library -->
```python
raise ValueError
```
"""


def test_blocks_run_on_their_lines_and_marked_ones_do_not():
    code, run, left = examples.blocks(TEXT)
    assert (run, left) == (2, 1)
    assert code.splitlines()[3] == TEXT.splitlines()[3] == "a = 1"
    assert code.splitlines()[9] == "assert a == 1"
    assert "raise" not in code


@pytest.mark.parametrize(("code", "status"), [("assert True", 0), ("assert False", 1)])
def test_a_failing_block_fails(code, status, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"```python\n{code}\n```\n")
    command = [sys.executable, str(PROGRAM), "--execute", str(page)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == status
