"""Memory of a process, read from outside it through Linux's /proc.

``VmHWM`` is the peak of the resident memory since the process began, or since ``5`` was last written to its
``clear_refs`` (man 5 proc). It counts every page, shared libraries included, so a figure holds what importing torch
costs.
"""

from __future__ import annotations

from pathlib import Path

import psutil


def resident_bytes(process_id: int) -> int:
    """Resident memory now; 0 where /proc cannot tell."""
    return _status_bytes(process_id, "VmRSS")


def peak_bytes(process_id: int) -> int:
    """Peak of the resident memory since the process began or since ``reset_peak``; 0 where /proc cannot tell."""
    return _status_bytes(process_id, "VmHWM")


def reset_peak(process_id: int) -> bool:
    """Start the peak again from what is resident now; False where this is not possible."""
    try:
        Path(f"/proc/{process_id}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def tree_resident_bytes(process_id: int) -> int:
    """Resident memory of a process and all its descendants now (compilers that it started, for instance)."""
    total = 0
    try:
        root = psutil.Process(process_id)
        for process in (root, *root.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.Error:  # it ended between the listing and the reading
                continue
    except psutil.Error:
        return total
    return total


def _status_bytes(process_id: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024  # the kernel prints kB
    return 0
