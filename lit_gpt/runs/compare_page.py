"""The page of a comparison: one HTML file with its picture in it, which makes no request and runs no script."""

from __future__ import annotations

from html import escape

from lit_gpt.runs.compare_tables import TextTable, tables_of, visible
from lit_gpt.runs.comparison import Comparison
from lit_gpt.runs.curves import draw_curves, svg_of
from lit_gpt.runs.samples import SampleSet

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1e23; --paper: #fdfcf9; --dim: #5c626b; --line: #d9d6cd; --card: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e4df; --paper: #17191d; --dim: #9aa0a8; --line: #363a42;
  --card: #22252b; } }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--dim); } td, th { padding: .25rem 1rem .25rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; } .number { text-align: right; white-space: nowrap; }
figure { margin: 0; background: #ffffff; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem; }
figure svg { width: 100%; height: auto; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; padding: .6rem .8rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem; font: .88rem/1.5 ui-monospace, monospace; }
.dim { color: var(--dim); }
"""


def page_of(found: Comparison) -> str:
    """The whole page."""
    figure = draw_curves(found)
    picture = ""
    if figure is not None:
        text = "Validation loss of each run over steps, seconds and FLOPs"
        picture = f'<h2>Curves</h2>\n<figure role="img" aria-label="{text}">{svg_of(figure)}</figure>'
    labels = {group.name: group.label for group in found.groups}
    parts = [
        *(_table(table) for table in tables_of(found)),
        picture,
        *(["<h2>Samples</h2>"] if found.samples else []),
        *(_samples(sample, labels) for sample in found.samples),
        "<h2>Remarks</h2>\n<ul>" + "".join(f"<li>{_text(remark)}</li>" for remark in found.remarks) + "</ul>",
    ]
    return _PAGE.replace("__STYLE__", _STYLE).replace("__BODY__", "\n".join(filter(None, parts)))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>Comparison of runs</title>
<style>__STYLE__</style>
</head>
<body>
<h1>Comparison of runs</h1>
__BODY__
</body>
</html>
"""


def _text(text: str, lines: bool = False) -> str:
    return escape(visible(text, lines))


def _table(table: TextTable) -> str:
    kinds = [' class="number"' if name in table.numeric else "" for name in table.columns]
    head = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for name, kind in zip(table.columns, kinds))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(cells, kinds)) + "</tr>"
        for cells in table.cells
    )
    return f'<h2>{_text(table.title)}</h2>\n<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _samples(sample: SampleSet, labels: dict[str, str]) -> str:
    texts = "".join(
        f"<div><b>{_text(name)}</b> <span class=dim>{_text(labels[name])}</span>"
        f"<pre>{_text(text, lines=True)}</pre></div>"
        for name, text in sample.texts.items()
    )
    prompt = f"<pre>{_text(sample.prompt, lines=True)}</pre>"
    return f'<p class="dim">After this prompt, with seed {sample.seed}:</p>{prompt}<div class="samples">{texts}</div>'
