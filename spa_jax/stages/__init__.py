"""The stages of a run: each takes a `run.Run`, reads earlier stages' files and writes its own."""
