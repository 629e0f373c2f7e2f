"""An ONNX model, run by ONNX Runtime."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from amips_plugins.background.forks import renew_after_fork
from amips_plugins.errors import BundleCorrupt
from amips_plugins.models.onnx_check import check_onnx
from amips_plugins.vectors import FloatArray

__all__ = ["OnnxModel"]

_MOST_LOOKED_UP = 1 << 19  # numbers in a run: more than 2 MiB fall out of a processor's cache


class OnnxModel:
    """A model loaded from bytes that ``onnx_check`` has passed; a query costs ``multiplications``.

    With one thread there is no pool: the model runs on the thread that calls, and any number of
    workers can share it; that is fastest for single queries too. With more, all calls share one
    pool, which sleeps between calls, so that it takes no core from a database beside it.
    """

    def __init__(self, data: bytes, threads: int = 1) -> None:
        work = check_onnx(data)
        self.multiplications = work.multiplications
        self._at_once = max(1, _MOST_LOOKED_UP // work.looked_up) if work.looked_up else None
        self._data = data
        self._threads = threads
        self._session: Any = self._open()
        self._rows = threading.local()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Open the model anew at its next use: a thread of the parent may have been in a run.

        The parent's session keeps the locks of that moment. It stays for as long as the process,
        for to end it waits for them, and for threads that are not here.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((self._session, self._rows)))
        self._session, self._rows = None, threading.local()

    def _open(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Else the runtime guesses, and may take the bytes for its own, unchecked format.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.log_severity_level = 4  # the library reports through exceptions, not on stderr
        try:
            return onnxruntime.InferenceSession(
                self._data, options, providers=["CPUExecutionProvider"]
            )
        except Exception as exc:
            raise BundleCorrupt(f"ONNX Runtime refuses the model: {exc}") from exc

    def _opened(self) -> Any:
        if self._session is None:
            self._session = self._open()
        return self._session

    @property
    def inputs(self) -> dict[str, list[Any]]:
        """Names and shapes of the inputs; a free axis is a string."""
        return {node.name: node.shape for node in self._opened().get_inputs()}

    @property
    def outputs(self) -> dict[str, list[Any]]:
        """Names and shapes of the outputs; a free axis is a string."""
        return {node.name: node.shape for node in self._opened().get_outputs()}

    def run(
        self, outputs: Sequence[str], inputs: Mapping[str, npt.NDArray[Any]]
    ) -> list[npt.NDArray[Any]]:
        """Run the model; outputs not asked for are computed all the same.

        One that copies weights for every query is run on a few queries at a time.
        """
        session, step = self._session or self._opened(), self._at_once
        count = min(map(len, inputs.values()))
        result: list[npt.NDArray[Any]]
        if step is None or count <= step:
            result = session.run(outputs, inputs)
            return result
        parts = [
            session.run(outputs, {name: rows[low : low + step] for name, rows in inputs.items()})
            for low in range(0, count, step)
        ]
        result = [np.concatenate(found) for found in zip(*parts, strict=True)]
        return result

    def run_row(self, output: str, queries: FloatArray) -> FloatArray:
        """Run the model on one query, ``(1, dim)``, from and to memory that each thread keeps.

        With cold caches that takes three quarters of what ``run`` does. The result is this
        thread's until its next call.
        """
        session = self._session or self._opened()
        row = getattr(self._rows, "row", None)
        if row is not None and row.session is session and row.output == output:
            found: FloatArray = row.run(queries)
        else:
            (found,) = session.run([output], {"queries": queries})
            self._rows.row = _Row(session, output, queries, found)
        return found


class _Row:
    """The memory of one thread for one query and what a model says of it."""

    def __init__(self, session: Any, output: str, queries: FloatArray, found: FloatArray) -> None:
        from onnxruntime import OrtValue

        self.session = session
        self.output = output
        self._given: FloatArray = np.array(queries)
        self._found: FloatArray = np.array(found)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("queries", OrtValue.ortvalue_from_numpy(self._given))
        self._binding.bind_ortvalue_output(output, OrtValue.ortvalue_from_numpy(self._found))

    def run(self, queries: FloatArray) -> FloatArray:
        """Run the model."""
        self._given[0] = queries[0]
        self.session.run_with_iobinding(self._binding)
        return self._found
