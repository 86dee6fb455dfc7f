"""Colours and style sheet of a plan's page: no file but this one is needed."""

from __future__ import annotations

# custom properties of a light page, and of a dark one; k0 to k7 are kinds in bars
LIGHT = ";".join(
    (
        "--page:#fbfbfa",
        "--card:#fff",
        "--ink:#1c1f23",
        "--soft:#5c636b",
        "--faint:#e6e7e6",
        "--line:#d3d5d4",
        "--copy:#b9c0c8",
        "--bad:#c0262d",
        "--good:#1d7a46",
        "--main:#2463c4",
        "--k0:#2463c4",
        "--k1:#2f9080",
        "--k2:#c8700c",
        "--k3:#7a4bc2",
        "--k4:#c0436f",
        "--k5:#7c8a16",
        "--k6:#5b7fa6",
        "--k7:#8b6f5c",
    )
)
DARK = ";".join(
    (
        "--page:#131517",
        "--card:#1a1d20",
        "--ink:#e7e9ea",
        "--soft:#9aa2aa",
        "--faint:#282c30",
        "--line:#3a4046",
        "--copy:#59626b",
        "--bad:#ff7b7b",
        "--good:#5ec98b",
        "--main:#78aaf5",
        "--k0:#5e97ea",
        "--k1:#55b8a2",
        "--k2:#eb9a4c",
        "--k3:#a583ea",
        "--k4:#e87da2",
        "--k5:#b5c04a",
        "--k6:#86a8cc",
        "--k7:#b59a86",
    )
)

_SCHEMES = f"""
.lepton{{{LIGHT};
  color-scheme:light dark;background:var(--page);color:var(--ink);padding:22px 24px;
  border-radius:10px;max-width:1120px;margin:0 auto;box-sizing:border-box;
  font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
  sans-serif;font-variant-numeric:tabular-nums}}
@media (prefers-color-scheme:dark){{.lepton{{{DARK}}}}}
[data-jp-theme-light="true"] .lepton,.vscode-light .lepton{{{LIGHT};color-scheme:light}}
[data-jp-theme-light="false"] .lepton,.vscode-dark .lepton{{{DARK};color-scheme:dark}}
"""
_RULES = """.lepton *{box-sizing:border-box}
.lepton h3{font-size:23px;line-height:1.25;letter-spacing:-.012em;margin:0 0 2px;
  font-weight:650;overflow-wrap:anywhere}
.lepton h4{font-size:15px;font-weight:600;margin:30px 0 10px}
.lepton p{margin:0;color:var(--soft);overflow-wrap:anywhere}
.lepton .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));
  margin:18px 0 0;background:var(--card);border:1px solid var(--faint);
  border-radius:10px;overflow:hidden}
.lepton .tiles div{padding:11px 16px;box-shadow:1px 0 var(--faint),0 1px var(--faint)}
.lepton dt{color:var(--soft);font-size:12.5px;font-weight:400;margin:0}
.lepton dd{margin:0;font-size:21px;font-weight:600;letter-spacing:-.01em;
  line-height:1.3;white-space:nowrap}
.lepton small{display:block;color:var(--soft);font-size:12.5px;line-height:1.4}
.lepton figure{margin:0 0 12px;padding:14px 16px;background:var(--card);
  border:1px solid var(--faint);border-radius:10px;break-inside:avoid}
.lepton figcaption{margin:0 0 10px;overflow-wrap:anywhere}
.lepton figcaption b{font-weight:600;margin-right:10px}
.lepton figcaption span{color:var(--soft);font-size:12.5px}
.lepton .row{display:flex;flex-wrap:wrap;gap:14px 30px;align-items:flex-start}
.lepton .row>div{max-width:100%;overflow-x:auto}
.lepton svg{display:block}
.lepton svg text{fill:var(--soft);font-size:11px}
.lepton svg.front{max-width:100%;height:auto}
.lepton svg.front text{font-size:12.5px}
.lepton .row path{fill:currentcolor;stroke:currentcolor;stroke-width:4;
  stroke-linejoin:round}
.lepton .row rect{shape-rendering:crispEdges}
.lepton .bars{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));
  gap:12px}
.lepton .bars figure{margin:0}
.lepton .bar{width:100%;height:20px;border-radius:4px;background:var(--faint);
  margin:0 0 10px}
.lepton .bar rect{stroke:var(--card);stroke-width:1.5;vector-effect:non-scaling-stroke}
.lepton .limit{stroke:var(--bad);stroke-width:3;vector-effect:non-scaling-stroke}
.lepton ul{list-style:none;margin:0;padding:0;font-size:13px}
.lepton li{display:flex;gap:8px;align-items:baseline;margin:0;padding:1px 0}
.lepton li s{flex:none;width:10px;height:10px;border-radius:2px;background:var(--faint);
  align-self:center}
.lepton li span{margin-left:auto;white-space:nowrap;color:var(--soft)}
.lepton .scroll+small{margin-top:6px}
.lepton .scroll{overflow-x:auto;background:var(--card);border:1px solid var(--faint);
  border-radius:10px}
.lepton table{border-collapse:collapse;width:100%;font-size:13px;margin:0;
  color:var(--ink);background:none}
.lepton th{text-align:left;font-weight:500;color:var(--soft);
  border-bottom:1px solid var(--line);white-space:nowrap}
.lepton th,.lepton td{padding:5px 10px;vertical-align:baseline;text-align:left}
.lepton th:first-child,.lepton td:first-child{padding-left:16px}
.lepton tbody tr+tr td{border-top:1px solid var(--faint)}
.lepton tbody tr,.lepton tbody tr:nth-child(odd){background:none}
.lepton td{white-space:nowrap}
.lepton .n{text-align:right}
.lepton td.w{white-space:normal;min-width:230px;color:var(--soft);font-size:12.5px}
.lepton code{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",
  monospace;background:none;color:inherit;padding:0}
.lepton .bad{color:var(--bad)}
.lepton dl.said{margin:0;display:grid;grid-template-columns:fit-content(190px) 1fr;
  gap:4px 16px;font-size:13px}
.lepton dl.said dt{font-size:13px}
.lepton dl.said dd{font-size:13px;font-weight:400;white-space:normal;letter-spacing:0;
  line-height:1.5}
@media (max-width:560px){.lepton{padding:14px 12px}.lepton dl.said{
  grid-template-columns:1fr}.lepton dl.said dd{margin:0 0 6px}}
@media print{.lepton{padding:0;max-width:none}.lepton *{print-color-adjust:exact;
  -webkit-print-color-adjust:exact}}
"""
STYLE = _SCHEMES + _RULES
