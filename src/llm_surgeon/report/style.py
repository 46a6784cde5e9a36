"""Style sheet of the page of a run: light, dark, narrow and on paper."""

from __future__ import annotations

CSS = """\
:root { color-scheme: light dark; --ground: #fff; --text: #1b1f24; --soft: #59636e; --line: #d8dee4; --band: #f5f7f9;
  --accent: #0072B2; --grid: #e6e6e6; --absent: #d9d9d9; --blue: #0072B2; --vermilion: #D55E00; --green: #009E73;
  --orange: #E69F00; --sky: #56B4E9; --pink: #CC79A7; --yellow: #F0E442; --grey: #8c8c8c; }
@media screen and (prefers-color-scheme: dark) { :root { --ground: #15181c; --text: #e6e9ec; --soft: #9aa4ae;
  --line: #353b42; --band: #1d2126; --accent: #56B4E9; --grid: #2b3036; --absent: #3a4047; --blue: #3b96d2;
  --vermilion: #ec7431; --green: #1fb58a; --sky: #86cdf5; --pink: #dd94bc; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 2.1rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .75rem; font-size: 1.3rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem; }
p { margin: .6rem 0; }
.kind { margin: 0 0 .3rem; color: var(--soft); font-size: .9rem; }
.summary { font-size: 1.1rem; }
ul.notes { padding-left: 1.1rem; }
.notes { margin: .6rem 0; color: var(--soft); font-size: .85rem; }
nav { margin-top: 1.2rem; font-size: .9rem; }
nav a { display: inline-block; margin-right: 1rem; }
a { color: var(--accent); }
a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.wide { overflow-x: auto; margin: .9rem 0; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem .6rem .5rem 0; font-weight: 600; }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: bottom; border-bottom: 1px solid var(--line); }
td, tbody th { white-space: nowrap; }
th:first-child { text-align: left; }
.texts { margin: 1.6rem 0; }
.texts table { table-layout: fixed; }
.texts th, .texts td { text-align: left; vertical-align: top; }
.texts td { white-space: pre-wrap; overflow-wrap: anywhere; }
.texts th:first-child { width: 4.5rem; }
thead th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; }
tbody th { font-weight: 500; }
tbody tr:nth-child(even) { background: var(--band); }
figure { margin: 1rem 0; }
.card { overflow-x: auto; padding: .6rem; border: 1px solid var(--line); border-radius: 8px; }
.card svg { display: block; min-width: 620px; max-width: 100%; height: auto; margin: 0 auto; }
.card svg * { stroke-linejoin: round; stroke-linecap: butt; }
.card svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
figcaption { margin-top: .45rem; color: var(--soft); font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: .8rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre { margin: .8rem 0; padding: .8rem 1rem; background: var(--band); border: 1px solid var(--line); border-radius: 8px;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details { margin: .9rem 0; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 560px) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  table { font-size: .82rem; }
  th, td { padding: .35rem .4rem; }
  caption span { display: inline-block; max-width: calc(100vw - 2.7rem); }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print {
  :root { color-scheme: light; --text: #000; --soft: #444; --line: #bbb; --band: #f4f4f4; }
  body { font-size: 9.5pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2 { margin-top: 1.6rem; }
  h2, h3, caption { break-after: avoid; }
  figure, tr, dl, pre { break-inside: avoid; }
  .wide, .card { overflow: visible; }
  .card svg { min-width: 0; }
}
"""
