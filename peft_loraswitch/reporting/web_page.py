"""Routed texts as one web page: no script, nothing to load, readable in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .colours import LINES, PALETTE, place
from .routes import RoutedText, RoutedToken, Totals, choices_line, summary_line

# --c is an expert's colour, --p the probability of the choice, --most how strong a colour may be behind text
STYLE = """
:root { color-scheme: light dark; --most: .62; --text: #16181d; --page: #fff; --quiet: #5b6270; --edge: #d5d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --most: .45; --text: #eceef2; --page: #14161a; --quiet: #a3aab8; --edge: #3a3f4a; }
}
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--text); background: var(--page);
  font: 1rem/1.6 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2rem 0 .3rem; }
.names { display: flex; flex-wrap: wrap; gap: .4rem; padding: 0; list-style: none; }
.names li { padding: 0 .5rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; border: 1px solid var(--edge); border-radius: 6px;
  padding: .8rem 1rem; }
.t, .names li { background: rgba(var(--c), calc(var(--p, 1) * var(--most))); border-bottom: 2px var(--l) rgb(var(--c)); }
.t:hover { outline: 1px solid var(--text); }
.s { opacity: .65; font-size: .85em; }
.n { display: none; font-size: .65em; vertical-align: super; color: var(--quiet); }
#n:checked ~ section .n { display: inline; }
.bar { display: flex; height: 1.1rem; border-radius: 4px; overflow: hidden; border: 1px solid var(--edge); }
.bar span { background: rgb(var(--c)); border-bottom: var(--w) var(--l) var(--page); box-sizing: border-box; }
.sum { color: var(--quiet); font-size: .85rem; margin: .3rem 0; }
"""


def rendered(names: Sequence[str], has_base: bool, texts: Sequence[RoutedText], total: Totals, title: str) -> str:
    """The whole page. `names`: of the experts; with `has_base` the last is the base expert, which is grey."""
    colours = "\n".join(_rule(index, has_base and index == len(names) - 1) for index in range(len(names)))
    legend = "".join(f'<li class="e{index}">{escape(name)}</li>' for index, name in enumerate(names))
    sections = [
        f'<section>\n<h2>Text {number}</h2>\n{_shares(names, text.totals)}\n<div class="text">'
        f"{_tokens(names, text.tokens)}</div>\n</section>"
        for number, text in enumerate(texts, 1)
    ]
    head = escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{head}</title>
<style>{STYLE}{colours}
</style>
</head>
<body>
<h1>{head}</h1>
<p class="sum">Each token has the colour of its best expert, stronger where the router is surer. Point at a token for all
probabilities and gates.</p>
<ul class="names">{legend}</ul>
<input type="checkbox" id="n"> <label for="n">names where the expert changes</label>
<section>
<h2>All texts</h2>
{_shares(names, total)}
</section>
{chr(10).join(sections)}
</body>
</html>
"""


def _rule(index: int, is_base: bool) -> str:
    colour, line = place(index)
    red, green, blue = (128, 128, 128) if is_base else PALETTE[colour][0]
    style, width = (
        (LINES[0], 0) if is_base or not line else (LINES[line], 4)
    )  # of bars, only where a colour comes again
    return f".e{index} {{ --c: {red}, {green}, {blue}; --l: {style}; --w: {width}px; }}"


def _shares(names: Sequence[str], totals: Totals) -> str:
    bars = "".join(
        f'<span class="e{index}" style="width:{share:.2%}" title="{escape(names[index])} {share:.1%}"></span>'
        for index, share in enumerate(totals.shares)
        if share > 0
    )
    return f'<div class="bar">{bars}</div>\n<p class="sum">{escape(summary_line(names, totals))}</p>'


def _tokens(names: Sequence[str], tokens: Sequence[RoutedToken]) -> str:
    parts, last = [], None
    for token in tokens:
        expert = token.experts[0]
        name = f'<span class="n">{escape(names[expert])}&nbsp;</span>' if expert != last else ""
        last = expert
        lines = [_shown(line) for line in token.text.split("\n")]
        body = (
            '<span class="s">\N{RETURN SYMBOL}</span>\n'.join(lines) if token.text else _shown("\N{MIDDLE DOT}", True)
        )
        title = escape(choices_line(names, token)).replace("\n", "&#10;")
        sure = token.probabilities[expert]
        parts.append(f'{name}<span class="t e{expert}" style="--p:{sure:.2f}" title="{title}">{body}</span>')
    return "".join(parts)


def _shown(text: str, quiet: bool = False) -> str:
    """Escaped; characters that are not seen, and no browser may get, by their code."""
    text = "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)
    return f'<span class="s">{escape(text)}</span>' if quiet else escape(text)
