"""What the bound on memory needs from the allocator."""

import contextlib
import ctypes

_MMAP_THRESHOLD = -3  # of glibc's mallopt


def return_at_once() -> None:
  """Makes freed blocks of 128 KiB or more go back to the system, from now on.

  glibc raises this threshold to 32 MiB and keeps the rest per thread, which
  made the peak of a merge 1.5 to 3 times what it used. For commands: it holds
  for the whole process and costs some time for every large array. Elsewhere
  than on glibc it does nothing.
  """
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL('libc.so.6').mallopt(_MMAP_THRESHOLD, 1 << 17)
