"""HTML pages as a browser would take them, and what a page that stands alone may not hold."""

from __future__ import annotations

from html.parser import HTMLParser

_EMPTY = {"meta", "img", "br"}  # elements that nothing closes
_ALLOWED = {
    "html", "head", "title", "style", "body", "main", "h1", "h2", "h3", "p", "span", "i", "code", "details", "summary",
    "table", "thead", "tbody", "tr", "th", "td", "ol", "li", *_EMPTY,
}  # fmt: skip


class Page(HTMLParser):
    """A page that is well-formed: `text`, all that it says; `titles`, of its elements; `images`, where they are from.

    Raises AssertionError for tags that do not close one another, scripts, and what comes from elsewhere.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text, self.titles, self.images, self.style = "", [], [], ""
        self.feed(html)
        self.close()
        assert not self.open
        assert "url(" not in self.style and "@import" not in self.style

    def handle_starttag(self, tag, attrs):
        assert tag in _ALLOWED, tag
        told = dict(attrs)
        assert not any(name.startswith("on") or name in ("href", "action") for name in told)
        if tag == "img":
            assert told["src"].startswith("data:image/png;base64,")
            self.images.append(told["src"])
        if "title" in told:
            self.titles.append(told["title"])
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += data
