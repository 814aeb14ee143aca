"""Packing on a Ray cluster: actors that hold the models pack chunks and write shards, this process keeps the order.

Chunks are begun in the source's order and their outcomes taken in that order, so every shard has the samples of a build
on one machine. Only sizes, keys and names of dropped records come to this process: a chunk's bytes stay in Ray's object
store until an actor, on any machine, writes the shard that they belong to. All machines see the input and the output
folder. Ray Data's own writer is not used: it names files at random and splits its blocks as memory allows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.packing.engines import ahead, one_thread
from dualenc_data_tools.packing.pack import Chunk, Outcome, Packed, Packer
from dualenc_data_tools.sources import SourceConfig
from dualenc_data_tools.writer import ShardWriter, tar_writer

AHEAD = 3
"""Chunks begun for each actor."""
WRITING = 2
"""Shards of a split that are written at once."""


class Elsewhere(Mapping[str, bytes]):
    """The members of a sample in the object store: lengths are here, bytes in the object ``ref``, at place ``at``."""

    def __init__(self, sizes: dict[str, int], ref: Any, at: int) -> None:
        self.sizes, self.ref, self.at = sizes, ref, at

    def __getitem__(self, ending: str) -> bytes:
        raise KeyError(f"{ending}: the bytes are in the object store")

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def lengths(self) -> Iterable[int]:
        """Bytes of each member."""
        return self.sizes.values()


class PackerActor:
    """In a Ray actor: packs chunks, whose bytes stay where they are (a summary is sent), and writes shards of them."""

    def __init__(self, cfg: SourceConfig) -> None:
        one_thread(cfg)
        self.packer = Packer(cfg)

    def pack(self, chunk: Chunk) -> tuple[list[Outcome], list[dict[str, bytes]]]:
        """Outcomes without bytes, and the members of the packed samples."""
        outcomes: list[Outcome] = []
        members: list[dict[str, bytes]] = []
        for outcome in self.packer.pack(chunk):
            if isinstance(outcome, Packed):
                sizes = {e: len(raw) for e, raw in outcome.members.items()}
                members.append(dict(outcome.members))
                outcome = replace(outcome, members=Elsewhere(sizes, None, len(members) - 1))
            outcomes.append(outcome)
        return outcomes, members

    def write(self, path: str, samples: list[tuple[str, int, int]], *chunks: list[dict[str, bytes]]) -> int:
        """Write a shard. ``samples``: key, which of ``chunks``, which sample of it. Returns their number."""
        with Path(path).open("wb") as file:
            tar = tar_writer(file)
            for key, chunk, at in samples:
                for ending, raw in chunks[chunk][at].items():
                    tar.write({"__key__": key, ending: raw})
            tar.close()
        return len(samples)


class RayShardWriter(ShardWriter):
    """Decides as its base does which sample is in which shard, and lets actors write them."""

    def __init__(self, ray: Any, actors: Iterator[Any], *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._ray, self._actors = ray, actors
        self._samples: list[tuple[str, int, int]] = []
        self._refs: dict[Any, int] = {}
        self._path = Path()
        self._writing: list[Any] = []

    def _open(self, path: Path) -> None:
        self._path, self._samples, self._refs = path, [], {}

    def _append(self, key: str, members: Mapping[str, bytes]) -> None:
        if not isinstance(members, Elsewhere):
            raise TypeError(f"{key}: its bytes are not in the object store")
        chunk = self._refs.setdefault(members.ref, len(self._refs))
        self._samples.append((key, chunk, members.at))

    def _close(self) -> None:
        self._writing.append(next(self._actors).write.remote(str(self._path.resolve()), self._samples, *self._refs))
        self._samples, self._refs = [], {}
        while len(self._writing) > WRITING:
            self._wait_for_first()

    def finished(self, wait: bool = False) -> int:
        """As the base's; a shard counts once its actor is done. Raises DataError: it could not be written."""
        while self._writing and (wait or self._ray.wait(self._writing[:1], timeout=0)[0]):
            self._wait_for_first()
        return super().finished() - len(self._writing)

    def _wait_for_first(self) -> None:
        try:
            self._ray.get(self._writing[0])
        except self._ray.exceptions.RayError as e:
            raise DataError(f"a shard could not be written on the Ray cluster: {_cause(e)}") from e
        del self._writing[0]


@dataclass
class _Begun:
    outcomes: Any
    members: Any


class OnRay:
    """An engine on Ray with ``processes`` actors.

    Raises:
        ConfigError: ray is not installed, or no cluster answers at the address.
    """

    def __init__(self, cfg: SourceConfig, address: str) -> None:
        try:
            import ray
        except ImportError as e:
            raise ConfigError("--engine ray needs ray: pip install 'dualenc[ray]'") from e
        self.cfg, self.ray = cfg, ray
        self._mine = not ray.is_initialized()
        if self._mine:
            _connect(ray, address)
        enough = cfg.processes <= int(ray.cluster_resources().get("CPU", 0))
        actor = ray.remote(PackerActor).options(num_cpus=1 if enough else 0)
        self._actors = [actor.remote(cfg) for _ in range(cfg.processes)]

    def writer(self, folder: Path, split: str, complete: int) -> ShardWriter:
        """A writer whose shards are written by the actors."""
        return RayShardWriter(
            self.ray,
            itertools.cycle(self._actors),
            folder,
            max_samples=self.cfg.shard_samples,
            max_bytes=self.cfg.shard_mb * 1e6,
            split=split,
            overwrite=self.cfg.overwrite,
            complete=complete,
        )

    def pack(self, chunks: Iterable[Chunk], needed: Callable[[Chunk], bool]) -> Iterator[tuple[Chunk, list[Outcome]]]:
        """As :meth:`dualenc_data_tools.packing.engines.PackingEngine.pack`.

        Raises:
            DataError: an actor died.
        """
        turn = itertools.cycle(self._actors)

        def begin(chunk: Chunk) -> _Begun | None:
            if not needed(chunk):
                return None
            return _Begun(*next(turn).pack.options(num_returns=2).remote(chunk))

        def result(begun: _Begun | None) -> list[Outcome]:
            if begun is None:
                return []
            try:
                outcomes: list[Outcome] = self.ray.get(begun.outcomes)
            except self.ray.exceptions.RayError as e:
                raise DataError(f"packing on the Ray cluster failed: {_cause(e)}") from e
            for outcome in outcomes:
                if isinstance(outcome, Packed) and isinstance(outcome.members, Elsewhere):
                    outcome.members.ref = begun.members
            return outcomes

        yield from ahead(chunks, begin, result, AHEAD * len(self._actors))

    def close(self) -> None:
        """End the actors, and the cluster if it was started here."""
        for actor in self._actors:
            self.ray.kill(actor)
        if self._mine:
            self.ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    try:
        if address != "auto":
            more = {"include_dashboard": False} if address == "local" else {}
            ray.init(address=address, log_to_driver=False, **more)
            return
        try:
            ray.init(address="auto", log_to_driver=False)
        except ConnectionError:
            ray.init(address="local", include_dashboard=False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise ConfigError(f"--address {address}: no Ray cluster answers ({' '.join(str(e).split())[:200]})") from e


def _cause(error: Exception) -> str:
    cause = error.__cause__ or error
    return " ".join(str(cause).split())[-400:]
