"""The style sheet and the script of the report, which are put into the page.

The script shows the values under the pointer. The status page has the same style.
"""

from __future__ import annotations

STYLE = """
:root{
 --page:#fbfbfa;--card:#fff;--ink:#1c1f23;--soft:#5c636b;--faint:#e6e7e6;
 --line:#d3d5d4;--train:#2463c4;--raw:#8fb0e2;--eval:#c8500c;--other:#2f7d6b;
 --good:#1d7a46;--bad:#c0262d;--warn:#a66a00;--resume:#7a4bc2;--save:#8b9197;
 --shade:#f1f3f2
}
@media (prefers-color-scheme:dark){
 :root{
  --page:#131517;--card:#1a1d20;--ink:#e7e9ea;--soft:#9aa2aa;--faint:#282c30;
  --line:#3a4046;--train:#78aaf5;--raw:#41608f;--eval:#f59a57;--other:#63c2ab;
  --good:#5ec98b;--bad:#ff7b7b;--warn:#e5b04b;--resume:#b796f0;--save:#7d858d;
  --shade:#202428
 }
}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{
 margin:0;background:var(--page);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
  sans-serif;font-variant-numeric:tabular-nums
}
main{max-width:1120px;margin:0 auto;padding:40px 28px 28px}
h1{
 font-size:30px;line-height:1.2;letter-spacing:-.015em;margin:0 0 8px;
 overflow-wrap:anywhere
}
h2{font-size:17px;letter-spacing:-.005em;margin:44px 0 14px}
code,pre{
 font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
 font-size:12.5px
}
.status{
 display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline;margin:0;
 color:var(--soft);overflow-wrap:anywhere
}
.status b{
 border:1px solid;border-radius:99px;padding:1px 11px;font-size:13px;font-weight:600
}
b.good{color:var(--good)}
b.bad{color:var(--bad)}
b.open{color:var(--warn)}
.tiles{
 display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));
 margin:26px 0 0;background:var(--card);border:1px solid var(--faint);
 border-radius:10px;overflow:hidden
}
.tiles div{padding:14px 18px;box-shadow:1px 0 var(--faint),0 1px var(--faint)}
dt{color:var(--soft);font-size:13px}
dd{margin:0}
.tiles dd{
 font-size:23px;line-height:1.3;font-weight:600;letter-spacing:-.01em;
 white-space:nowrap
}
small{color:var(--soft);font-size:12.5px;line-height:1.35;display:block}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px}
section>.legend{margin:0 0 12px}
figure{
 margin:0;padding:14px 18px 12px;background:var(--card);border:1px solid var(--faint);
 border-radius:10px;min-width:0;break-inside:avoid
}
figure.wide{grid-column:1/-1}
figcaption{display:flex;flex-wrap:wrap;gap:0 10px;align-items:baseline;min-height:23px}
figcaption b::first-letter{text-transform:uppercase}
figcaption b{font-weight:600}
.note{color:var(--soft);font-size:12.5px}
output{margin-left:auto;font-size:12.5px;color:var(--soft)}
output em{font-style:normal;margin-left:12px;color:var(--ink)}
.plot{position:relative;height:176px;margin:10px 0 26px 56px;touch-action:pan-y}
.wide .plot{height:280px}
svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
svg path{
 fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round
}
.grid{stroke:var(--faint);stroke-width:1}
path.raw{stroke:var(--raw);stroke-width:1;opacity:.65}
path.train{stroke:var(--train);stroke-width:2}
path.evaluation{stroke:var(--eval);stroke-width:1.75}
path.dot{stroke-width:6}
path.other{stroke:var(--other);stroke-width:1.5}
path.undone{stroke:var(--save);stroke-width:1.25}
.mark{stroke-width:1.25}
path.resume{stroke:var(--resume);stroke-dasharray:5 4}
path.save{stroke:var(--save)}
path.damaged{stroke:var(--bad);stroke-dasharray:2 4}
path.compile{stroke:var(--warn);stroke-dasharray:8 3 2 3}
path.decision{stroke:var(--other);stroke-width:1.75}
path.live{stroke:var(--other);stroke-dasharray:2 3}
path.rollback{stroke:var(--bad);stroke-dasharray:6 3}
path.diverged{stroke:var(--bad);stroke-width:2}
path.nonfinite{stroke:var(--bad);stroke-width:2.5}
.plot i{
 position:absolute;font-style:normal;font-size:11.5px;line-height:1;color:var(--soft);
 white-space:nowrap
}
i.y{right:100%;margin-right:9px;transform:translateY(50%)}
i.x{top:100%;margin-top:9px;transform:translateX(-50%)}
i.end{transform:translateX(-75%)}
.cursor{
 position:absolute;top:0;bottom:0;width:1px;background:var(--soft);visibility:hidden;
 pointer-events:none
}
.legend{
 display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:0 0 0 56px;padding:0;
 font-size:12.5px;color:var(--soft)
}
.legend li{display:flex;align-items:center;gap:7px}
.legend s{display:block;text-decoration:none;color:var(--ink)}
s.line{width:16px;height:0;border-top:2px solid}
s.bar{width:0;height:12px;border-left:2px solid}
s.raw{border-color:var(--raw);border-top-width:1px}
s.train{border-color:var(--train)}
s.evaluation{border-color:var(--eval)}
s.other{border-color:var(--other)}
s.undone{border-color:var(--save)}
s.decision{border-color:var(--other);height:6px}
s.live{border-color:var(--other);border-left-style:dotted}
s.rollback{border-color:var(--bad);border-left-style:dashed}
s.resume{border-color:var(--resume);border-left-style:dashed}
s.save{border-color:var(--save);height:6px}
s.damaged{border-color:var(--bad);border-left-style:dotted}
s.compile{border-color:var(--warn);border-left-style:dashed}
s.diverged{border-color:var(--bad)}
s.nonfinite{border-color:var(--bad);height:6px}
.empty{
 margin:0;padding:18px;color:var(--soft);border:1px dashed var(--line);
 border-radius:10px
}
figure .empty{border:0;padding:18px 0}
pre{
 margin:0;padding:16px 18px;background:var(--card);border:1px solid var(--faint);
 border-radius:10px;overflow-x:auto;line-height:1.45
}
summary{cursor:pointer;color:var(--soft);margin-bottom:8px}
.scroll{
 overflow:auto;max-height:640px;background:var(--card);border:1px solid var(--faint);
 border-radius:10px
}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:13.5px}
th{
 position:sticky;top:0;background:var(--card);text-align:left;font-weight:500;
 color:var(--soft);border-bottom:1px solid var(--line)
}
th,td{padding:6px 12px;vertical-align:baseline}
th:first-child,td:first-child{padding-left:18px}
tbody tr+tr td{border-top:1px solid var(--faint)}
td{white-space:nowrap}
.n{text-align:right}
.events td:last-child{white-space:normal;width:100%;min-width:200px}
.share{width:200px;min-width:150px}
.share s{
 display:inline-block;height:9px;min-width:1px;background:var(--train);
 border-radius:2px;width:0;max-width:calc(100% - 62px);vertical-align:baseline
}
.share span{color:var(--soft);font-size:12.5px;margin-left:8px}
tr.undone td{color:var(--soft)}
tr.bad .what{color:var(--bad);font-weight:600}
tr.open .what{color:var(--warn);font-weight:600}
.pairs{
 margin:0;padding:8px 18px;background:var(--card);border:1px solid var(--faint);
 border-radius:10px;columns:2;column-gap:36px
}
.pairs div{display:flex;gap:14px;padding:5px 0;break-inside:avoid}
.pairs dt{flex:0 0 132px;overflow-wrap:anywhere;font-size:13.5px}
.pairs dd{min-width:0;overflow-wrap:anywhere;font-size:13.5px}
footer{margin-top:44px;color:var(--soft);font-size:12.5px}
@media (min-width:761px) and (max-width:960px){
 .tiles{grid-template-columns:repeat(4,minmax(0,1fr))}
}
@media screen and (max-width:760px){
 main{padding:26px 14px 20px}
 h1{font-size:25px}
 h2{margin-top:34px}
 .charts{grid-template-columns:minmax(0,1fr);gap:12px}
 figure{padding:12px 14px}
 .plot{margin-left:46px}
 .wide .plot{height:220px}
 figure .legend{margin-left:0}
 .pairs{columns:1}
 .tiles{grid-template-columns:1fr 1fr}
 .tiles div{padding:11px 14px}
 .tiles dd{font-size:20px}
 output{margin-left:0;width:100%;min-height:19px}
 output em:first-child{margin-left:0}
}
@media print{
 :root{
  --page:#fff;--card:#fff;--ink:#000;--soft:#444;--faint:#ddd;--line:#bbb;
  --train:#2463c4;--raw:#8fb0e2;--eval:#c8500c;--other:#2f7d6b;--good:#1d7a46;
  --bad:#c0262d;--warn:#a66a00;--resume:#7a4bc2;--save:#777
 }
 *{print-color-adjust:exact;-webkit-print-color-adjust:exact}
 body{font-size:11pt}
 main{padding:0;max-width:none}
 .scroll{max-height:none;overflow:visible}
 pre{white-space:pre-wrap}
 h2{break-after:avoid}
 tr{break-inside:avoid}
 th{position:static}
 output,.cursor{display:none}
}
"""

