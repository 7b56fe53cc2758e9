"""`python -m cluster`: the `diptych` command, in a source tree that nobody installed too."""

from cluster.source_tree import enter_source_tree

enter_source_tree()

from cluster.cli.main import main  # noqa: E402  (needs `diptych`, which the line above makes importable)

if __name__ == "__main__":
    main()
