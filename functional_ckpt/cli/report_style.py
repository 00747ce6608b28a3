"""The style sheet of a report."""

CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1d2430; --dim: #5c6675;
  --faint: #d5dae2; --line: #8fa9d0; --point: #2f5d9e; --best: #b87900; --latest: #12803f;
  --bad: #b3261e; --warn: #8a6100; --bar: #b9cbe8; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --ink: #e4e8ee;
  --dim: #9aa5b5; --faint: #3a414d; --line: #55749f; --point: #86b0ee; --best: #f0b840;
  --latest: #4fc97f; --bad: #ff8a80; --warn: #e8bd5a; --bar: #33496b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.35rem; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 32px 0 10px; }
p { margin: 4px 0 10px; }
.dim { color: var(--dim); }
code { font: .92em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.facts, .plots { display: grid; gap: 12px; }
.facts { grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); margin-top: 16px; }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.card, .facts div { background: var(--card); border: 1px solid var(--faint); border-radius: 8px; }
.facts div { padding: 10px 14px; }
.facts b { display: block; font-size: 1.25rem; font-weight: 600; }
.card { padding: 12px; }
svg { display: block; width: 100%; max-width: 480px; height: auto; margin: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif
  !important; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; color: var(--dim); font-size: .9rem; }
.legend i { font-style: normal; margin-right: 5px; color: var(--point); }
.legend .best, .star { color: var(--best) !important; }
.legend .latest { color: var(--latest) !important; }
.wide { overflow-x: auto; padding: 0; }
.high { max-height: 620px; overflow-y: auto; }
.high th { position: sticky; top: 0; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: left; white-space: nowrap; vertical-align: top; }
th { font-size: .85rem; color: var(--dim); font-weight: 600; }
tr + tr td { border-top: 1px solid var(--faint); }
.n { text-align: right; }
.why { white-space: normal; min-width: 170px; }
.gone td { color: var(--dim); }
.text { white-space: normal; overflow-wrap: anywhere; min-width: 120px; }
.badge { border-radius: 9px; padding: 1px 8px; font-size: .82rem; border: 1px solid currentColor; }
.intact, .latest { color: var(--latest); } .damaged { color: var(--bad); }
.readable, .uploading { color: var(--warn); }
.tree { padding: 8px 12px; }
.tree .row { display: grid; grid-template-columns: minmax(0, 1fr) 78px min(300px, 24vw); gap: 10px;
  align-items: center; padding: 2px 0; }
.tree .row code { padding-bottom: 3px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.tree details > :not(summary) { margin-left: 16px; }
.tree summary { cursor: pointer; list-style: none; }
.tree summary::-webkit-details-marker { display: none; }
.tree summary code::before { content: "+ "; color: var(--dim); }
.tree details[open] > summary code::before { content: "\\2212\\00a0"; }
.tree .leaf code::before { content: "\\00a0\\00a0"; }
.bar { background: var(--bar); height: 10px; border-radius: 3px; min-width: 1px; }
.layers { padding: 8px 12px; }
.layers h3 { margin: 8px 0 4px; font-size: .95rem; }
footer { margin-top: 36px; font-size: .85rem; color: var(--dim); }
"""
