"""The stages of the suite: the only readers and writers of files."""
