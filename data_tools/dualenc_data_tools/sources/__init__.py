"""How data sets become records: one module per way, each registered in :data:`sources`.

Reading itself is in :mod:`dualenc.data.sources`; a source registered there can be packed without a module here.
"""

from dualenc_data_tools.sources import from_driving, from_folder, from_items, from_tables, joined, quickstart
from dualenc_data_tools.sources.source import BadMedia, Dropped, Keys, Record, SourceConfig, SourceKind, sources

__all__ = [
    "BadMedia",
    "Dropped",
    "Keys",
    "Record",
    "SourceConfig",
    "SourceKind",
    "from_driving",
    "from_folder",
    "from_items",
    "from_tables",
    "joined",
    "quickstart",
    "sources",
]
