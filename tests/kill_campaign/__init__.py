"""Kills `dpar tokenize` and `dpar patchify` at random moments and compares what is there in the end with an
undisturbed run, byte by byte:

    python -m tests.kill_campaign --kills 100                # writing to a disk
    python -m tests.kill_campaign --kills 100 --on bucket    # from and to s3://, on a server of this machine
    python -m tests.kill_campaign --kills 100 --on ray       # --engine ray, on a cluster of this machine

Each victim is the real command in processes of its own. It is left alone until a first new shard shows that it is at
work, then for a random while, then one or all of its processes get SIGKILL (on Ray a worker, a node, or the driver);
and again, until all shards are done. Whatever has a final name after a kill must already have its final bytes, no
finished shard may be written twice, and nothing else may be left in the end.
"""
