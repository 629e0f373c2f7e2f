"""Several collections, of one database or of several, searched as one."""
