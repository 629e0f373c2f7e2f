#!/usr/bin/env bash
# DuckDB writes a column FLOAT[2] with a NULL as Parquet that pyarrow cannot read.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check duckdb==2.0.1 pyarrow==26.0.1
cd "$folder"
env/bin/python - <<'PYTHON'
import sys

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

rows = "(values (1, [1.0, 2.0]::float[{n}]), (2, null)) t(id, v)"
for name, n in (("array", 2), ("list", "")):
    query = f"select * from {rows.format(n=n)}"
    duckdb.sql(f"copy ({query}) to '{name}.parquet' (format parquet)")
print("duckdb", duckdb.__version__, "pyarrow", pa.__version__)
print("expected: as with FLOAT[]:", pq.read_table("list.parquet").to_pylist())
try:
    seen = str(pq.read_table("array.parquet").to_pylist())
    broken = False
except pa.ArrowInvalid as exc:
    seen, broken = f"ArrowInvalid: {exc}", True
print("seen:", seen)
sys.exit(int(not broken))
PYTHON
