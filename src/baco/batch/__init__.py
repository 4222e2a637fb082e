"""Many prompts, answered into a directory of shards by one process or by the replicas of a cluster.

A shard is a range of rows, decoded together and written in one step under a name that says the
range. So a shard that is there is whole, one that is missing was never begun as far as a reader can
tell, and whoever makes it, however often, makes the same bytes.
"""
