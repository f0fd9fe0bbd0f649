"""The style sheet of the HTML report: light and dark, from phone to desktop."""

STYLE = """
:root { --text: #1c2026; --muted: #5c6570; --ground: #ffffff; --card: #f4f6f8; --line: #d9dee4; --accent: #0b6e4f;
  --series-0: #0072b2; --series-1: #b85c00; --series-2: #007a5a;
  --series-3: #b0478a; --series-4: #7a6500; --series-5: #5b4fc4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ed; --muted: #9aa5b1; --ground: #14171b; --card: #1d2228; --line: #343b44; --accent: #5cc8a1;
    --series-0: #56b4e9; --series-1: #f0a04b; --series-2: #3fd0a4;
    --series-3: #ef9bd0; --series-4: #e8d35a; --series-5: #aba2ff; }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
.task { margin-top: 1.5rem; }
h4 { font-size: .8rem; margin: 0 0 .25rem; color: var(--accent); }
p { margin: 0; overflow-wrap: anywhere; }
h3, .answers p { white-space: pre-wrap; }
.summary { font-size: 1.1rem; max-width: 50rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .6rem 1.5rem;
  margin: 1.5rem 0 0; }
dt { color: var(--muted); font-size: .8rem; }
dd { margin: 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; }
thead th { white-space: normal; vertical-align: bottom;
  color: var(--muted); font-weight: 600; font-size: .85rem; background: var(--card); }
tbody th { font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
tr.teacher { color: var(--muted); }
.best { font-weight: 700; color: var(--accent); }
.notes { color: var(--muted); font-size: .9rem; padding-left: 1.2rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .9rem; background: var(--card); border-radius: .5rem; }
figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .3rem; }
figure svg { width: 100%; height: auto; display: block; stroke-linejoin: round; }
figure svg text { font-family: inherit !important; }
article { margin: 0 0 1rem; padding: 1rem; background: var(--card); border-radius: .5rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: .9rem 1.5rem; }
.reference { margin-top: .8rem; color: var(--muted); font-size: .9rem; }
"""
