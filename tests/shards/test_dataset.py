import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from shards.dataset import ArtifactDataset, Sample, StreamingDataset, collate
from shards.order import StreamingOrder
from shards.reader import open_artifact
from tests.shards.test_training_data import CONTAINERS, SIZES, TOTAL, VIEWS, N, make


@pytest.fixture(scope="module", params=CONTAINERS)
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return make(tmp_path_factory.mktemp("data") / "a", request.param)


def rows_of(folder: Path, batches: list[Sample]) -> list[int]:
    """Return the row of each image of some batches, recognised by its codes."""
    artifact = open_artifact(folder)
    rows = np.repeat(np.arange(TOTAL), VIEWS)
    every = artifact.gather(rows, np.tile(np.arange(VIEWS), TOTAL)).codes
    known = {codes.tobytes(): int(row) for codes, row in zip(every, rows, strict=True)}
    return [known[codes.numpy().tobytes()] for batch in batches for codes in batch["codes"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_every_image_once_per_epoch_with_its_label_and_boundaries(folder: Path, workers: int) -> None:
    dataset = ArtifactDataset(folder, view=1)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, num_workers=workers, collate_fn=collate)
    batches = list(loader)
    rows = np.array(rows_of(folder, batches))
    assert sorted(rows) == list(range(TOTAL))
    assert rows.tolist() != sorted(rows)
    expected = open_artifact(folder).gather(rows, np.ones_like(rows))
    for name in ("codes", "labels", "starts"):
        got = torch.cat([batch[name] for batch in batches])
        np.testing.assert_array_equal(got.numpy(), getattr(expected, name))
    assert batches[0]["codes"].shape == (8, N)
    assert (batches[0]["codes"].dtype, batches[0]["starts"].dtype) == (torch.int64, torch.bool)


def test_views_are_drawn_again_each_epoch_and_depend_on_the_seed(folder: Path) -> None:
    def epochs(seed: int) -> list[torch.Tensor]:
        loader = DataLoader(
            ArtifactDataset(folder), batch_size=TOTAL, num_workers=1, collate_fn=collate,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return [next(iter(loader))["codes"] for _ in range(2)]

    first, second = epochs(0)
    assert not torch.equal(first, second)
    for one, other in zip(epochs(0), (first, second), strict=True):
        assert torch.equal(one, other)


def test_an_index_of_an_image_or_a_view_out_of_range_is_an_error(folder: Path) -> None:
    with pytest.raises(IndexError, match=f"there are {TOTAL} images"):
        ArtifactDataset(folder)[TOTAL]
    with pytest.raises(ValueError, match=r"view is 3; .* has views 0 to 2"):
        ArtifactDataset(folder, view=3)


def test_a_dataset_can_be_pickled(folder: Path) -> None:
    dataset = ArtifactDataset(folder, view=0)
    dataset[0]  # its shards are open
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3]["codes"], dataset[3]["codes"])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 4])
def test_processes_and_workers_share_an_epoch_of_a_stream(folder: Path, workers: int, world_size: int) -> None:
    shares = []
    for rank in range(world_size):
        stream = StreamingDataset(folder, seed=5, rank=rank, world_size=world_size)
        shares.append(rows_of(folder, list(DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=collate))))
    assert {len(share) for share in shares} == {TOTAL // world_size}
    rows = [row for share in shares for row in share]
    order = StreamingOrder(shard_rows=SIZES, views=VIEWS, batch=TOTAL, seed=5)
    expected = order.batch(0)[0][: TOTAL - TOTAL % world_size]
    assert sorted(rows) == sorted(expected.tolist())
    if world_size == 1 and workers < 2:
        assert rows == expected.tolist()


def test_epochs_of_a_stream_have_different_orders_in_persistent_workers_too(folder: Path) -> None:
    stream = StreamingDataset(folder, seed=5)
    loader = DataLoader(stream, batch_size=4, num_workers=1, persistent_workers=True, collate_fn=collate)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append(rows_of(folder, list(loader)))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(TOTAL))


def test_batches_of_codes_have_no_boundaries(tmp_path: Path) -> None:
    dataset = ArtifactDataset(make(tmp_path / "codes", "arrow", kind="codes"))
    assert set(collate([dataset[0], dataset[1]])) == {"codes", "labels"}
