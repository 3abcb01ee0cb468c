"""Transcoding of the files of a folder by a pool of processes, and an estimate of its cost."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from hpm_video.files.failures import Failure
from hpm_video.preparation.check import stamp_of
from hpm_video.preparation.jobs import Broken, Step, answers, remove
from hpm_video.preparation.prepared_folder import PreparedFolder
from hpm_video.preparation.shards import Shard
from hpm_video.preparation.transcode import Job, Output
from hpm_video.workers.pool import Lost, Pool

MOST_TRIALS = 8
"""Limit on the files that an estimate tries; of fewer than 80 files, a tenth."""
Advance = Callable[[int, bool], None]
"""Takes the number of new frames, and whether a file is done with them."""


def make(folder: PreparedFolder, pool: Pool[Job], places: Sequence[str], advance: Advance) -> None:
    """Make outputs, and record them.

    Raises:
        OSError: the disk accepts no more data.
        PoolError: the processes fail.
    """
    jobs = {place: folder.job(place) for place in places}
    for place, result in _results(pool, jobs, advance):
        if isinstance(result, Output):
            folder.note(place, result)
        else:
            remove(jobs[place].temporary)
            folder.fail(place, result.reason)


def pack(folder: PreparedFolder, pool: Pool[Shard], shards: Sequence[Shard]) -> Iterator[int]:
    """Write shards, and record them. -> the bytes of each

    Raises:
        OSError: a shard cannot be written.
        PoolError: the processes fail.
    """
    jobs = {shard.target: shard for shard in shards}
    for target, result, is_last in answers(pool, jobs):
        if isinstance(result, Broken | Lost):
            remove(jobs[target].temporary)
            raise OSError(f"{target}: {result.reason}")
        if is_last:
            folder.note_shard(jobs[target], result)
            yield sum(member.size for member in result)


def _results(
    pool: Pool[Job], jobs: Mapping[str, Job], advance: Advance
) -> Iterator[tuple[str, Output | Failure | Lost]]:
    written = dict.fromkeys(jobs, 0)
    for place, result, is_last in answers(pool, jobs):
        if isinstance(result, Broken):
            raise OSError(f"{result.reason}. What is done stays; make room, and go on")
        frames = result.frames if isinstance(result, Step) else written[place]
        frames = result.num_frames if isinstance(result, Output) else frames
        advance(max(0, frames - written[place]), is_last)
        written[place] = max(frames, written[place])
        if is_last:
            yield place, result


@dataclass(frozen=True)
class Estimate:
    """Estimate of size and time for all files, from trials with some of them."""

    tried: int
    """Number of successful trials."""
    files: int
    before: int
    """Total bytes of the sources."""
    after: int
    """Total bytes of the outputs."""
    seconds: float
    """Time that one process would take."""


def try_out(folder: PreparedFolder, pool: Pool[Job], places: Sequence[str]) -> Estimate:
    """Estimate the cost of ``places`` by transcoding the first seconds of a few of them.

    Bytes and time are taken to be proportional to the bytes of the source. Files that are packed
    unchanged need no trial.
    """
    before = 0
    for place in places:
        with contextlib.suppress(OSError):
            before += stamp_of(place).bytes or 0
    if folder.recipe.copy:
        return Estimate(len(places), len(places), before, before, 0.0)
    count = min(MOST_TRIALS, ceil(len(places) / 10))
    chosen = [places[i * len(places) // count] for i in range(count)]
    source = taken = seconds = 0.0
    tried = 0
    unfinished = folder.path / ".unfinished"  # missing where only an estimate is wanted
    with tempfile.TemporaryDirectory(
        prefix="transcode-", dir=unfinished if unfinished.is_dir() else None
    ) as temporary:
        jobs = {place: folder.job(place, Path(temporary)) for place in chosen}
        for place, result in _results(pool, jobs, lambda *_: None):
            if isinstance(result, Output) and result.share > 0:
                tried += 1
                source += stamp_of(place).bytes or 0
                taken += result.bytes / result.share
                seconds += result.seconds / result.share
    scale = before / source if source else 0.0
    return Estimate(tried, len(places), before, round(taken * scale), seconds * scale)
