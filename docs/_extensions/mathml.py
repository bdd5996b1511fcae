"""Formulas as MathML, which browsers set by themselves: no script, and no network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of a formula, in a paragraph or between paragraphs.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Replace the TeX of a page. Called by mkdocs."""
    return _FORMULA.sub(_formula, content)


def _formula(match: re.Match[str]) -> str:
    tag, tex = match[1], html.unescape(match[2]).strip()
    display = "block" if tex.startswith("\\[") else "inline"
    result = convert(tex[2:-2].strip(), display=display)
    # What the converter does not know it leaves as it is.
    unknown = re.findall(r"\\[A-Za-z|]+|>&<|>&amp;<", result)
    if unknown:
        raise ValueError(f"no MathML for {unknown} in the formula {tex}")
    return f'<{tag} class="arithmatex">{result}</{tag}>'
