"""Pages of the site from notebooks/, with the outputs that are stored in them."""

import pathlib
import re
from typing import Any

import nbconvert
import nbformat
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every notebook, and its images. Called by mkdocs."""
    exporter = nbconvert.MarkdownExporter()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        resources = {"unique_key": path.stem}
        text, resources = exporter.from_notebook_node(notebook, resources)
        # Links from notebooks/ to docs/ are links within the site.
        text = text.replace("](../docs/", "](../")
        text = re.sub(r"(\]\([\w/]+)\.ipynb\)", r"\1.md)", text)
        name = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, name, content=_with_source(text, path)))
        for image, data in resources["outputs"].items():
            generated = File.generated(config, f"notebooks/{image}", content=data)
            files.append(generated)
    return files


def _with_source(text: str, path: pathlib.Path) -> str:
    """The page, with a line below its title that says where it comes from."""
    title, _, rest = text.lstrip().partition("\n")
    note = f"*This page is the notebook `notebooks/{path.name}`, with its outputs.*"
    return f"{title}\n\n{note}\n{rest}"
