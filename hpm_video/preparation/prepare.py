"""Having the outputs of a folder of prepared data made by processes, and an estimate of that."""

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
from hpm_video.preparation.transcode import Job, Made
from hpm_video.workers.pool import Lost, Pool

TRIED = 8
"""Files that an estimate is made from, at most; of few files a tenth."""
Advance = Callable[[int, bool], None]
"""Takes how many frames were written, and whether a file is done with them."""


def make(folder: PreparedFolder, pool: Pool[Job], places: Sequence[str], advance: Advance) -> None:
    """Have outputs made, and take them in.

    Raises:
        OSError: nothing can be written any more.
        PoolError: the processes do not work.
    """
    jobs = {place: folder.job(place) for place in places}
    for place, result in _results(pool, jobs, advance):
        if isinstance(result, Made):
            folder.note(place, result)
        else:
            remove(jobs[place].beside)
            folder.fail(place, result.reason)


def pack(folder: PreparedFolder, pool: Pool[Shard], shards: Sequence[Shard]) -> Iterator[int]:
    """Have shards written, and take them in. -> bytes of each

    Raises:
        OSError: a shard cannot be written.
        PoolError: the processes do not work.
    """
    jobs = {shard.target: shard for shard in shards}
    for target, result, is_last in answers(pool, jobs):
        if isinstance(result, Broken | Lost):
            remove(jobs[target].beside)
            raise OSError(f"{target}: {result.reason}")
        if is_last:
            folder.note_shard(jobs[target], result)
            yield sum(packed.size for packed in result)


def _results(
    pool: Pool[Job], jobs: Mapping[str, Job], advance: Advance
) -> Iterator[tuple[str, Made | Failure | Lost]]:
    written = dict.fromkeys(jobs, 0)
    for place, result, is_last in answers(pool, jobs):
        if isinstance(result, Broken):
            raise OSError(f"{result.reason}. What is done stays; make room, and go on")
        frames = result.frames if isinstance(result, Step) else written[place]
        frames = result.num_frames if isinstance(result, Made) else frames
        advance(max(0, frames - written[place]), is_last)
        written[place] = max(frames, written[place])
        if is_last:
            yield place, result


@dataclass(frozen=True)
class Estimate:
    """What is to be expected of files, made from some of them."""

    tried: int
    """Files it is made from; 0 where none of those tried could be read."""
    files: int
    before: int
    """Bytes of all files."""
    after: int
    """Bytes of all outputs."""
    seconds: float
    """Of work, by one process."""


def try_out(folder: PreparedFolder, pool: Pool[Job], places: Sequence[str]) -> Estimate:
    """Make the first seconds of a few files, throw them away, and conclude to all ``places``.

    Bytes and time are taken to grow with the bytes of the source. Of files that are packed as they
    are nothing has to be made.
    """
    before = 0
    for place in places:
        with contextlib.suppress(OSError):
            before += stamp_of(place).bytes or 0
    if folder.recipe.copy:
        return Estimate(len(places), len(places), before, before, 0.0)
    count = min(TRIED, ceil(len(places) / 10))
    chosen = [places[i * len(places) // count] for i in range(count)]
    source = taken = seconds = 0.0
    tried = 0
    room = folder.path / ".unfinished"  # of an estimate alone there is no folder
    with tempfile.TemporaryDirectory(
        prefix="transcode-", dir=room if room.is_dir() else None
    ) as temporary:
        jobs = {place: folder.job(place, Path(temporary)) for place in chosen}
        for place, result in _results(pool, jobs, lambda *_: None):
            if isinstance(result, Made) and result.share > 0:
                tried += 1
                source += stamp_of(place).bytes or 0
                taken += result.bytes / result.share
                seconds += result.seconds / result.share
    scale = before / source if source else 0.0
    return Estimate(tried, len(places), before, round(taken * scale), seconds * scale)
