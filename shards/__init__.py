"""Artifacts, on disk or at a URL: the output of one stage and the input of the next.

    artifact = open_artifact("patches/", kind="patches")
    batch = artifact.gather(rows=np.array([0, 7]), views=np.array([0, 0]))

A directory holds shards (Arrow IPC or WebDataset tar) and a ``manifest.json`` that is written last. This package
does not depend on the models, and only `shards.dataset` depends on torch.
"""
