"""Style sheet and script of a page."""

# Lines of runs (c0 ..): told apart with any colour vision, and at least 3 : 1 against the background in both schemes.
# Noise levels (v0 .. v5) are ordered.
_LIGHT = """
  --back: #fbfbfa; --card: #ffffff; --text: #1c1d1f; --soft: #5c6166; --rule: #e2e3e5; --grid: #e6e7e9; --warn: #8a3b00;
  --c0: #0067b1; --c1: #c64600; --c2: #00795a; --c3: #a23b86; --c4: #8a6a00; --c5: #2f8fc4; --c6: #5b5b5b;
  --c7: #6a3fc0;
  --v0: #3b1f78; --v1: #3456b4; --v2: #1f86b4; --v3: #1a8a74; --v4: #5d8516; --v5: #a8720a;
"""
_DARK = """
  --back: #131416; --card: #1b1d20; --text: #e8e9ea; --soft: #a2a7ad; --rule: #33363a; --grid: #2c2f33; --warn: #ffb27a;
  --c0: #5ab4f2; --c1: #ff9152; --c2: #35cfa2; --c3: #e493cf; --c4: #dfc04a; --c5: #9cd7ff; --c6: #b9bcc0;
  --c7: #b49cff;
  --v0: #b3a2ff; --v1: #85a8ff; --v2: #58c1ea; --v3: #4fd3b0; --v4: #acd158; --v5: #f0bf50;
"""
_SERIES = "".join(
    f".{name}{i} {{ stroke: var(--{name}{i}); --own: var(--{name}{i}); }}\n"
    for name, n in (("c", 8), ("v", 6))
    for i in range(n)
)

STYLE = (
    f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
@media print {{ :root {{ color-scheme: light; {_LIGHT} }} }}
{_SERIES}"""
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1, h2, h3, h4 { line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h1 { font-size: 26px; } h2 { font-size: 19px; margin: 40px 0 12px; } h3 { font-size: 15px; } h4 { font-size: 14px; }
section > h3 { margin: 20px 0 8px; }
p { margin: 8px 0; } .sub, .note, footer { color: var(--soft); } .note { font-size: 13px; font-weight: 400; }
.warn { color: var(--warn); } .none { color: var(--soft); font-style: italic; }
code, pre { font: .87em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0; padding: 10px 12px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 6px; }
.bar { position: sticky; top: 0; z-index: 2; background: var(--back);
  border-bottom: 1px solid var(--rule); margin-top: 18px; }
.bar form { max-width: 1180px; margin: 0 auto; padding: 8px 20px; display: flex; gap: 6px 18px; flex-wrap: wrap;
  align-items: center; justify-content: space-between; }
.bar nav { display: flex; gap: 4px 14px; flex-wrap: wrap; }
.bar { font-size: 14px; } .bar a { color: var(--text); text-decoration: none; }
.bar a:hover { text-decoration: underline; }
fieldset { border: 0; margin: 0; padding: 0; display: flex; align-items: center; min-width: 0; }
legend { float: left; padding: 0 10px 0 0; color: var(--soft); }
fieldset label { position: relative; border: 1px solid var(--rule); background: var(--card); padding: 3px 11px;
  margin-left: -1px; cursor: pointer; white-space: nowrap; }
fieldset label:first-of-type { border-radius: 6px 0 0 6px; } fieldset label:last-of-type { border-radius: 0 6px 6px 0; }
fieldset input { position: absolute; opacity: 0; inset: 0; margin: 0; cursor: pointer; }
fieldset label:has(:checked) { background: var(--text); color: var(--back); border-color: var(--text); }
fieldset label:has(:focus-visible), .enlarge:focus-visible, .scroll:focus-visible, summary:focus-visible {
  outline: 2px solid var(--c0); outline-offset: 2px; }
.by-images, .by-time { display: none; }
:root:has(#x-images:checked) .by-steps, :root:has(#x-time:checked) .by-steps { display: none; }
:root:has(#x-images:checked) .by-images, :root:has(#x-time:checked) .by-time { display: block; }
section { scroll-margin-top: 56px; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; background: var(--card); margin: 8px 0; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px; border-bottom: 1px solid var(--rule); }
tbody tr:last-child > * { border-bottom: 0; }
th { font-weight: 600; white-space: nowrap; } tbody th { font-weight: 400; color: var(--soft); width: 1%;
  position: sticky; left: 0; background: var(--card); }
td { min-width: 8.5em; max-width: 34em; overflow-wrap: anywhere; }
thead:not(:has(th:not(:empty))) { display: none; }
progress { display: block; width: 100%; max-width: 220px; height: 6px; margin: 3px 0 5px; accent-color: var(--c0); }
details { margin: 10px 0; } summary { cursor: pointer; padding: 4px 0; }
.charts { display: flex; flex-wrap: wrap; gap: 16px; margin: 8px 0; }
.chart { flex: 1 1 calc(50% - 8px); margin: 0; padding: 14px 16px 10px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; min-width: 0; }
.wide { flex-basis: 100%; } .wide .plot { height: 290px; }
.legend { list-style: none; margin: 4px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 13px; }
.legend li { overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 18px; height: 0; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid var(--own); }
.swatch.dash { border-top-style: dashed; } .swatch.dots { border-top-style: dotted; }
.plot { position: relative; height: 210px; margin: 14px 14px 46px 46px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--grid); stroke-width: 1; } .base { stroke: var(--soft); stroke-width: 1; }
.line { stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; } .faint { stroke-width: 1; opacity: .35; }
path.dash { stroke-dasharray: 7 5; } path.dots { stroke-dasharray: 1 5; }
.marker { stroke-width: 7; stroke-linecap: round; }
path.marker { stroke-dasharray: none; }
.plot span { position: absolute; font-size: 12px; line-height: 1; color: var(--soft);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.plot .y { right: calc(100% + 8px); transform: translateY(50%); }
.plot .x { top: calc(100% + 8px); transform: translateX(-50%); }
.plot .axis { top: calc(100% + 27px); left: 0; right: 0; text-align: center; }
.plot-none { color: var(--soft); font-style: italic; }
.cross { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.tip { position: absolute; top: 4px; z-index: 1; pointer-events: none; background: var(--card);
  border: 1px solid var(--rule); border-radius: 6px; padding: 6px 9px; font-size: 12px; line-height: 1.45;
  box-shadow: 0 2px 8px #0003; max-width: 240px; }
.tip div { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 14px; }
.pictures figure { margin: 0; } .pictures figcaption { font-size: 13px; color: var(--soft); }
.enlarge { display: block; width: 100%; padding: 0; border: 0; background: none; cursor: zoom-in; }
.enlarge img { display: block; width: 100%; border-radius: 6px; }
dialog { padding: 0; border: 0; background: none; max-width: 96vw; max-height: 96vh; }
dialog::backdrop { background: #000c; }
dialog img { display: block; width: min(94vw, 94vh); max-height: 94vh; object-fit: contain; cursor: zoom-out; }
footer { margin-top: 44px; padding-bottom: 32px; font-size: 13px; }
@media (max-width: 720px) {
  header, main, footer { padding-left: 14px; padding-right: 14px; } h1 { font-size: 22px; }
  .bar form { padding: 8px 14px; } .bar nav { display: none; } .chart { flex-basis: 100%; }
  .chart { padding: 12px 10px 8px; } th, td { padding: 6px 10px; }
  tbody th { white-space: normal; min-width: 7em; } th code { white-space: nowrap; }
  .wide .plot, .plot { height: 200px; }
  .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; } section { scroll-margin-top: 50px; }
}
@media print {
  body { font-size: 11px; } .bar { display: none; } .chart, .pictures figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .scroll { overflow: visible; } section { break-inside: auto; }
}
"""
)

