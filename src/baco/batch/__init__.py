"""Resumable jobs: many prompts answered into a file or a directory, here or on a cluster.

`job` has the engine, `answer_file` and `shards` have the two outputs for prompts; the sweep of
`baco.evaluation` has its own.
"""
