"""Where samples come from: one module a layout, each registered in :data:`sources`."""

from dualenc_data_tools.sources import files, hf, joined, parquet, quickstart, tables
from dualenc_data_tools.sources import kitti_nuscenes as driving
from dualenc_data_tools.sources.source import BadMedia, Dropped, Keys, Record, SourceConfig, SourceKind, sources

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
