"""Features of every item of a data set in the layout it comes in: a folder, a table, a hub set, a driving log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dualenc.data.shards.reader import Found
from dualenc.data.sources import Content, iter_contents, raw_of
from dualenc.distributed.world import World, agree
from dualenc.errors import DataError
from dualenc.features.of_shards import Samples, ShardJob, chosen_of, embed_samples, write_shards
from dualenc.features.store import Description, digest_of, part_name
from dualenc.features.writer import FeatureWriter
from dualenc.model import Bundle

ITEMS = 1000
"""Items of a part: what a killed run loses at most, and what ranks share out."""


def embed_source(
    bundle: Bundle,
    kind: str,
    settings: Mapping[str, Any],
    out: Path,
    modalities: Sequence[str] = (),
    batch_size: int = 64,
    dtype: str = "fp32",
    world: World | None = None,
    overwrite: bool = False,
    dim: int | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Embed the items of a source in its order, as :func:`dualenc.features.of_shards.embed_shards` does with shards.

    Args:
        kind: a name in :data:`dualenc.data.sources.sources`, such as ``folder`` or ``jsonl``.
        settings: of the source, see :func:`dualenc.data.sources.iter_source`.

    Returns:
        As ``embed_shards``; ``shards`` counts parts of ``ITEMS`` items.

    Raises:
        ConfigError: an unknown source, setting, column or modality; ``out`` holds other features.
        DataError: the data set is missing or damaged, or nothing at all could be embedded.
    """
    world = world or World()
    chosen = chosen_of(bundle, modalities)
    embedder = bundle.embedder(dim, precision)

    def read() -> list[ShardJob]:
        items = iter(iter_contents(kind, settings, chosen))
        jobs: list[ShardJob] = []
        while block := list(islice(items, ITEMS)):
            said = {"source": kind, "settings": dict(settings), "items": len(block)}
            said["keys"] = digest_of([key for key, _ in block])
            jobs.append(ShardJob(part_name(f"{kind}-{len(jobs):06d}"), said, lambda block=block: _samples(block)))  # type: ignore[misc]
        return jobs

    jobs = agree(read, world)
    description = Description(embedder.describe(), {m: m for m in chosen}, dict.fromkeys(chosen, 1), dtype)
    writer = FeatureWriter(out, description, world, overwrite=overwrite)
    done = write_shards(writer, jobs, lambda job: embed_samples(embedder, job.samples(), chosen, batch_size))
    if not any(done["embedded"].values()):
        raise DataError(f"{kind}: none of {done['samples']} items could be embedded; the reasons are in {out}")
    return done


def _samples(block: Sequence[tuple[str, Mapping[str, list[Content]]]]) -> Samples:
    for key, contents in block:
        yield key, Found({m: raw_of(got) for m, got in contents.items()}, {})
