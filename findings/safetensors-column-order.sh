#!/usr/bin/env bash
# safetensors.numpy.save stores an array in column order with its numbers in another order.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$folder"
env/bin/python - <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

rows = np.arange(6, dtype=np.float32).reshape(2, 3)
columns = np.asfortranarray(rows)  # equal to it, number by number
print("safetensors", safetensors.__version__)
print("expected: load(save(array)) equals the array:", columns.tolist())
found = load(save({"array": columns}))["array"]
print("seen:", found.tolist())
assert np.array_equal(load(save({"array": rows}))["array"], rows)
sys.exit(int(np.array_equal(found, columns)))
PYTHON
