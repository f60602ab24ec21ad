"""A page as a parser of HTML sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "input", "img", "br", "hr", "link"}


@dataclass
class Element:
    """A tag with what it holds."""

    tag: str
    attributes: dict[str, str]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text in it, as it is shown."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str, where: Callable[["Element"], bool] = lambda _: True) -> list["Element"]:
        """The elements of a tag within it, in their order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] if child.tag == tag and where(child) else []
                found += child.all(tag, where)
        return found

    def of_class(self, name: str, tag: str = "g") -> list["Element"]:
        """The elements of a tag and a class within it."""
        return self.all(tag, lambda element: name in element.attributes.get("class", "").split())

    def section(self, name: str) -> "Element":
        """The section with an id."""
        (found,) = self.all("section", lambda element: element.attributes["id"] == name)
        return found

    def rows(self) -> list[list[str]]:
        """Texts of the cells of all rows in it."""
        return [[child.text.strip() for child in row.children if isinstance(child, Element)] for row in self.all("tr")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("document", {})]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attributes})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {key: value or "" for key, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"<{self.open[-1].tag}> ends as </{tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(path: Path) -> Element:
    """Parse a page, all of whose elements must be closed."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    (document,) = reader.open
    return document
