"""A film of the cache: experiments/figures/cache.svg, which moves wherever a picture is shown.

    python experiments/cache_film.py

A SepCache reads a text, a character at a time; it is given no keys and values, since none are
shown. A token has a colour while the cache holds it, in the text and in its row: what it is to the
newest token, as in the map of `sep_mask.py`. Each frame is read from the cache's own tensors. When
hidden rows are dropped, the others slide from their rows in one frame to those in the next. Where
pictures do not move, the last frame is shown.
"""
import torch
from common import ROOT

from model import GPTConfig
from sep_cache import SepCache
from sep_mask import FOREVER, mark

TEXT = ("Each token sees its window, the last separators, and the sinks. "
        "The rest is hidden: its rows are used again; memory stays small.")
NAMES = {"█": "window", "▓": "separator", "▒": "sink"}  # of the marks in the map

# Each name has two colours, the second for letters. Lengths are in pixels.
PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 208" width="900" height="208">
<title>A cache reads a text</title>
<style>
svg {
  --label: #59636e; --faint: #b0b8c1; --empty: #d1d9e0; --newest-caption: var(--label);
  --newest: #0550ae; --newest-ink: #fff; --window: #80ccff; --window-ink: #0a3069;
  --separator: #fdac54; --separator-ink: #471700; --sink: #8ddb8c; --sink-ink: #04260f;
  --hidden: #e4e8ed; --hidden-ink: #7d8793;
}
@media (prefers-color-scheme: dark) { svg {
  --label: #9198a1; --faint: #59616b; --empty: #3d444d;
  --newest: #cae8ff; --newest-ink: #0a3069; --window: #1f6feb; --window-ink: #fff;
  --separator: #e0823d; --separator-ink: #1c0800; --sink: #3fb950; --sink-ink: #02160a;
  --hidden: #2a313c; --hidden-ink: #8b949e;
} }
@property --held { syntax: "&lt;number>"; inherits: true; initial-value: 0 }
@property --row { syntax: "&lt;number>"; inherits: true; initial-value: 0 }
text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--label) }
rect { fill: currentColor; width: 12.5px; height: 28px; rx: 2px }
.letter { font: 18px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
          text-anchor: middle; fill: inherit; transform: translate(6.25px, 20px) }
.caption { fill: var(--caption, none); text-anchor: end }
.row { opacity: var(--held); transform: translate(calc(var(--row) * 13.5px), 124px) }
.empty { fill: none; stroke: var(--empty); width: 11.5px; height: 27px }
g[id] { animation: %(seconds)ss step-end calc(2s - %(seconds)ss) infinite }
@media (prefers-reduced-motion: reduce) { g[id] { animation: none !important } }
</style>
<pattern id="rows" y="124" width="27" height="28" patternUnits="userSpaceOnUse">
<rect class="empty" x=".5" y=".5"/><rect class="empty" x="14" y=".5"/></pattern>
<g transform="translate(18)">
<text y="16">The text (faint: not in the cache)</text>
<text y="114">The cache</text>
<rect y="124" style="width:calc(%(rows)s * 13.5px);fill:url(#rows)"/>
<g transform="translate(0 172)">
<rect style="color:var(--newest)"/><text x="20" y="19">newest token</text>
<rect x="138" style="color:var(--window)"/><text x="158" y="19">window</text>
<rect x="240" style="color:var(--separator)"/><text x="260" y="19">separator</text>
<rect x="354" style="color:var(--sink)"/><text x="374" y="19">sink</text>
<rect x="432" style="color:var(--hidden)"/>
<text x="452" y="19">hidden: dropped when no row is empty</text>
<rect class="empty" x="752" y=".5"/><text x="772" y="19">empty row</text>
</g>
%(tokens)s</g>
</svg>
"""


def look(cache, motion="step-end"):
    """How the tokens in the cache look, {position: CSS}; motion: from here to their next look."""
    positions = cache.row_position[0].tolist()
    visible = cache.row_visible[0].tolist()
    newest = cache.n_tokens - 1
    frame = {}  # empty rows share a position, which is no token's
    for row, position in enumerate(positions):
        name = "hidden"
        if position == newest:
            name = "newest"
        elif visible[row]:
            name = NAMES[mark(newest, position, FOREVER, cache.config)]
        frame[position] = (f"--held:1;--row:{row};color:var(--{name});fill:var(--{name}-ink);"
                           f"--caption:var(--{name}-caption);animation-timing-function:{motion}")
    return frame


def record(cache):
    """Read the text: frames, 16 a second, and a caption for the time a token is the newest."""
    frames, captions = [], []
    for letter in TEXT:
        # no row is empty: hidden ones will be dropped; or it is the start, when there are no rows
        if (cache.row_position >= 0).all():
            frames += 40 * [look(cache, "cubic-bezier(.85,0,.15,1)")]  # slow at both ends
        cache.make_room(1)
        frames += [look(cache)]
        cache.advance(torch.tensor([[ord(letter)]]))
        cache.take_in(1)
        frames += [look(cache)]
        captions += [f"tokens read: {cache.n_tokens}, rows visible: {cache.row_visible.sum()} of "
                     f"{cache.row_position.numel()}"]
    return frames + 80 * frames[-1:], captions


def draw(frames, captions):
    """SVG of each token, its letter in the text and in its row, and the CSS that animates it."""
    for position, caption in enumerate(captions):
        steps = state = ""
        for i, frame in enumerate(frames):
            new = frame.get(position, "--held:0;--caption:none;color:transparent;fill:var(--faint)")
            if new != state:
                steps += f"{i / len(frames):.2%}{{{new}}}"
            state = new
        yield f"""\
<style>#t{position}{{{state};animation-name:t{position}}}@keyframes t{position}{{{steps}}}</style>
<g id="t{position}"><text class="caption" x="864" y="114">{caption}</text>
<g transform="translate({position % 64 * 13.5} {position // 64 * 30 + 26})">
<rect/><text class="letter">{TEXT[position]}</text></g>
<g class="row"><rect/><text class="letter">{TEXT[position]}</text></g></g>
"""


def main():
    cache = SepCache(GPTConfig(window=8, sinks=2, max_seps=3))
    frames, captions = record(cache)
    picture = PICTURE % {
        "tokens": "".join(draw(frames, captions)),
        "rows": cache.row_position.numel(),
        "seconds": len(frames) / 16,
    }
    (ROOT / "experiments/figures/cache.svg").write_text(picture)


if __name__ == "__main__":
    main()
