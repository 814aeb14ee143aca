"""Where samples come from: one module a layout, each registered in :data:`sources`."""

from data_tools.sources import driving, files, hf, joined, parquet, quickstart, tables
from data_tools.sources.base import BadMedia, Dropped, Keys, Record, SourceConfig, SourceKind, sources

__all__ = [
    "BadMedia",
    "Dropped",
    "Keys",
    "Record",
    "SourceConfig",
    "SourceKind",
    "driving",
    "files",
    "hf",
    "joined",
    "parquet",
    "quickstart",
    "sources",
    "tables",
]
