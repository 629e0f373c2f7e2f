"""What the tests of the two Haystack stores share."""

from __future__ import annotations

from typing import Any

from haystack import Document

from tests.integrations.congruence import Found
from tests.integrations.corpus import documents, embed

TEXT = "Return the names of all files that lie in a folder"
GROUP = {"field": "meta.group", "operator": "==", "value": 1}


def filled() -> list[Document]:
    return [
        Document(id=f"d{row}", content=text, meta=known, embedding=embed(text))
        for row, (text, known) in enumerate(documents())
    ]


def found(docs: list[Any]) -> Found:
    return [(type(doc), doc.id, doc.content, doc.meta, doc.embedding, doc.score) for doc in docs]


def added(text: str) -> Document:
    meta = {"title": "", "group": 0, "row": -1}
    return Document(id="added", content=text, meta=meta, embedding=embed(text))