SCRIPT = r"""
for (const figure of document.querySelectorAll("[data-chart]")) {
  const spec = JSON.parse(figure.dataset.chart), plot = figure.querySelector(".plot");
  const out = figure.querySelector("output"), cursor = figure.querySelector(".cursor");
  const nearest = (xs, x) => {
    let a = 0, b = xs.length - 1;
    while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] < x) a = m; else b = m; }
    return b >= 0 && Math.abs(xs[b] - x) < Math.abs(xs[a] - x) ? b : a;
  };
  const shown = (y) =>
    y === null ? "not finite" : Number(y.toPrecision(4)).toString() + spec.u;
  const hide = () => { cursor.style.visibility = "hidden"; out.textContent = ""; };
  const say = (text) => {
    const part = document.createElement("em");
    part.textContent = text;
    out.append(part);
  };
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    if (share < -0.01 || share > 1.01) return hide();
    const width = spec.hi - spec.lo;
    const x = spec.lo + share * width, near = width * 0.012;
    const lead = spec.c.find((c) => c.s !== "evaluation" && c.x.length) || spec.c[0];
    const step = lead.x[nearest(lead.x, x)];
    const left = 100 * (step - spec.lo) / width;
    cursor.style.left = Math.min(100, Math.max(0, left)) + "%";
    cursor.style.visibility = "visible";
    out.textContent = "step " + Math.round(step).toLocaleString("en");
    for (const c of spec.c) {
      if (!c.x.length) continue;
      const i = nearest(c.x, step);
      const elsewhere = c !== lead && c.x[i] !== step;
      const apart = elsewhere ? " at " + c.x[i].toLocaleString("en") : "";
      say(c.n + " " + shown(c.y[i]) + apart);
    }
    for (const m of spec.m) if (Math.abs(m.x - step) < near) say(m.t);
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}
"""
