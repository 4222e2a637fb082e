"""The table of the demo pair: what its routers and rivals do, over training seeds."""
