"""Run the Python of README.md and of every page of docs/: `.ci/examples.py [PAGE ...]`.

The blocks of a page run in order and in one namespace, each page in a process of its
own, since some switch float64 on. A block that cannot run has a line before it that
says why:

    <!-- not run: needs TorchDEQ -->
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
FENCE = re.compile(
    r"^(?P<mark><!-- not run: [^\n]+ -->\n)?(?P<indent> *)```(?:python|py)\b[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)```",
    flags=re.MULTILINE | re.DOTALL,
)


def pages():
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text):
    """The program of a page, on the lines it has there; its blocks; those left out."""
    lines = [""] * (text.count("\n") + 1)
    run = left = 0
    for match in FENCE.finditer(text):
        if match["mark"]:
            left += 1
            continue
        run += 1
        first = text.count("\n", 0, match.start("code"))
        width = len(match["indent"])
        for number, line in enumerate(match["code"].splitlines(), first):
            lines[number] = line[width:]
    return "\n".join(lines), run, left


def execute(name):
    """Run a page in this process."""
    code, _, _ = blocks(pathlib.Path(name).read_text(encoding="utf-8"))
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


def run_all(arguments):
    """Run the pages named, or all of them, and exit with 1 if one fails."""
    chosen = [pathlib.Path(name).resolve() for name in arguments] or pages()
    failed = []
    for page in chosen:
        _, run, left = blocks(page.read_text(encoding="utf-8"))
        name = page.relative_to(ROOT)
        if run:
            command = [sys.executable, "-W", "error", __file__, "--execute", str(page)]
            if subprocess.run(command, cwd=ROOT, check=False).returncode:
                failed.append(str(name))
        if run or left:
            print(f"{name}: {run} blocks ran, {left} marked as not run", flush=True)
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--execute"]:
        execute(sys.argv[2])
    else:
        run_all(sys.argv[1:])
