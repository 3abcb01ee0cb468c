"""Buffers of batches that several processes write to, and the way from there to a GPU."""

import logging
import multiprocessing
from collections import deque
from contextlib import suppress
from ctypes import addressof, c_byte, sizeof
from typing import Any
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray

from hpm_video.data.batch import ClipBatch

log = logging.getLogger(__name__)


class Buffers:
    """Buffers of batches, in memory that other processes write to.

    A buffer is free when nothing refers to its array: no batch that is read, no tensor of one, no
    copy to a GPU. No process writes to it then: the jobs of a batch that is read are done or dead.
    """

    def __init__(self, count: int, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        self.shared: Any = context.RawArray(c_byte, count * size)
        self.free = deque(range(count))
        self._size = size

    def take(self) -> tuple[int, NDArray[np.uint8]]:
        """Take a free buffer. -> where it begins, its array"""
        number = self.free.popleft()
        array = np.frombuffer(self.shared, np.uint8, self._size, number * self._size)
        finalize(array, self.free.append, number).atexit = False
        return number * self._size, array


class Sender:
    """Copies batches to a GPU beside what it is at, from shared memory that is pinned for that."""

    def __init__(self, device: torch.device, shared: Any) -> None:
        """``shared``: memory that batches are views of."""
        self._stream = torch.cuda.Stream(device)
        self._device, self._shared = self._stream.device, shared  # now with its index
        self._pinned = self._pin()
        self._sent = deque[tuple[Any, ClipBatch]]()

    def begin(self) -> None:
        """Prepare a thread for sending: it would take some of GPU 0, of another process."""
        torch.cuda.set_device(self._device)

    def send(self, batch: ClipBatch) -> tuple[ClipBatch, Any]:
        """Begin to copy a batch, whose place stays taken for that long. -> the copy, its end"""
        with torch.cuda.stream(self._stream):
            copy = batch.to(self._device)
        event = self._stream.record_event(torch.cuda.Event(blocking=True))
        self._sent.append((event, batch))
        return copy, event

    def wait(self, left: int = 1) -> None:
        """Wait until at most so many batches are being copied, and give their places back."""
        while self._sent and (len(self._sent) > left or self._sent[0][0].query()):
            self._sent.popleft()[0].synchronize()

    def receive(self, copy: ClipBatch, event: Any) -> ClipBatch:
        """Have the calling thread use a batch once it is copied, without waiting for that."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for tensor in (copy.clips, copy.keys, copy.labels):
            tensor.record_stream(current)
        return copy

    def close(self) -> None:
        """Wait for the last copies, and have the memory be as it was."""
        self.wait(left=0)
        if self._pinned:
            cudart: Any = torch.cuda.cudart()
            cudart.cudaHostUnregister(addressof(self._shared))

    def _pin(self) -> bool:
        """Keep the memory in place, for a GPU to copy from it, and say whether that worked."""
        cudart: Any = torch.cuda.cudart()
        size = sizeof(self._shared)
        with torch.cuda.device(self._device):
            error = cudart.cudaHostRegister(addressof(self._shared), size, 0)
            if int(error) == 0:
                return True
            with suppress(RuntimeError):  # which takes the error with it
                torch.zeros(1, device=self._device).add_(1)
        log.warning(
            "%.0f MiB of shared memory could not be pinned (%s): copies to the GPU take longer. "
            "Allow more locked memory (ulimit -l, docker run --ulimit memlock=-1)",
            size / 2**20,
            cudart.cudaGetErrorString(error),
        )
        return False
