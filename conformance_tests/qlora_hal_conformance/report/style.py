"""The look of the report: light and dark, printable, no font and no script from anywhere."""

STYLE = """
:root { color-scheme: light dark; --ink: #16202b; --soft: #5a6875; --line: #dfe5ea; --paper: #f6f8fa; --card: #fff;
  --good: #13795b; --bad: #c02636; --warn: #9a6700; --info: #2f5fb3; --track: #e8edf1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaf0; --soft: #93a1ae; --line: #2b3640; --paper: #11171d;
  --card: #182029; --good: #4cc38a; --bad: #ff6b78; --warn: #e3b341; --info: #79a8ff; --track: #26313b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { margin-bottom: 1.5rem; }
.eyebrow { margin: 0; color: var(--soft); letter-spacing: .08em; text-transform: uppercase; font-size: .75rem; }
h1 { margin: .1rem 0 0; font-size: 2.2rem; letter-spacing: -.02em; }
h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
.subtitle { margin: 0 0 .8rem; color: var(--soft); }
.state { display: inline-block; margin: 0 0 .8rem; padding: .2rem .8rem; border-radius: 99px; font-weight: 600;
  border: 1.5px solid currentColor; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); } .neutral { color: var(--soft); }
.facts { margin: 0; color: var(--soft); font-size: .87rem; }
.tiles, .levels { display: flex; flex-wrap: wrap; gap: .6rem; margin-top: 1.1rem; }
.tile { flex: 1 1 7rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .6rem .9rem; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.15; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .82rem; }
.tile.passed b { color: var(--good); } .tile.refused b { color: var(--info); } .tile.failed b { color: var(--bad); }
.tile.inconclusive b, .tile.waived b { color: var(--warn); }
.level { flex: 1 1 9rem; padding: .45rem .9rem; border: 1px solid var(--line); border-left: 4px solid currentColor;
  border-radius: .4rem; background: var(--card); font-size: .9rem; }
.level span { float: right; font-variant-numeric: tabular-nums; }
.red, .legend, .said { margin-top: 1.5rem; }
.said ul { margin: 0; padding-left: 1.2rem; font-size: .92rem; overflow-wrap: anywhere; }
.red { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--bad);
  border-radius: .6rem; padding: 1rem 1.25rem; }
.red ol { margin: 0; padding-left: 1.3rem; } .red li { margin-bottom: .5rem; }
.red p { margin: .1rem 0 0; color: var(--soft); overflow-wrap: anywhere; }
.verdict { font-weight: 600; font-size: .82rem; } .verdict.failed { color: var(--bad); }
.verdict.inconclusive, .verdict.waived { color: var(--warn); }
.legend p { color: var(--soft); font-size: .87rem; max-width: 48rem; margin: 0 0 .4rem; }
.axis { position: relative; height: 1.5rem; width: min(22rem, 100% - 4rem); border-top: 1.5px solid var(--soft);
  margin: 0 3rem 0 1rem; }
.axis span { position: absolute; transform: translateX(-50%); font-size: .75rem; color: var(--soft); top: .15rem; }
.cases, .record { margin-top: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  overflow-x: auto; }
summary { cursor: pointer; padding: .6rem 1rem; font-weight: 600; }
summary .number { color: var(--soft); font-variant-numeric: tabular-nums; margin-right: .4rem; }
summary .count, summary .time { float: right; margin-left: 1rem; font-variant-numeric: tabular-nums; }
summary .time { color: var(--soft); font-weight: 400; font-size: .85rem; }
table { width: 100%; border-collapse: collapse; font-size: .87rem; }
th { text-align: left; color: var(--soft); font-weight: 500; }
.cases th, .cases td { padding: .3rem 1rem; border-top: 1px solid var(--line); vertical-align: top; }
.cases td:nth-child(2), .cases td:nth-child(3) { white-space: nowrap; font-variant-numeric: tabular-nums; }
.cases td:nth-child(4) { white-space: nowrap; width: 14rem; color: var(--soft); font-size: .8rem;
  font-variant-numeric: tabular-nums; }
code { font: .86em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
td > i { display: inline-block; width: 1.1rem; font-weight: 700; font-style: normal; }
i.passed { color: var(--good); } i.refused { color: var(--info); } i.failed { color: var(--bad); }
i.inconclusive, i.waived { color: var(--warn); }
.cases small, .cases p { display: block; margin: 0 0 0 1.3rem; color: var(--soft); overflow-wrap: anywhere;
  max-width: 40rem; }
.cases b { display: inline-block; width: 9rem; height: .6rem; margin-right: .5rem; background: var(--track);
  border-radius: 2px; border-right: 2px solid var(--soft); vertical-align: middle; }
b i { display: block; height: 100%; border-radius: 2px 0 0 2px; background: var(--good); }
b i.near { background: var(--warn); } b i.over { background: var(--bad); }
.record th, .record td { padding: .25rem 1rem; border-top: 1px solid var(--line); vertical-align: top; }
.record th { white-space: nowrap; } .record td { overflow-wrap: anywhere; }
@media (max-width: 40rem) { /* a row becomes a stack: its name, then measured, bound and bar in one line */
  .cases thead { position: absolute; clip-path: inset(50%); } .cases table, .cases tbody, .cases tr { display: block; }
  .cases tr { border-top: 1px solid var(--line); padding: .4rem 1rem; } .cases td { border: 0; padding: 0 .6rem 0 0; }
  .cases td:first-child { display: block; padding: 0; }
  .cases td:not(:first-child) { display: inline-block; width: auto; }
  .cases td:empty { display: none !important; } .cases b { width: 5rem; } .record th { white-space: normal; } }
@media print { body { background: #fff; } .cases, .record { break-inside: avoid-page; } }
"""
