"""Word clouds as PNG, by wordcloud where it is installed."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COLOURS = {"longer": "#d0731c", "shorter": "#8465d6"}
"""Of a middle tone: read on white and on black."""
SIZE = (880, 400)
MAX_WORDS = 60


@dataclass(frozen=True)
class Cloud:
    """A PNG in base64, and how many words the font has no glyphs for."""

    base64: str
    num_left_out: int


def draw_cloud(weights: Mapping[str, float], side: str) -> Cloud | str:
    """Words by weight (> 0), the background transparent. side: "longer" or "shorter".

    Returns a sentence where the library is not installed. The same weights give the same picture.
    """
    try:
        import matplotlib.font_manager as fonts
        import wordcloud
    except ImportError as error:
        return f"No word cloud: {error.name} is not installed (pip install 'lenvm[evals]')."
    font = fonts.findfont("DejaVu Sans:bold")
    drawable = {w: x for w, x in weights.items() if x > 0 and _has_glyphs(font, w)}
    if not drawable:
        return "No word cloud: the font has none of these scripts; see the table."
    cloud: Any = wordcloud.WordCloud(
        width=SIZE[0],
        height=SIZE[1],
        font_path=font,
        mode="RGBA",
        background_color=None,
        color_func=lambda *_, **__: COLOURS[side],
        max_words=MAX_WORDS,
        prefer_horizontal=1.0,
        relative_scaling=0.5,
        max_font_size=110,
        margin=6,
        random_state=0,
    ).generate_from_frequencies(drawable)
    data = io.BytesIO()
    cloud.to_image().save(data, format="PNG", optimize=True)
    return Cloud(base64.b64encode(data.getvalue()).decode(), len(weights) - len(drawable))


def _has_glyphs(font: str, word: str) -> bool:
    from matplotlib.ft2font import FT2Font

    known = FT2Font(font).get_charmap()
    return all(ord(character) in known for character in word)
