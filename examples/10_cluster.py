"""One checkpoint compressed by the processes of a cluster: the same job, the same bytes, other workers.

The work is a list of small descriptions, each of which says what to read, what to make of it, and where to write it.
Any executor of ``concurrent.futures`` can carry them out, on any machine that sees source and destination under the
same paths; a worker that dies costs the pieces that it was at. Here it is Dask's, with two processes on this machine;
for a cluster that is there already, give ``Client`` its address.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from distributed import Client, LocalCluster
from safetensors.torch import save_file

from compressed_format import check, compress_checkpoint

CONFIG = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}}}}
LAYERS, FEATURES = 24, 1024


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dense").mkdir()
        weights = {f"layers.{layer}.up_proj.weight": torch.randn(FEATURES, FEATURES) for layer in range(LAYERS)}
        save_file(weights, folder / "dense" / "model.safetensors", metadata={"format": "pt"})

        compress_checkpoint(folder / "dense", folder / "by-threads", CONFIG)

        with (
            LocalCluster(2, processes=True, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
            client.get_executor() as executor,
        ):
            compress_checkpoint(folder / "dense", folder / "by-dask", CONFIG, executor=executor)
        print(f"{len(weights)} weights by Dask: {sorted(content(folder / 'by-dask'))}")

        assert content(folder / "by-dask") == content(folder / "by-threads")
        assert check(folder / "by-dask").ok
        print("the same bytes, whoever did the work")


if __name__ == "__main__":
    main()
