"""The artifacts on disk: what a stage writes and the next one reads.

    artifact = open_artifact("patches/", kind="patches")
    batch = artifact.gather(rows=np.array([0, 7]), views=np.array([0, 0]))

A directory holds shards (Arrow IPC or WebDataset tar) and a ``manifest.json`` that is written last. This package
knows nothing of torch and nothing of models.
"""
