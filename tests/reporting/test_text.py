import pytest
from run_folders import Page

from fastmask.reporting.text import flag, safe, shown, table


def test_text_is_escaped_printable_and_without_secrets():
    assert safe("<a href='x'>\"&") == "&lt;a href=&#x27;x&#x27;&gt;&quot;&amp;"
    assert safe("a\nb\ud800") == "a\\nb\\ud800"
    assert safe("s3://me:secret@host") == "s3://me:***@host"
    assert flag("<x_y>") == "<code>--&lt;x-y&gt;</code>"


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (0.1 + 0.2, "0.3"), ([0.9, 0.99], "0.9 0.99"), (7, "7"), ({"<": 1}, "{&#x27;&lt;&#x27;: 1}")],
)
def test_values_of_json_are_shown(value, text):
    assert shown(value) == text
    assert "empty" in shown(None)


def test_a_table_scrolls_in_its_own_box():
    page = Page(table(["", "a"], [["x", "1"], ["y", "2"]], "Things"))
    assert page.tables == [[["", "a"], ["x", "1"], ["y", "2"]]]
    assert page.tags[0] == ("div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "Things"})
