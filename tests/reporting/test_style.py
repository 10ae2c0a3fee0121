"""The palettes: enough contrast in both schemes."""

import re

import pytest

from fastmask.reporting.style import _DARK, _LIGHT, STYLE


def luminance(color):
    linear = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in linear]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [_LIGHT, _DARK], ids=["light", "dark"])
def test_lines_and_texts_have_contrast(scheme):
    """WCAG 2.1: 3 : 1 for graphics, 4.5 : 1 for texts."""
    colors = dict(re.findall(r"--(\w+): (#\w{6});", scheme))
    back = luminance(colors["card"])
    assert len(colors) == 7 + 8 + 6
    for name, color in colors.items():
        lighter, darker = sorted((luminance(color), back), reverse=True)
        contrast = (lighter + 0.05) / (darker + 0.05)
        needed = 4.5 if name in ("text", "soft", "warn") else 3 if re.fullmatch(r"[cv]\d", name) else 1
        assert contrast >= needed, (name, contrast)


def test_the_style_sheet_is_balanced():
    assert STYLE.count("{") == STYLE.count("}")
    assert all(f".{name} {{" in STYLE for name in ("c0", "c7", "v0", "v5"))
