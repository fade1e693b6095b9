"""How a report looks: light and dark, on paper, on a phone."""

from __future__ import annotations

# Colours of series are told apart by the colour-blind, and each has a dash and a marker of its own beside.
STYLE = (
    """
:root { color-scheme: light dark;
  --ground: #ffffff; --panel: #f5f6f8; --ink: #1b1f24; --soft: #5b6470; --line: #d5d9e0; --grid: #e4e7ec;
  --accent: #0b62a8; --del: #fde3dc; --del-line: #b3390f; --mark: #d9efdc; --mark-line: #1f7a34;
  --alarm: #b3261e; --notice: #8a5a00;
  --s0: #0b62a8; --s1: #c2410c; --s2: #0f766e; --s3: #7c3aed; --s4: #8a6100; --s5: #be185d; --s6: #374151;
  --s7: #4d7c0f; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171b; --panel: #1d2127; --ink: #e6e9ee; --soft: #a2abb8; --line: #39404a; --grid: #2a3038;
  --accent: #7cc0ff; --del: #4a2018; --del-line: #ff9d6b; --mark: #173d22; --mark-line: #6fd38a;
  --alarm: #ff8a80; --notice: #f2cc60;
  --s0: #7cc0ff; --s1: #ff9d6b; --s2: #4fd1c5; --s3: #c4a6ff; --s4: #f2cc60; --s5: #ff8fb8; --s6: #c9d1d9;
  --s7: #a3d977; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h4 { font-size: .8rem; margin: 0 0 .25rem; color: var(--soft); font-weight: 600; }
p { margin: .5rem 0; white-space: pre-line; overflow-wrap: anywhere; }
.aside, figcaption, caption, .caption { color: var(--soft); font-size: .875rem; }
.verdict { background: var(--panel); border-left: 4px solid var(--accent); padding: .75rem 1rem; margin: 1rem 0; }
.verdict .first { font-size: 1.15rem; font-weight: 600; margin: 0 0 .5rem; }
.verdict ul { margin: 0; padding-left: 1.2rem; }
.verdict li { margin: .3rem 0; }
.warnings { list-style: none; padding: 0; }
.warnings li { border-left: 4px solid var(--notice); padding: .25rem .75rem; margin: .5rem 0;
  background: var(--panel); white-space: pre-line; overflow-wrap: anywhere; }
.warnings b { text-transform: uppercase; font-size: .75rem; letter-spacing: .04em; color: var(--notice); }
.warnings li.alarm { border-left-width: 8px; border-color: var(--alarm); }
.warnings li.alarm b { color: var(--alarm); }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--grid); }
th { border-bottom-color: var(--line); font-weight: 600; }
td { max-width: 36rem; overflow-wrap: break-word; }
td.number, th.number, td.missing { text-align: right; white-space: nowrap; }
td.short { white-space: nowrap; }
td.missing { color: var(--soft); font-style: italic; }
pre { background: var(--panel); padding: .75rem 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.45;
  font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.25rem 2rem;
  margin: 1rem 0; }
figure { margin: 0; max-width: 31rem; break-inside: avoid; }
figcaption { margin-top: .25rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; font-size: 12.5px; }
svg text { fill: var(--ink); }
svg .soft { fill: var(--soft); }
svg .title { font-weight: 600; font-size: 13.5px; }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .level { stroke: var(--soft); stroke-width: 1.5; fill: none; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .band { opacity: .16; stroke: none; }
svg .whisker { stroke-width: 1.3; fill: none; }
svg .error { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg .dots { fill: none; stroke-width: 4.5; stroke-linecap: round; opacity: .6; }
"""
    + "".join(f"svg .c{i} {{ stroke: var(--s{i}); }} svg .f{i} {{ fill: var(--s{i}); }}\n" for i in range(8))
    + """
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0; overflow: hidden; }
.pair > .prompt { background: var(--panel); padding: .6rem .9rem; font-size: .9rem; max-height: 16rem; overflow: auto; }
.answers { display: grid; grid-template-columns: 1fr 1fr; }
.answer { padding: .6rem .9rem; min-width: 0; }
.answer .text { max-height: 24rem; overflow: auto; font-size: .95rem; }
.answer + .answer { border-left: 1px solid var(--line); }
.pair > .aside { margin: 0; padding: .4rem .9rem; border-top: 1px solid var(--line); }
del { text-decoration: none; background: var(--del); border-bottom: 2px dotted var(--del-line); }
mark { color: inherit; background: var(--mark); border-bottom: 2px solid var(--mark-line); }
@media (max-width: 40rem) {
  main { padding: .75rem .9rem 3rem; }
  .answers { grid-template-columns: 1fr; }
  .answer + .answer { border-left: 0; border-top: 1px solid var(--line); }
  table { width: max-content; font-size: .8rem; }
  th, td { padding-right: .5rem; }
  td { max-width: 16rem; } }
@media print {
  :root { --ground: #fff; --panel: #f3f3f3; --ink: #000; --soft: #444; --line: #bbb; --grid: #ddd; color-scheme: light;
    --accent: #0b62a8; --del: #fde3dc; --del-line: #b3390f; --mark: #d9efdc; --mark-line: #1f7a34; --alarm: #b3261e;
    --notice: #8a5a00; --s0: #0b62a8; --s1: #c2410c; --s2: #0f766e; --s3: #7c3aed; --s4: #8a6100; --s5: #be185d;
    --s6: #374151; --s7: #4d7c0f; }
  html { font-size: 12px; }
  body { font-size: 12px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .figures { grid-template-columns: 1fr 1fr; }
  .pair > .prompt, .answer .text { max-height: none; overflow: visible; }
  .pair, .warnings li, .verdict { break-inside: avoid; }
  td { overflow-wrap: anywhere; }
  .scroll, pre { overflow: visible; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; } }
@page { margin: 15mm; }
"""
)
