"""The page's style and its one script, which only sorts: without it, everything is there."""

from __future__ import annotations

# Cases and stages: hues that people with any colour vision tell apart; the sequence for errors is even in lightness.
STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #16191d; --muted: #5b6570; --line: #dfe3e7; --soft: #f5f7f8;
  --good: #0b6b4f; --good-soft: #eaf5f0; --bad: #b0301c; --bad-soft: #fcefec; --link: #1f5fa8;
  --s0: #0b62a8; --s1: #b45f06; --s2: #0a7d62; --s3: #9b3f8f; --s4: #b8352b;
  --s5: #5a55b8; --s6: #71721d; --s7: #4d5963;
  --t0: #c9d4a0; --t1: #9cc9e8; --t2: #f0c56a; --t3: #d4a5cf; --t4: #ef9c86;
  --t5: #7fa3d6; --t6: #7cc8ae; --t7: #b6b2e6; --t8: #c3c9cf;
  --c0: #e6f5ea; --c1: #bfe6cc; --c2: #8fd6ba; --c3: #5cc3b1; --c4: #3ea8ad;
  --c5: #3b8ba8; --c6: #3a6b9e; --c7: #3f4c8d; --c8: #372a58;
  --d0: #16191d; --d1: #16191d; --d2: #16191d; --d3: #16191d; --d4: #0b0e11;
  --d5: #05070a; --d6: #fff; --d7: #fff; --d8: #fff; --on: #16191d;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #121518; --ink: #e6e9ec; --muted: #98a3ad; --line: #2b3138; --soft: #1a1e22;
    --good: #63cba4; --good-soft: #13251f; --bad: #ff9582; --bad-soft: #2c1a17; --link: #8bbdf0;
    --s0: #63b0f2; --s1: #eba74f; --s2: #4fc7a3; --s3: #dd8ed2; --s4: #f5877a;
    --s5: #a5a0f5; --s6: #c3c464; --s7: #a8b4be;
    --t0: #a3b072; --t1: #6da8cf; --t2: #d0a243; --t3: #b583b0; --t4: #d47f68;
    --t5: #6388c0; --t6: #56a88d; --t7: #938ec9; --t8: #8f979f;
    --c0: #2a2440; --c1: #38396f; --c2: #3b5291; --c3: #39709f; --c4: #3a8ca8;
    --c5: #3fa8ad; --c6: #5cc3b1; --c7: #9bdbc0; --c8: #def5e5;
    --d0: #e6e9ec; --d1: #e6e9ec; --d2: #fff; --d3: #fff; --d4: #05070a;
    --d5: #0b0e11; --d6: #16191d; --d7: #16191d; --d8: #16191d; --on: #0b0d0f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font-variant-numeric: tabular-nums lining-nums;
  font: 15px/1.55 -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", system-ui,
  sans-serif;
}
main, header, footer { max-width: 74rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 3.5rem; }
section { padding-top: 4rem; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { margin: 0 0 .35rem; font-size: 1.3rem; line-height: 1.3; font-weight: 650; letter-spacing: -.01em; }
h3 { margin: 0 0 .5rem; font-size: 1rem; font-weight: 650; overflow-wrap: anywhere; }
p { margin: 0 0 1rem; max-width: 44rem; }
a { color: var(--link); text-underline-offset: .18em; text-decoration-thickness: 1px; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 2px; }
code, pre {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: .87em;
}
pre { margin: .5rem 0 0; padding: 1rem; background: var(--soft); border-radius: 6px; line-height: 1.5; }
.muted { color: var(--muted); }
.over { margin: 0 0 .5rem; color: var(--muted); font-size: .87rem; }
.facts { margin: .6rem 0 0; color: var(--muted); max-width: none; }
.facts span { display: inline-block; }
p.facts span + span::before { content: "·"; margin: 0 .5em; }
nav ul {
  display: flex; flex-wrap: wrap; gap: .25rem 1.4rem; margin: 1.5rem 0 0; padding: 0; list-style: none; font-size:
  .93rem;
}
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
td, th, dd, .name, .strong { unicode-bidi: isolate; }

.verdict {
  display: flex; gap: 1.1rem; margin-top: 2rem; padding: 1.4rem 1.5rem; border-radius: 10px; background: var(--soft);
}
.verdict.good { background: var(--good-soft); }
.verdict.bad { background: var(--bad-soft); }
.verdict svg { flex: none; width: 2.4rem; height: 2.4rem; }
.verdict h2 { margin: 0; font-size: 1.45rem; line-height: 2.4rem; }
.verdict p { margin: .1rem 0 0; }
.verdict ul { margin: .6rem 0 .1rem; padding: 0; list-style: none; }
.verdict li + li { margin-top: .25rem; }
.good .sign { fill: var(--good); }
.bad .sign { fill: var(--bad); }
.sign { fill: var(--muted); }
.sign + path { fill: none; stroke: var(--paper); stroke-width: 2.2; stroke-linecap: round; stroke-linejoin: round; }

.scroll { position: relative; overflow-x: auto; margin: 1rem 0 0; }
.scroll.tall { max-height: 75vh; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th, td { vertical-align: baseline; }
th { font-weight: 500; color: var(--muted); }
thead th { vertical-align: bottom; }
tbody th { color: var(--ink); }
b { font-weight: 600; }
thead th { border-bottom: 1px solid var(--muted); }
tr > :first-child { padding-left: 0; }
tr > :last-child { padding-right: .2rem; }
th:first-child, .left { text-align: left; }
.cases td, .cases th { padding-left: .45rem; padding-right: .45rem; }
.cases thead th { white-space: normal; line-height: 1.25; }
.cases thead th:first-child, .cases tbody th { padding-left: 0; }
.cases th.group { padding-bottom: 0; color: var(--ink); font-weight: 600; text-align: left; border-bottom: 0; }
.cases .start { padding-left: 1.7rem; }
.cases tr:last-child th.start { text-align: right; }
table:not(.sortable) :is(tbody th, thead tr:first-child > :first-child) {
  position: sticky; left: 0; background: var(--paper);
}
table:not(.sortable) tr:hover th { background: var(--soft); }
table.small { width: auto; min-width: min(100%, 44rem); }
.digest {
  width: 17rem; min-width: 17rem; white-space: normal; overflow-wrap: anywhere; line-height: 1.35; text-align: left;
  padding-left: 1.5rem;
}
.wrap { overflow-wrap: anywhere; }
tbody tr:hover { background: var(--soft); }
.tall thead th {
  position: sticky; top: 0; background: var(--paper); box-shadow: inset 0 -1px var(--muted); border-bottom: 0;
}
.sortable tbody th { font-weight: 400; white-space: normal; overflow-wrap: anywhere; min-width: 16rem; }
.no { color: var(--bad); font-weight: 600; }
.no .muted { color: inherit; font-weight: 400; }
td:has(.no) { background: var(--bad-soft); }
b + .yes, b + .no { margin-left: .5em; }
.yes::before, .no::before { margin-right: .4em; }
.yes::before { content: "\\2713"; color: var(--good); }
.no::before { content: "\\2717"; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: 3px; border-radius: 2px; }
th button:hover, th[aria-sort] { color: var(--ink); }
th button::after { content: "\\2195"; margin-left: .3em; opacity: .4; }
th[aria-sort="ascending"] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort="descending"] button::after { content: "\\2193"; opacity: 1; }

figure { margin: 1.25rem 0 0; }
figcaption { margin: .4rem 0 0; color: var(--muted); font-size: .87rem; max-width: 44rem; }
figcaption b { color: var(--ink); }
figcaption p { margin: 0 0 .7rem; }
figcaption .keys + p { margin-top: .8rem; }
figcaption.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; }
.side {
  display: grid; grid-template-columns: minmax(0, 760px) minmax(13rem, 1fr); gap: .5rem 2.5rem; align-items: start;
}
.side figcaption { padding-top: 1rem; }
.side > * { min-width: 0; }
.side .scroll { margin: 0; }
.side .keys { flex-direction: column; margin: 0; }
h3:not(:first-child) { margin-top: 2.5rem; }
.maps h3, .spread h3 { margin-top: 0; }
.chart { display: block; max-width: 100%; height: auto; font-size: 11.5px; overflow: visible; }
.chart.heat { font-size: 10.5px; }
.scroll .chart { min-width: 34rem; }
.scroll .chart.heat, .scroll .chart.legend { min-width: 24rem; }
.tick, .total { fill: var(--muted); }
.name { fill: var(--ink); font-size: 12px; }
.strong { fill: var(--ink); font-size: 13px; font-weight: 600; }
.plot .strong, .plot .strong + .tick {
  paint-order: stroke; stroke: var(--paper); stroke-width: 5px; stroke-linejoin: round;
}
.grid { stroke: var(--line); }
.axis { stroke: var(--muted); }
.leader { stroke: var(--muted); stroke-width: .75; }
.frontier { fill: none; stroke: var(--muted); stroke-width: 1.5; stroke-dasharray: 1 4; stroke-linecap: round; }
.point { stroke: var(--paper); stroke-width: 2; }
.point.beaten { fill: var(--paper); stroke: currentColor; }
.mean { stroke: var(--ink); }
.percentile { stroke: var(--ink); stroke-dasharray: 2 3; }
.none { fill: none; stroke: var(--line); }
text.none { fill: var(--muted); stroke: none; }
text.in { pointer-events: none; }
.swatch {
  display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 50%; background: currentColor;
}
.swatch.square { border-radius: 2px; }
.keys {
  display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin: 1rem 0 0; padding: 0; list-style: none; font-size:
  .87rem; color: var(--muted);
}
.maps {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 2.2rem 2.5rem;
  margin-top: 2rem;
}
.maps > *, .spread > * { min-width: 0; }
.maps figure { margin: 0; }
.spread {
  display: grid; grid-template-columns: 8.5rem 1fr 1fr 1fr; gap: .5rem 2.2rem; margin-top: 1.5rem; padding-top: 1.5rem;
  border-top: 1px solid var(--line);
}
.spread figure { margin: 0; max-width: 25rem; }
.spread figcaption:first-child { margin: 0 0 .6rem; }
.spread dl { margin-top: 0; }
details { margin-top: .6rem; border-top: 1px solid var(--line); padding-top: .6rem; }
summary { cursor: pointer; padding: .2rem 0; }
summary .swatch { margin-left: .4em; }
summary .muted { margin-left: .9em; }
dl {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2.5rem; margin: 1rem 0
  2rem; font-size: .93rem;
}
dl div {
  display: flex; gap: 1rem; justify-content: space-between; padding: .4rem 0; border-bottom: 1px solid var(--line);
}
details dl { margin: .8rem 0 1rem; }
.notes { margin: 0 0 1rem; padding-left: 1.2rem; overflow-wrap: anywhere; }
dt { color: var(--muted); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
footer { padding-top: 4rem; padding-bottom: 3rem; color: var(--muted); font-size: .87rem; }
@media (max-width: 62rem) {
  .side { grid-template-columns: minmax(0, 1fr); }
  .side .keys { flex-direction: row; }
  .spread { grid-template-columns: 1fr 1fr; }
  .spread > h3 { grid-column: 1 / -1; }
}
@media (max-width: 46rem) {
  main, header, footer { padding-left: 1rem; padding-right: 1rem; }
  header { padding-top: 2rem; }
  section { padding-top: 3rem; }
  h1 { font-size: 1.6rem; }
  .verdict { padding: 1.1rem; gap: .8rem; }
  .verdict h2 { font-size: 1.2rem; }
  .spread { grid-template-columns: 1fr; }
}
@page { margin: 14mm; }
@media print {
  .maps { grid-template-columns: 1fr 1fr; }
  .spread { grid-template-columns: 1fr 1fr 1fr; gap: .5rem 1rem; }
  .spread > h3 { grid-column: 1 / -1; }
  h2 + p { break-after: avoid; }
  body { font-size: 9.5pt; }
  main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  header { padding-top: 0; }
  section { padding-top: 1.6rem; }
  nav, th button::after { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .scroll, .scroll.tall { overflow: visible; max-height: none; }
  .scroll .chart, .scroll .chart.heat { min-width: 0; }
  table { font-size: 7.5pt; }
  th, td { padding: .2rem .4rem; }
  .cases .start { padding-left: .8rem; }
  .sortable tbody th { min-width: 0; }
  .tall thead th { position: static; box-shadow: none; border-bottom: 1px solid var(--muted); }
  th button { display: contents; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  figure, tr, .verdict, .spread { break-inside: avoid; }
  h2, h3, summary { break-after: avoid; }
}
""" + "".join(
    [f".s{i} {{ fill: var(--s{i}); color: var(--s{i}); }}\n.f{i} {{ fill: var(--s{i}); }}\n" for i in range(8)]
    + [f".t{i} {{ fill: var(--t{i}); color: var(--t{i}); }}\ntext.t{i} {{ fill: var(--on); }}\n" for i in range(9)]
    + [f".c{i} {{ fill: var(--c{i}); color: var(--c{i}); }}\ntext.c{i} {{ fill: var(--d{i}); }}\n" for i in range(9)]
)

# Heads of columns become buttons only where a click does something. What has no value stays at the end.
SCRIPT = """
const order = new Intl.Collator("en", { numeric: true });
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const by = isNaN(x) || isNaN(y) ? order.compare(x, y) : x - y;
        return down ? -by : by;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
"""
