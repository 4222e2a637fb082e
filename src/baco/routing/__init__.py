"""Which of the two models speaks: routers, their names, and the law that words are whole."""
