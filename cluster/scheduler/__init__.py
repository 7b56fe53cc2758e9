"""Where every request runs: pure decisions over a folded view, and a thin actor around them."""
