"""What the tests of the two Haystack stores share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haystack import Document
from haystack.document_stores.types import DuplicatePolicy

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


def read(store: Any, key: Any) -> tuple[Document, Any, Any]:
    (document,) = store.filter_documents({"field": "id", "operator": "==", "value": key})
    return document, document.content, document.meta


def write_again(store: Any, document: Document, text: str, title: str) -> None:
    meta = {**document.meta, "title": title}
    changed = replace(document, content=text, meta=meta, embedding=embed(text))
    assert store.write_documents([changed], policy=DuplicatePolicy.OVERWRITE) == 1
