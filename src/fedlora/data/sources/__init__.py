"""Where pictures come from: what a source is, and one file per kind of storage."""
