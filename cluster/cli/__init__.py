"""The `diptych` command: reads what a person typed and answers in a terminal."""
