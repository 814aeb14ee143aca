"""Data sets in their own layouts: one module per layout, each registered in :data:`sources`."""

from dualenc.data.sources import driving, folder, hub, tables, ts
from dualenc.data.sources.item import Content, Item, Layout, captions, sources
from dualenc.data.sources.opened import NotThereError
from dualenc.data.sources.samples import iter_contents, iter_source, open_layout, raw_of

__all__ = [
    "Content",
    "Item",
    "Layout",
    "NotThereError",
    "captions",
    "driving",
    "folder",
    "hub",
    "iter_contents",
    "iter_source",
    "open_layout",
    "raw_of",
    "sources",
    "tables",
    "ts",
]
