"""One of two processes with two devices each: `one_of_two.py RANK PORT FOLDER` prints what it read, as JSON.

test_loader_sharded.py writes the folder and runs both.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import aq_jax as aq


def resident(path: Path) -> int:
    """Bytes of the mapped file whose pages this process has; the kernel gives a few more than are looked at."""
    found = inside = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def digests(array: jax.Array) -> dict[str, str]:
    """Of the shards that this process has, by their place in the array."""
    return {
        str([part.indices(n)[:2] for part, n in zip(shard.index, array.shape, strict=True)]): hashlib.sha256(
            np.asarray(shard.data).tobytes()
        ).hexdigest()
        for shard in array.addressable_shards
    }


def main(rank: int, port: str, folder: Path) -> dict[str, Any]:
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    rows, columns, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("model",), (None, "model"), ()))
    out: dict[str, Any] = {}
    for path in sorted(folder.glob("big.*")):
        with aq.WeightLoader(path) as loader:
            arrays: list[Any] = []
            for name in ("float", "int8", "int4"):
                for packed in (False, True):
                    for how, sharding in (("rows", rows), ("columns", columns), ("whole", whole)):
                        before = loader.bytes_read
                        arrays.append(loader.load_sharded(name, sharding, packed=packed))
                        found = {
                            "bytes": loader.bytes_read - before,
                            "shards": [digests(leaf) for leaf in jax.tree.leaves(arrays[-1])],
                            "partly": name in loader.partly_read,
                        }
                        out[f"{path.suffix} {name} {packed} {how}"] = found
        # All processes compute with what each has read a part of.
        out[f"{path.suffix} sum"] = float(jax.jit(lambda x: (x * x).sum(), out_shardings=whole)(arrays[0]))
    for path in sorted(folder.glob("wide.*")):
        with aq.WeightLoader(path) as loader:
            opened = resident(path)
            loader.load_sharded("w", rows)
            out[f"{path.suffix} resident"] = [opened, resident(path)]
    with aq.WeightLoader(folder / "grids.arrow") as loader:
        opened = resident(folder / "grids.arrow")
        loader.load_sharded("w", rows, packed=True)
        out["grids resident"] = [opened, resident(folder / "grids.arrow")]
    with aq.WeightLoader(folder / "cut.parquet") as loader:
        packed = loader.load_sharded("w", rows, packed=True)
        out["cut"] = [loader.bytes_read, [digests(leaf) for leaf in jax.tree.leaves(packed)]]
    encoder = aq.load_model(folder / "bert" / "m.parquet", mesh=mesh)
    embedded = encoder.encode(["A quick red cat.", "The moon"])
    out["embeddings"] = np.asarray(embedded).tolist()
    out["spread"] = str(encoder.model.layers[0].up.weight.get_value().codes.sharding.spec)
    return out


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
