"""The process that times ONNX Runtime, and does nothing else: ``python -m tokenprune.saving.onnx_process``.

Its arguments are a number of threads, and files. Each line of its input is ``images`` and a NumPy file that is loaded,
or ``run`` and the number of a file that is run with these images; both are answered with seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def main(threads: int, files: Sequence[str], lines: Iterable[str], say: Callable[[str], Any]) -> None:
    """Load files, and do what each line says."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # The threads of a session wait actively for more to do, which would go on while the next one runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    sessions = [onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in files]
    images = None
    for line in lines:
        what, _, about = line.strip().partition(" ")
        start = time.perf_counter()
        if what == "images":
            images = np.load(about)
        else:
            session = sessions[int(about)]
            session.run(None, {session.get_inputs()[0].name: images})
        say(f"{time.perf_counter() - start}\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main(int(sys.argv[1]), sys.argv[2:], sys.stdin, sys.stdout.write)