# Hovering a plot shows the values of all lines at the nearest point; a click enlarges a sample grid.
SCRIPT = """
const short = v => {
  v = Number(v.toPrecision(4));
  if (v && Math.abs(v) < 1e-3) return v.toExponential();
  return v.toLocaleString("en-US", {maximumFractionDigits: 6});
};
const invert = ([low, high], log, at) => log ? low * (high / low) ** at : low + (high - low) * at;
for (const plot of document.querySelectorAll(".plot")) {
  const ranges = JSON.parse(plot.dataset.ranges);
  let lines = null, cross = null, tip = null;
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const x = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width)) * 100000;
    lines ??= [...plot.querySelectorAll("[data-label]")].map(path => ({
      path, points: path.getAttribute("d").slice(1).split("L").map(pair => pair.split(" ").map(Number)) }));
    if (!tip) {
      cross = plot.appendChild(document.createElement("div")); cross.className = "cross";
      tip = plot.appendChild(document.createElement("div")); tip.className = "tip";
    }
    const near = lines.map(({path, points}) => [path,
      points.reduce((best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best)]);
    const at = near.reduce((best, [, p]) => Math.abs(p[0] - x) < Math.abs(best - x) ? p[0] : best, Infinity);
    const head = invert(ranges.x, false, at / 100000);
    const rows = [ranges.bins ? "log-SNR " + ranges.bins[Math.round(head)] : ranges.name + ": " + short(head)];
    tip.replaceChildren();
    for (const [path, p] of near) if (Math.abs(p[0] - at) < 2500)
      rows.push([path, short(invert(ranges.y, ranges.log, 1 - p[1] / 10000))]);
    for (const row of rows) {
      const line = tip.appendChild(document.createElement("div"));
      if (typeof row === "string") { line.textContent = row; continue; }
      const swatch = line.appendChild(document.createElement("i"));
      swatch.className = "swatch " + row[0].getAttribute("class").replace(/\\b(line|faint)\\b/g, "");
      line.append(row[0].dataset.label + ": " + row[1]);
    }
    cross.style.left = at / 1000 + "%";
    if (at > 50000) { tip.style.right = 100 - at / 1000 + 2 + "%"; tip.style.left = ""; }
    else { tip.style.left = at / 1000 + 2 + "%"; tip.style.right = ""; }
  });
  plot.addEventListener("pointerleave", () => { cross?.remove(); tip?.remove(); cross = tip = null; });
}
const dialog = document.querySelector("dialog");
for (const button of document.querySelectorAll(".enlarge")) button.addEventListener("click", () => {
  dialog.replaceChildren(button.firstElementChild.cloneNode()); dialog.showModal();
});
dialog.addEventListener("click", () => dialog.close());
"""
