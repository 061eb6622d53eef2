"""The words and the look of the demo's page; `report` fills in the numbers."""

NOTES = (
    "LAL's audio makes no queries and never enters the feed-forward network. So a training step computes less and "
    "remembers fewer activations; the longer the audio and the larger the language model, the more this shows.",
    "It does not shrink what decoding keeps: with LAL in every layer, the audio keys and values of a clip are about as "
    "many as those that PLITS leaves in the cache. LAL in the first third of the layers keeps a third of them, PAL "
    "about two thirds. The saving in training is not a saving in cache.",
    "The encoder and connector run the same way in all three, and at this size they and the fixed cost of each "
    "operation are a large part of a step. The factors here are those of a toy on this machine, not those of a "
    "model with a billion parameters.",
    "One seed and one data set of made-up sounds. Where two intervals overlap, or that of the difference holds 0, this "
    "run does not say which integration is better.",
)
"""What a reader must know before quoting a number from the page."""

FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; --ink: #1d2330; --soft: #5a6375; --line: #e2e5ec; --paper: #ffffff; --ground: #f6f7fa; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
main {{ max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }}
h1 {{ font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }}
h2 {{ font-size: 1.25rem; margin: 0 0 .3rem; }}
h3 {{ font-size: 1rem; margin: 0; letter-spacing: .04em; }}
p {{ margin: 0 0 .8rem; max-width: 46rem; }}
.lead {{ color: var(--soft); font-size: 1.08rem; }}
.warning {{ background: #fff4d6; border: 1px solid #e3c15b; border-radius: .5rem; padding: .7rem 1rem;
  color: #5b4300; }}
section {{ background: var(--paper); border: 1px solid var(--line); border-radius: .8rem;
  padding: 1.4rem 1.5rem; margin-top: 1.4rem; }}
.caption {{ color: var(--soft); font-size: .95rem; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; margin-top: 1.4rem; }}
.card {{ background: var(--paper); border: 1px solid var(--line); border-top: 5px solid; border-radius: .8rem;
  padding: 1rem 1.2rem; }}
.big {{ font-size: 2.3rem; font-weight: 650; line-height: 1.1; margin: .35rem 0 0;
  font-variant-numeric: tabular-nums; }}
.small {{ color: var(--soft); font-size: .85rem; margin-bottom: .7rem; }}
dl {{ margin: 0; font-size: .93rem; }}
dl div {{ display: flex; justify-content: space-between; gap: 1rem; border-top: 1px solid var(--line);
  padding: .25rem 0; }}
dt {{ color: var(--soft); }}
dd {{ margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .38rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }}
tbody th {{ text-align: left; font-weight: 400; }}
thead th, thead td {{ border-bottom: 2px solid var(--ink); }}
tr.section th {{ font-weight: 650; padding-top: 1rem; border-bottom-color: var(--soft); }}
table.answers {{ min-width: 44rem; table-layout: fixed; }}
table.answers th, table.answers td {{ text-align: left; white-space: normal; vertical-align: top; }}
.right span {{ color: #146c2e; font-weight: 700; }}
.wrong span {{ color: #a11212; font-weight: 700; }}
figure {{ margin: .8rem 0 0; overflow-x: auto; }}
svg {{ width: 100%; min-width: 34rem; height: auto; display: block; }}
svg text.label {{ font: 12px system-ui, sans-serif; fill: #495161; }}
svg .grid {{ stroke: #e2e5ec; stroke-width: 1; }}
svg .axis {{ stroke: #495161; stroke-width: 1; }}
svg .event {{ fill: #dfe8f7; stroke: #8aa4d1; }}
svg text.event-label {{ font: 11px system-ui, sans-serif; fill: #1d2330; }}
audio {{ width: 100%; margin: .6rem 0 .2rem; }}
li {{ margin-bottom: .5rem; max-width: 46rem; }}
footer {{ color: var(--soft); font-size: .9rem; margin-top: 1.6rem; }}
@media print {{ body {{ background: #fff; }} section, .card {{ break-inside: avoid; }} audio {{ display: none; }} }}
</style>
</head>
<body>
<main>
<h1>Three ways to give a language model ears</h1>
<p class="lead">PLITS puts audio tokens into the text. LAL lets the text look at the audio and nothing more. PAL does
both, on a diet. Same encoder, same language model, same data, same order of training steps: only the integration
differs.</p>
{quick}
<div class="cards">{cards}</div>

<section>
<h2>The comparison</h2>
<p class="caption">{questions} questions on {scenes} scenes that no model has met; an answer counts if it is the right
one word for word. In brackets: 95&#8239;% intervals over scenes. “Without audio” is the same model asked the same
questions with nothing to hear, so what matters is the gain over it. Costs are of one training step on the same
{clips} clips with {batch} questions, measured in turns; × is relative to PLITS.</p>
<div class="scroll">{table}</div>
</section>

<section>
<h2>Accuracy, task by task</h2>
<p class="caption">Look for marks of one row whose bars do not overlap: only there do the integrations really differ.
The distance between a mark and its upright tick is what the model owes to its ears.</p>
<figure>{accuracy}</figure>
</section>

<section>
<h2>Learning</h2>
<p class="caption">Loss on the answers while training; pale is every logged value, bold the running mean. A curve that
bends down earlier learned to listen earlier.</p>
<figure>{losses}</figure>
</section>

<section>
<h2>A fresh scene</h2>
<p class="caption">Made after training from another seed. Listen, look, and compare the answers with the truth.
Sustained notes show as level stripes, noise as clouds, knocks as upright lines.</p>
<audio controls src="data:audio/wav;base64,{audio}">Your browser plays no audio.</audio>
<figure>{spectrogram}</figure>
<div class="scroll">{answers}</div>
</section>

<section>
<h2>What LAL saves, and what it does not</h2>
<ul>{notes}</ul>
</section>

<footer>{machine}</footer>
</main>
</body>
</html>
"""
