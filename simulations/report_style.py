"""How a report's page looks and what it may do: style sheet, security policy, drawing script."""

# Nothing may be fetched from anywhere; the page's own inline code and Plotly's images may stay.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)

# Plots take the width of their column; on paper they get a width of their own, and folds open.
DRAW = """
"use strict";
const figures = FIGURES;
const config = {responsive: true, displayModeBar: false, plotlyServerURL: ""};
const mouse = matchMedia("(hover: hover)").matches;
const all = Object.keys(figures);
for (const id of all) {
  const {data, layout} = figures[id];
  layout.dragmode = mouse ? "zoom" : false;
  document.getElementById(id).replaceChildren();
  Plotly.newPlot(id, data, layout, config);
}
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const fold of folded) fold.open = true;
  for (const id of all) Plotly.relayout(id, {width: 620});
});
addEventListener("afterprint", () => {
  for (const fold of folded) fold.open = false;
  for (const id of all) Plotly.relayout(id, {width: null, autosize: true});
});
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d1b19; --muted: #66615b; --line: #e3ded7;
  --ember: #c2410c; --good: #2f7d4f; --fair: #a16207; --bad: #b91c1c; --trust: #4b5563;
  --win: #4c9a6a; --tie: #b9b3ab; --loss: #d05b4e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16161a; --card: #1f1f25; --ink: #ece9e4; --muted: #a5a099; --line: #35343b;
    --ember: #f08a4b; --good: #6cc08b; --fair: #e0b04a; --bad: #f0736a; --trust: #a8b0bd;
    --win: #4c9a6a; --tie: #6b6770; --loss: #c95548;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
header, main { max-width: 72rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
main { padding-bottom: 4rem; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 2rem; }
h2 { margin: 3rem 0 1rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.4rem; }
h3 { margin: 1.2rem 0 .4rem; font-size: 1.05rem; }
p { margin: .4rem 0; max-width: 62rem; overflow-wrap: anywhere; }
.kicker { margin: 0; color: var(--ember); font-weight: 600; letter-spacing: .04em; }
.note, figcaption { color: var(--muted); font-size: .875rem; }
.lead { margin: .8rem 0; font-size: 1.125rem; }
.lead strong { color: var(--ember); }
.banner {
  padding: 1rem 1.25rem; background: #b91c1c; color: #fff; text-align: center;
  print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
.banner strong { display: block; font-size: 1.3rem; }

.cards {
  display: grid; gap: .8rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr));
}
.card, .box {
  min-width: 0; padding: .9rem 1.1rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
}
.card { border-top: 3px solid var(--ember); }
.card p { margin: 0; }
.card-title, .card-note { color: var(--muted); font-size: .875rem; }
.card-value { font-size: 1.7rem; font-weight: 650; line-height: 1.3; }
.card.good { border-top-color: var(--good); }
.card.fair { border-top-color: var(--fair); }
.card.bad { border-top-color: var(--bad); }
.card.trust { border-top-color: var(--trust); }
.good b { color: var(--good); }
.fair b { color: var(--fair); }
.bad b, .bad .card-value { color: var(--bad); }
.trust .card-value { padding: .3rem 0; font-size: 1.25rem; }

.facts {
  display: grid; gap: .2rem 2rem; margin: .6rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
}
.facts div {
  display: flex; gap: 1rem; justify-content: space-between; border-bottom: 1px dotted var(--line);
}
.facts .long { grid-column: 1 / -1; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.box .facts { grid-template-columns: 1fr; }
.box h3 { margin-top: 0; }
.columns {
  display: grid; gap: 1.2rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
}
.columns > * { min-width: 0; }
.group { margin-top: 2.5rem; }

.scroll { margin: .8rem 0 1.2rem; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .95rem; }
table, .card-value { font-variant-numeric: tabular-nums; }
caption { padding-bottom: .3rem; color: var(--muted); font-size: .875rem; text-align: left; }
th, td {
  padding: .35rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: top; white-space: nowrap;
}
th:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--muted); font-size: .85rem; font-weight: 600; }
tbody th { font-weight: 500; }
th small { display: block; color: var(--muted); font-weight: 400; white-space: normal; }
#settings th, #settings td { white-space: normal; overflow-wrap: anywhere; }
.record { display: flex; height: 4px; margin-top: 3px; border-radius: 2px; overflow: hidden; }
.record .win { background: var(--win); }
.record .tie { background: var(--tie); }
.record .loss { background: var(--loss); }
.wide { background: var(--line); }
.wide .tie { background: var(--ember); }

figure { min-width: 0; margin: .5rem 0; }
figure h3 { margin: .3rem 0; }
.plot text { fill: var(--ink) !important; }
.plot .hovertext text { fill: #fff !important; }
.plot .gridlayer path { stroke: var(--line) !important; }
.plot .zerolinelayer path { stroke: var(--muted) !important; }
details { margin: 1rem 0; }
summary { color: var(--ember); font-weight: 600; cursor: pointer; }
:focus-visible { outline: 2px solid var(--ember); outline-offset: 2px; }

@media (max-width: 40rem) {
  h1 { font-size: 1.6rem; }
  .lead { font-size: 1rem; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }
  .card { padding: .7rem .8rem; }
  .card-value { font-size: 1.4rem; }
  th, td { padding: .35rem .4rem; font-size: .875rem; }
  tbody th { min-width: 7rem; white-space: normal; }
  .columns td { white-space: normal; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --muted: #444; --line: #ccc; }
  body { font-size: 10pt; }
  h2, h3, caption { break-after: avoid; }
  tr, figure, .card, .box { break-inside: avoid; }
  .scroll { overflow: visible; }
  .columns { grid-template-columns: 1fr; }
  .record i { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
