#!/usr/bin/env bash
# A pyarrow dataset reads later files as the first one's type: numbers that do not fit are infinite.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 numpy==2.4.6
cd "$folder"
env/bin/python - <<'PYTHON'
import math
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

os.mkdir("parts")
pq.write_table(pa.table({"x": np.array([1, 2], np.float16)}), "parts/a.parquet")
pq.write_table(pa.table({"x": np.array([70000, 3], np.float32)}), "parts/b.parquet")
print("pyarrow", pa.__version__)
os.mkdir("whole")
pq.write_table(pa.table({"x": np.array([1, 2], np.int8)}), "whole/a.parquet")
pq.write_table(pa.table({"x": np.array([70000, 3], np.int64)}), "whole/b.parquet")
try:
    whole = str(ds.dataset("whole").to_table())
except pa.ArrowInvalid as exc:
    whole = str(exc)
print("expected: 70000.0, or an error as with int8 and int64:", whole)
try:
    found = ds.dataset("parts").to_table()["x"].to_pylist()
except pa.ArrowInvalid as exc:
    found = [str(exc)]
print("seen:", found)
sys.exit(int(not any(isinstance(one, float) and math.isinf(one) for one in found)))
PYTHON
