"""How reports look: the style sheet of whole pages, and of a part of one inside somebody else's page."""

_LIGHT = """--ink: #1c2330; --soft: #667085; --line: #e3e6ec; --paper: #fff; --tint: #f5f7fa;
  --good: #1a7f4b; --bad: #b42318;"""
_DARK = """--ink: #e6e9ef; --soft: #9aa4b2; --line: #2c3340; --paper: #14181f; --tint: #1b212b;
  --good: #5fcf95; --bad: #ff8a7a;"""
_TEXT = """font: 15px/1.55 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  color: var(--ink); background: var(--paper);"""
_PARTS = """
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, details, pre { margin: .4rem 0; }
.soft { color: var(--soft); }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td details { margin: 0; }
.scroll { overflow-x: auto; }
pre { background: var(--tint); padding: .6rem .8rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .88rem; }
.cards, .charts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.card { background: var(--tint); border-radius: 8px; padding: .6rem .9rem; min-width: 9rem; }
.card b { display: block; font-size: 1.3rem; }
.card span { color: var(--soft); font-size: .84rem; }
figure { margin: 0; }
.legend { font-size: .84rem; color: var(--soft); }
.legend span { margin-right: 1rem; white-space: nowrap; }
.legend i { display: inline-block; width: 10px; height: 3px; margin-right: .35rem; vertical-align: middle; }
.told:hover { fill-opacity: 1; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: .8rem; }
mark { background: #f5c84c66; color: inherit; }
svg { max-width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); }
summary { cursor: pointer; }
"""

PAGE = f"""
:root {{ {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
body {{ {_TEXT} max-width: 1060px; margin: 2.2rem auto 5rem; padding: 0 1.2rem; }}
{_PARTS}"""
# Nested, so that nothing reaches the page around it; on paper of its own, which is light whatever that page is. Charts
# stand in pairs, however narrow that is; notebooks set tables flush right unless one insists.
_INSISTED = """
.charts figure { flex: 0 1 48%; }
&.ctllm table th, &.ctllm table td { text-align: left; }
&.ctllm table th.number, &.ctllm table td.number { text-align: right; }
"""
INSIDE = f".ctllm {{ {_LIGHT} {_TEXT} padding: .2rem .8rem; {_PARTS}{_INSISTED} }}"
