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
html { color-scheme: light dark; scroll-padding-top: 1rem; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .6rem; overflow-wrap: anywhere; }
h4 { font-size: .85rem; margin: 0 0 .15rem; color: var(--accent); overflow-wrap: anywhere; }
p { margin: 0; overflow-wrap: anywhere; }
.text { white-space: pre-wrap; }
nav { margin-top: 1.5rem; padding: .7rem 0; border: solid var(--line); border-width: 1px 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: 0; padding: 0; list-style: none; }
a { color: var(--accent); }
.summary { font-size: 1.1rem; max-width: 50rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .6rem 1.5rem;
  margin: 1.5rem 0 0; }
dt { color: var(--muted); font-size: .8rem; }
dd { margin: 0; }
/* a shadow on the right, which the first ground covers once there is nothing left to scroll to */
.scroll { position: relative; overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem;
  background: linear-gradient(90deg, transparent, var(--ground) 60%) right / 3rem 100% no-repeat local,
    linear-gradient(270deg, var(--line), transparent) right / 1.2rem 100% no-repeat scroll; }
/* not collapsed: borders and ground of a sticky column stay with it */
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead > tr > * { white-space: normal; vertical-align: bottom; min-width: 4.5rem;
  color: var(--muted); font-weight: 600; font-size: .85rem; background: var(--card); }
thead span { white-space: nowrap; }
tbody th { font-weight: 500; background: var(--ground); white-space: normal; overflow-wrap: anywhere;
  text-align: left; min-width: min(8.5rem, 26vw); max-width: 14rem; }
tr > :first-child { position: sticky; left: 0; z-index: 1; border-right: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
tr.teacher { color: var(--muted); }
.best { font-weight: 700; color: var(--accent); }
/* beside the numbers, which stay below each other */
.mark { position: absolute; padding-left: .15rem; }
.note { color: var(--muted); font-size: .85rem; margin-top: .4rem; }
.notes { color: var(--muted); font-size: .9rem; padding-left: 1.2rem; max-width: 50rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem;
  margin-top: 1.5rem; align-items: start; }
figure { margin: 0; padding: .9rem; background: var(--card); border-radius: .5rem; }
figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .3rem; }
figure svg { width: 100%; height: auto; display: block; stroke-linejoin: round; }
figure svg text { font-family: inherit !important; }
article { margin: 0 0 1rem; padding: 1rem; background: var(--card); border-radius: .5rem; font-size: .92rem; }
.prompt, .answers .text { max-height: 14rem; overflow-y: auto; }
.reference { margin-top: .6rem; padding-top: .6rem; border-top: 1px solid var(--line);
  color: var(--muted); max-height: 8rem; overflow-y: auto; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(11.5rem, 100%), 1fr)); gap: 1rem;
  margin-top: .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
.scores { color: var(--muted); font-size: .8rem; margin-bottom: .3rem; font-variant-numeric: tabular-nums; }
"""
