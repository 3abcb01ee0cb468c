"""Transcoding of the files of a folder, and an estimate of its cost."""

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from hpm_video.files.failures import Failure
from hpm_video.preparation.findings import stamp_of
from hpm_video.preparation.jobs import remove, run_jobs
from hpm_video.preparation.prepared_folder import PreparedFolder
from hpm_video.preparation.shards import pack_shard
from hpm_video.preparation.transcode import Output, Transcoder
from hpm_video.workers.pool import Limits
from hpm_video.workers.progress_bar import ProgressBar

MOST_TRIALS = 8  # limit on the files that an estimate tries; of fewer than 80 files, a tenth


def make(folder: PreparedFolder, places: Sequence[str], workers: int, limits: Limits) -> None:
    """Make outputs, and record them.

    Raises:
        OSError: the disk accepts no more data.
        PoolError: the processes fail.
    """
    jobs = {place: folder.job(place) for place in places}
    with (
        closing(ProgressBar(len(jobs), "files", "frames/s")) as bar,
        closing(run_jobs(Transcoder(folder.recipe), jobs, workers, limits)) as results,
    ):
        for place, result in results:
            if isinstance(result, Output):
                folder.note(place, result)
                bar.advance(result.num_frames)
            else:
                remove(jobs[place].temporary)
                folder.fail(place, result.reason)
                bar.advance(0)


def pack(folder: PreparedFolder, workers: int, limits: Limits) -> None:
    """Write the shards that are missing, and record them.

    Raises:
        OSError: a shard cannot be written.
        PoolError: the processes fail.
    """
    jobs = {shard.target: shard for shard in folder.unpacked_shards()}
    # Nothing is decoded, and a large file is copied in one step: it may take longer.
    limits = replace(limits, seconds=10 * limits.seconds)
    with (
        closing(ProgressBar(len(jobs), "shards", "MB/s")) as bar,
        closing(run_jobs(pack_shard, jobs, workers, limits)) as results,
    ):
        for target, result in results:
            if isinstance(result, Failure):
                remove(jobs[target].temporary)
                raise OSError(f"{target} cannot be written: {result.reason}")
            folder.note_shard(jobs[target], result)
            bar.advance(sum(member.size for member in result) / 1e6)


@dataclass(frozen=True)
class Estimate:
    """Estimate of size and time for all files, from trials with some of them."""

    tried: int  # number of successful trials
    files: int
    before: int  # total bytes of the sources
    after: int  # total bytes of the outputs
    seconds: float  # time that one process would take


def estimate(
    folder: PreparedFolder, places: Sequence[str], workers: int, limits: Limits
) -> Estimate:
    """Estimate the cost of ``places`` by transcoding the first seconds of a few of them.

    Bytes and time are taken to be proportional to the bytes of the source. Files that are packed
    unchanged need no trial.
    """
    before = sum(stamp_of(place).bytes or 0 for place in places)
    if folder.recipe.copy:
        return Estimate(len(places), len(places), before, before, 0.0)
    count = min(MOST_TRIALS, ceil(len(places) / 10))
    chosen = [places[i * len(places) // count] for i in range(count)]
    there = folder.unfinished if folder.unfinished.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="transcode-", dir=there) as temporary:
        jobs = {place: folder.job(place, Path(temporary)) for place in chosen}
        results = [*run_jobs(Transcoder(folder.recipe), jobs, workers, limits)]
    made = [each for _, each in results if isinstance(each, Output) and each.share > 0]
    source = sum(output.source_bytes for output in made)
    scale = before / source if source else 0.0
    after = round(scale * sum(output.bytes / output.share for output in made))
    seconds = scale * sum(output.seconds / output.share for output in made)
    return Estimate(len(made), len(places), before, after, seconds)
