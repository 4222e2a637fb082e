"""The two models of a pair: finding, loading, joining and running them."""
