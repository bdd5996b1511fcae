"""Make the notebooks from their scripts: `python notebooks/make.py [NAME ...]`.

The scripts `NN_name.py` are the sources, in jupytext's percent format. Each becomes
`NN_name.ipynb`, executed in a fresh kernel, with its outputs. The site shows these.
Without a name, all are made. `--stale` makes those whose script has changed.
"""

import argparse
import base64
import io
import pathlib
import time

import jupytext
import nbclient
import nbformat
from PIL import Image

HERE = pathlib.Path(__file__).parent
LARGEST_IMAGE = 60 * 1024  # bytes; CI's test holds it too


def scripts():
    """The scripts of all notebooks, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def from_script(script):
    """The notebook of a script, not executed."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext draws them at random
        cell.metadata = nbformat.from_dict({})
    return notebook


def sources(notebook):
    """What script and notebook have to agree on: kind and text of every cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def is_stale(script):
    """Whether the stored notebook is missing, or is not that of the script."""
    stored = script.with_suffix(".ipynb")
    if not stored.exists():
        return True
    return sources(nbformat.read(stored, as_version=4)) != sources(from_script(script))


def execute(notebook, timeout=600):
    """Run every cell in a fresh kernel, in the folder of the notebooks."""
    client = nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(HERE)}},
    )
    client.execute()


def with_small_images(png):
    """A PNG, base64, with at most 64 colours: a figure needs no more."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image = image.quantize(64, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def tidy(notebook):
    """Remove what changes from run to run, and make the images small."""
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = with_small_images(data["image/png"])
                data.pop("text/plain", None)
                output.metadata = nbformat.from_dict({})
                size = len(base64.b64decode(data["image/png"]))
                if size > LARGEST_IMAGE:
                    raise ValueError(
                        f"an image of {size} bytes, above {LARGEST_IMAGE}: draw fewer "
                        f"points or a smaller figure in\n{cell.source}"
                    )


def make(script):
    """Write the executed notebook of a script; return the seconds it took."""
    notebook = from_script(script)
    start = time.perf_counter()
    execute(notebook)
    seconds = time.perf_counter() - start
    tidy(notebook)
    nbformat.write(notebook, script.with_suffix(".ipynb"))
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="as 01 or 01_quickstart; all if none")
    parser.add_argument("--stale", action="store_true", help="only where they differ")
    arguments = parser.parse_args()
    chosen = [
        script
        for script in scripts()
        if not arguments.names
        or any(script.stem.startswith(name) for name in arguments.names)
    ]
    if not chosen:
        parser.error(f"no script in {HERE} is called any of {arguments.names}")
    for script in chosen:
        if arguments.stale and not is_stale(script):
            continue
        print(f"{script.stem}: {make(script):.0f} s", flush=True)


if __name__ == "__main__":
    main()
